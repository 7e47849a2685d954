//! ChatGLM2 on candle tensors, forward and backward written out.
//!
//! Tensor names carry shape suffixes: R rows, T tokens, H hidden, F feed-forward, N query heads (or the width of something in their space),
//! G kv groups, P prefix, D head dim, V vocabulary.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

pub mod block;
pub mod chatglm2;
pub mod config;
mod error;
pub mod family;
pub mod generate;
pub mod hooks;
pub mod hub_files;
pub mod init;
pub mod linear;
pub mod loss;
pub mod shape;
mod soft;
pub mod template;
pub mod weights;

pub use chatglm2::{ChatGlm2, Recompute, RopeTable};
pub use config::ModelConfig;
pub use error::ModelError;
pub use weights::{ComputeDtype, WeightDtype};
