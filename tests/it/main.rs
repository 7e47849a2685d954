//! Integration tests: one binary.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod adapter;
mod audit;
mod checkpoints;
mod cli_errors;
mod cli_help;
mod cli_plan;
mod cli_support;
mod compare;
mod crash_matrix;
mod data_errors;
mod docs;
mod full_disk;
mod golden;
mod golden_data;
mod golden_formats;
mod golden_methods;
mod golden_model;
mod golden_peft;
mod golden_tokenizer;
mod golden_train;
mod kernels;
mod layering;
mod methods;
mod model_errors;
mod mpi;
mod overlap;
mod peft;
mod power_loss;
mod rust_source;
mod soft_prompt;
mod stop;
mod support;
mod train;
mod train_errors;
mod tuned;
