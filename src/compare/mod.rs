//! Methods side by side: each is trained on the same rows, in the same batches, for the same number of steps, by [`crate::train::run`].
//!
//! A method is a label and a plan; none is named here. The results stand in [`REPORT_FILE`], which is written whole after each run, so
//! that a comparison that was stopped goes on: finished runs are read back, an unfinished one resumes from its newest checkpoint.

mod error;
pub mod figures;
pub mod picture;
pub mod report;
mod run;
pub mod table;

pub use error::CompareError;
pub use report::{Entry, Figures, REPORT_FILE, Report, RunResult, Shared};
pub use run::{Compared, Contender, Options, StoppedRun, run};
