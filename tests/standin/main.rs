//! The program on a GPU that is not there: the kernels against the CPU's code, the driver's rules, what the host may not do.
#![allow(clippy::result_large_err, reason = "what a test returns once")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod faults;
#[path = "../it/golden.rs"]
mod golden;
#[path = "../it/golden_batch.rs"]
mod golden_batch;
#[path = "../it/golden_subjects.rs"]
mod golden_subjects;
mod kernels;
mod libraries;
mod model;
mod mutations;
#[path = "../it/not_run.rs"]
mod not_run;
mod order;
mod passes;
mod planted;
mod program;
mod raw;
mod steps;
#[path = "../it/support.rs"]
mod support;
mod told;
mod train;
