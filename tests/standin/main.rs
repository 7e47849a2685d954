//! The program on a GPU that is not there: the kernels against the CPU's code, the driver's rules, what the host may not do.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod faults;
mod kernels;
mod libraries;
mod mutations;
mod order;
mod program;
mod raw;
mod told;
