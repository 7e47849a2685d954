//! Hostile input: every file that the program reads, mutated from valid ones and from crafted ones.
//!
//! Of each input it is asserted that the reader does not panic, has no more memory live than a constant and a factor of the input's size,
//! opens and changes nothing outside of the folder that it was given, and names the file in its error. A stack that overflows or a
//! request beyond all bounds ends the process, and the input then still lies in `fuzz/TARGET/in` below the build folder's `tmp`.
//!
//! Inputs are drawn by the program's own [`glmddp::rng::KeyedRng`] from a fixed seed: the same everywhere, on a stable compiler, without a
//! fuzzer's run-time. `scripts/fuzz.sh` runs the same targets for longer, with other seeds and with arithmetic checked for overflow.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod archive;
mod checkpoints;
mod counting;
mod formats;
mod harness;
mod models;
mod mutate;
mod regressions;
mod texts;
mod watch;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// Zeros by name and shape.
fn tensors(shapes: &[(&str, &[usize])]) -> BTreeMap<String, Tensor> {
    shapes.iter().map(|(name, shape)| ((*name).to_owned(), Tensor::zeros(*shape, DType::F32, &Device::Cpu).unwrap())).collect()
}
