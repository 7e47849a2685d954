//! One rank's end is the job's end: one line that names the rank, then all processes stop.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::Write;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ProcessGroup;

/// Exit code of a job that was aborted: our fault, not the user's.
const EXIT_CODE: i32 = 1;

/// Ends the whole job; free to copy into hooks and threads.
#[derive(Clone, Copy, Debug)]
pub struct Aborter {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    /// Stops every process of the job with an exit code.
    pub(super) end: fn(i32) -> !,
}

impl Aborter {
    /// Prints `error: rank 2 of 4: MESSAGE` on stderr and ends all ranks with exit code 1.
    pub fn abort(&self, message: &str) -> ! {
        static ENDING: AtomicBool = AtomicBool::new(false);
        if ENDING.swap(true, Ordering::SeqCst) {
            // Another thread of this rank is ending the job and has said why.
            loop {
                std::thread::park();
            }
        }
        // One write, so that lines of several ranks do not mix. Nothing is left to do where stderr is closed.
        let _ = std::io::stderr().write_all(line(self.rank, self.world_size, message).as_bytes());
        (self.end)(EXIT_CODE)
    }
}

fn line(rank: usize, world_size: usize, message: &str) -> String {
    format!("error: rank {rank} of {world_size}: {}\n", message.lines().map(str::trim).collect::<Vec<_>>().join(" "))
}

/// Makes a panic on any thread of this process end all ranks, so that none waits for it. A panic ends the job even where
/// `catch_unwind` would have caught it.
///
/// With `RUST_BACKTRACE` set, the backtrace follows the line. Does nothing for groups whose ranks are threads.
pub fn install_panic_hook(group: &dyn ProcessGroup) {
    let Some(aborter) = group.aborter() else { return };
    std::panic::set_hook(Box::new(move |info| {
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            let _ = writeln!(std::io::stderr(), "{backtrace}");
        }
        aborter.abort(&describe(info));
    }));
}

fn describe(info: &PanicHookInfo) -> String {
    let what = payload_text(info.payload());
    match info.location() {
        Some(place) => format!("panicked at {}:{}: {what}", place.file(), place.line()),
        None => format!("panicked: {what}"),
    }
}

/// What `panic!` was called with.
pub(super) fn payload_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abort_line_of_a_long_message_is_one_line() {
        assert_eq!(line(2, 4, "a\n  left: 1\n right: 2"), "error: rank 2 of 4: a left: 1 right: 2\n");
    }
}
