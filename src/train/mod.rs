//! The training loop.

pub mod adapters;
pub mod adopt;
pub mod audit;
pub mod backprop;
pub mod base;
pub mod device;
pub mod drift;
mod dump;
mod error;
pub mod evaluate;
mod finite;
pub mod optimizer;
pub mod probe;
pub mod requests;
pub mod resume_report;
pub mod room;
pub mod run;
pub mod save;
pub mod state;
pub mod step;
pub mod together;
pub mod tuned;

pub use error::TrainError;
