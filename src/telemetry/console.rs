//! stderr, shared by lines of text and one progress bar without tearing either.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::format::step_line;
use super::numbers::hours;
use super::record::StepRecord;

/// Writes whole lines above the progress bar. Clones write to the same place.
#[derive(Clone, Debug)]
pub struct Console {
    bars: MultiProgress,
    sink: Sink,
}

#[derive(Clone, Debug)]
enum Sink {
    Stderr,
    #[cfg(test)]
    Memory(std::sync::Arc<std::sync::Mutex<Vec<u8>>>),
}

impl Console {
    /// The bar shows where stderr is a terminal.
    pub fn stderr() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(4)), sink: Sink::Stderr }
    }

    /// For ranks that only warn.
    pub fn without_bar() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), sink: Sink::Stderr }
    }

    /// Writes one line. A stderr that is gone does not end a run: the line is lost.
    pub fn line(&self, text: &str) {
        let _ = self.write_whole(format!("{text}\n").as_bytes());
    }

    /// Starts the progress bar of a run that stands at `done` of `total` steps.
    pub fn step_bar(&self, done: u64, total: u64) -> StepBar {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps | {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(total).with_position(done).with_style(style));
        StepBar { console: self.clone(), bar }
    }

    /// Starts the progress bar of work over `total` bytes.
    pub fn byte_bar(&self, total: u64) -> ByteBar {
        let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} | {bytes_per_sec} | eta {eta}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        ByteBar { bar: self.bars.add(ProgressBar::new(total).with_style(style)) }
    }

    fn write_whole(&self, bytes: &[u8]) -> io::Result<()> {
        self.bars.suspend(|| match &self.sink {
            Sink::Stderr => io::stderr().lock().write_all(bytes),
            #[cfg(test)]
            Sink::Memory(text) => text.lock().map_err(|_| io::ErrorKind::Other)?.write_all(bytes),
        })
    }
}

/// `tracing` hands over each message in one piece.
impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_whole(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The progress bar of a training run; it goes when it is dropped.
#[derive(Debug)]
pub struct StepBar {
    console: Console,
    bar: ProgressBar,
}

impl StepBar {
    /// Moves the bar without a line: a step between two logged ones.
    pub fn advance(&self, step: u64, remaining: Option<Duration>) {
        self.bar.set_message(remaining.map_or_else(String::new, |left| format!("eta {}", hours(left))));
        self.bar.set_position(step);
    }

    /// Prints the step line above the bar and moves the bar.
    pub fn log(&self, record: &StepRecord) {
        self.console.line(&step_line(record));
        self.advance(record.current_steps, record.remaining_time);
    }
}

impl Drop for StepBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The progress bar of work over bytes; it goes when it is dropped.
#[derive(Debug)]
pub struct ByteBar {
    bar: ProgressBar,
}

impl ByteBar {
    /// From any thread.
    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

impl Drop for ByteBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A console that keeps what is written, and a way to read it.
#[cfg(test)]
pub(super) fn captured() -> (Console, impl Fn() -> String) {
    let text = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let console = Console { sink: Sink::Memory(text.clone()), ..Console::without_bar() };
    (console, move || String::from_utf8(text.lock().unwrap().clone()).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_though_the_bar_is_hidden() {
        let (console, text) = captured();
        let bar = console.step_bar(3, 10);
        console.line("one");
        bar.log(&StepRecord { current_steps: 4, total_steps: 10, ..StepRecord::default() });
        assert_eq!(bar.bar.position(), 4);
        drop(bar);
        console.line("two");
        let text = text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines.len(), lines[0], lines[2]), (3, "one", "two"));
        assert!(lines[1].starts_with("step     4/10 | loss "), "{}", lines[1]);
    }
}
