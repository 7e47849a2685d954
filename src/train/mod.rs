//! The training loop.

pub mod adapters;
pub mod backprop;
mod dump;
mod error;
pub mod evaluate;
pub mod optimizer;
pub mod run;
pub mod state;
pub mod step;
pub mod tuned;

pub use error::TrainError;
