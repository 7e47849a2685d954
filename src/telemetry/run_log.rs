//! `trainer_log.jsonl`: one record a line, flushed at once.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::TelemetryError;
use super::record::{EvalRecord, StepRecord};

/// The log's name inside a run's folder.
pub const RUN_LOG_FILE: &str = "trainer_log.jsonl";

/// Appends records to a run's log.
#[derive(Debug)]
pub struct RunLog {
    path: PathBuf,
    file: File,
}

/// What [`RunLog::truncate_after`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Truncation {
    pub kept: usize,
    pub dropped: usize,
}

/// The one field by which a line is judged.
#[derive(Deserialize)]
struct Position {
    current_steps: u64,
}

impl RunLog {
    /// Opens the log in `dir` or starts it. A last line that a crash cut off is dropped with a warning.
    ///
    /// # Errors
    /// A folder that is not there or not writable.
    pub fn open(dir: &Path) -> Result<Self, TelemetryError> {
        let path = dir.join(RUN_LOG_FILE);
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(|source| io("open", &path, source))?;
        let mut log = Self { path, file };
        log.drop_torn_line()?;
        Ok(log)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends a step.
    ///
    /// # Errors
    /// A full disk.
    pub fn step(&mut self, record: &StepRecord) -> Result<(), TelemetryError> {
        self.append(record)
    }

    /// Appends an evaluation.
    ///
    /// # Errors
    /// A full disk.
    pub fn eval(&mut self, record: &EvalRecord) -> Result<(), TelemetryError> {
        self.append(record)
    }

    /// For a resume: drops the records of later steps than `step`. The new file replaces the old one by a rename, so that a crash leaves one of both.
    ///
    /// # Errors
    /// A line that is no record, named by its number; the log is then left as it is.
    pub fn truncate_after(&mut self, step: u64) -> Result<Truncation, TelemetryError> {
        let part = self.path.with_extension("jsonl.part");
        let mut kept = BufWriter::new(File::create(&part).map_err(|source| io("write", &part, source))?);
        let result = self.copy_until(step, &mut kept).and_then(|truncation| {
            let file = kept.into_inner().map_err(|e| io("write", &part, e.into_error()))?;
            file.sync_all().map_err(|source| io("write", &part, source))?;
            std::fs::rename(&part, &self.path).map_err(|source| io("replace", &self.path, source))?;
            Ok(truncation)
        });
        if result.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        let truncation = result?;
        self.file = OpenOptions::new().read(true).append(true).open(&self.path).map_err(|source| io("open", &self.path, source))?;
        Ok(truncation)
    }

    fn copy_until(&self, step: u64, kept: &mut impl Write) -> Result<Truncation, TelemetryError> {
        let old = File::open(&self.path).map_err(|source| io("read", &self.path, source))?;
        let mut truncation = Truncation::default();
        for (index, line) in BufReader::new(old).lines().enumerate() {
            let line = line.map_err(|source| io("read", &self.path, source))?;
            let position: Position = crate::json::read(line.as_bytes()).map_err(|error| TelemetryError::BadLine {
                path: self.path.clone(),
                line: index + 1,
                reason: format!("not a record of a training log ({error})"),
            })?;
            if position.current_steps <= step {
                writeln!(kept, "{line}").map_err(|source| io("write", &self.path, source))?;
                truncation.kept += 1;
            } else {
                truncation.dropped += 1;
            }
        }
        Ok(truncation)
    }

    fn append(&mut self, record: &impl Serialize) -> Result<(), TelemetryError> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(|source| io("write", &self.path, source))
    }

    /// Cuts the file behind its last newline.
    fn drop_torn_line(&mut self) -> Result<(), TelemetryError> {
        let whole = whole_lines_bytes(&mut self.file).map_err(|source| io("read", &self.path, source))?;
        let len = self.file.metadata().map_err(|source| io("read", &self.path, source))?.len();
        if whole < len {
            tracing::warn!("{}: dropped the cut-off last line of {} bytes", self.path.display(), len - whole);
            self.file.set_len(whole).map_err(|source| io("shorten", &self.path, source))?;
        }
        Ok(())
    }
}

/// Bytes up to and with the last newline.
fn whole_lines_bytes(file: &mut File) -> std::io::Result<u64> {
    const BLOCK: u64 = 4096;
    let mut end = file.seek(SeekFrom::End(0))?;
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        let mut block = vec![0; (end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block)?;
        if let Some(at) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> TelemetryError {
    TelemetryError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(current_steps: u64) -> StepRecord {
        StepRecord { current_steps, total_steps: 9, loss: 1.0 / current_steps as f64, ..StepRecord::default() }
    }

    fn written(dir: &Path) -> String {
        std::fs::read_to_string(dir.join(RUN_LOG_FILE)).unwrap()
    }

    fn log_of(dir: &Path, steps: std::ops::RangeInclusive<u64>) -> RunLog {
        let mut log = RunLog::open(dir).unwrap();
        steps.for_each(|s| log.step(&step(s)).unwrap());
        log
    }

    #[test]
    fn records_are_on_disk_at_once_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log_of(dir.path(), 1..=2);
        log.eval(&EvalRecord { current_steps: 2, eval_loss: 0.5, ..EvalRecord::default() }).unwrap();
        assert_eq!(written(dir.path()).lines().count(), 3);
        let _again = log_of(dir.path(), 3..=3);
        let text = written(dir.path());
        let steps: Vec<u64> = text.lines().map(|line| serde_json::from_str::<Position>(line).unwrap().current_steps).collect();
        assert_eq!(steps, [1, 2, 2, 3]);
    }

    #[test]
    fn truncated_log_goes_on_as_if_it_had_never_been_longer() {
        let (whole, resumed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        log_of(whole.path(), 1..=6);
        let mut log = log_of(resumed.path(), 1..=5);
        assert_eq!(log.truncate_after(3).unwrap(), Truncation { kept: 3, dropped: 2 });
        (4..=6).for_each(|s| log.step(&step(s)).unwrap());
        assert_eq!(written(resumed.path()), written(whole.path()));
        assert_eq!(std::fs::read_dir(resumed.path()).unwrap().count(), 1);
    }

    #[test]
    fn torn_last_line_is_dropped() {
        for torn in ["{\"current_steps\": 3, \"lo", "{", &"x".repeat(10_000)] {
            let dir = tempfile::tempdir().unwrap();
            log_of(dir.path(), 1..=2);
            let before = written(dir.path());
            std::fs::write(dir.path().join(RUN_LOG_FILE), format!("{before}{torn}")).unwrap();
            let mut log = RunLog::open(dir.path()).unwrap();
            assert_eq!(written(dir.path()), before);
            assert_eq!(log.truncate_after(9).unwrap().kept, 2);
        }
    }

    #[test]
    fn foreign_line_is_refused_and_the_log_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        log_of(dir.path(), 1..=1);
        let text = format!("{}not json\n", written(dir.path()));
        std::fs::write(dir.path().join(RUN_LOG_FILE), &text).unwrap();
        let error = RunLog::open(dir.path()).unwrap().truncate_after(1).unwrap_err();
        assert!(error.to_string().contains("trainer_log.jsonl, line 2: not a record"), "{error}");
        assert!(error.hint().is_some());
        assert_eq!(written(dir.path()), text);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn missing_folder_is_refused() {
        let error = RunLog::open(Path::new("/nonexistent/run")).unwrap_err();
        assert!(error.to_string().starts_with("cannot open /nonexistent/run/trainer_log.jsonl: "), "{error}");
    }
}
