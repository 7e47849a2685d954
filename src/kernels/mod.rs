//! The operations of the model. One op, one file: its CPU code in plain loops with f32 accumulation is the specification.
//!
//! An op takes and returns candle tensors. Where candle has a fitting differentiable or exact primitive (allocation, gather) it is used; the
//! ops here are those that candle lacks, cuts gradients of, or would need several passes over memory for.
//! Results do not depend on the number of threads: work is split over independent rows only, sums run in a fixed order.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod bf16;
pub mod check;
pub mod column_sums;
pub mod cross_entropy;
pub mod cuda;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
mod gemm;
pub mod gpu;
pub mod host;
pub mod ids;
pub mod kl;
pub mod launch;
pub mod lstm;
pub mod matmul;
pub mod non_finite;
pub mod on_gpu;
pub mod prefix;
pub mod rms_norm;
pub mod rotary;
pub mod simd;
pub mod swiglu;
pub mod tanh;
