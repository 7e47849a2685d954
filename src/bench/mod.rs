//! Measurements of the training step, its cost in operations and its time, and of checkpoints.

pub mod checkpoint;
pub mod flops;
pub mod gpu_times;
pub mod kernels;
pub mod setup;
pub mod step;
pub mod traffic;
