//! Measurements of the training step: its cost in operations, and its time.

pub mod flops;
pub mod setup;
pub mod step;
