//! glmddp fine-tunes ChatGLM2 data-parallel, without Python.
#![doc = include_str!("ARCHITECTURE.md")]
#![deny(unsafe_code)]

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod compare;
pub mod config;
pub mod data;
pub mod digest;
pub mod dist;
pub mod formats;
pub mod json;
pub mod kernels;
pub mod model;
pub mod optim;
pub mod params;
pub mod paths;
pub mod peft;
pub mod rng;
pub mod shell;
pub mod telemetry;
pub mod tokenizer;
pub mod train;
