//! Bytes that a training step's kernels move, from the formulas beside their launches: what tests count is what is added up here.

use crate::kernels::attention::Heads;
use crate::kernels::cross_entropy::{self, Logits};
use crate::kernels::launch::{Bytes, KernelDtype};
use crate::kernels::{adamw, embedding, rms_norm, rotary, swiglu};

use super::kernels::Shape;

const DTYPE: KernelDtype = KernelDtype::Bf16;

/// One kernel, or a product of cuBLASLt.
#[derive(Clone, Debug, PartialEq)]
pub struct Traffic {
    pub name: &'static str,
    /// Launches of a step: a layer's times their number, or once.
    pub times: usize,
    /// Bytes a token if each operand goes in or out of memory once; operands that all tokens share (weights, tables) are left out.
    pub least: f64,
    /// Bytes a token that the kernel's threads ask for, wherever they are found; none of cuBLASLt, whose insides are its own.
    pub asked: Option<f64>,
}

/// A step of P-Tuning v2 with a frozen base in bf16, nothing recomputed, all tokens in the loss.
pub fn step(shape: &Shape, num_layers: usize) -> Vec<Traffic> {
    let &Shape { tokens, hidden, ffn, vocabulary, chunk, heads, parameters, .. } = shape;
    let Heads { num_heads, num_groups, head_dim } = heads;
    let (s, t) = (DTYPE.num_bytes(), tokens as f64);
    let width = heads.qkv_width();
    let out_width = num_heads * head_dim;
    let turned = num_heads + num_groups;
    let asked = |bytes: Bytes| Some((bytes.read + bytes.written) as f64 / t);
    let of_layers = 2 * num_layers;
    let entry = |name, times, least: usize, asked| Traffic { name, times, least: least as f64, asked };
    let product = |name, from: usize, to: usize, added: usize| entry(name, num_layers, s * (from + to + added), None);
    let rotary_bytes = asked(rotary::device::bytes(DTYPE, tokens, turned, head_dim));
    let rotary_least = turned * head_dim / 2 * 2 * s + 2 * head_dim;
    let loss = cross_entropy::device::bytes(DTYPE, chunk, vocabulary, Logits::ToGradient);
    let adamw = adamw::device::step_bytes(parameters, false);
    let statistics = 4 * num_heads;
    vec![
        entry("embedding", 1, 2 * s * hidden, asked(embedding::device::gather_bytes(DTYPE, tokens, hidden))),
        entry("rms_norm_fwd", of_layers + 1, 2 * s * hidden + 4, asked(rms_norm::device::fwd_bytes(DTYPE, tokens, hidden))),
        product("qkv + bias", hidden, width, 0),
        entry("rotary", num_layers, rotary_least, rotary_bytes),
        entry("attention_fwd", num_layers, s * (width + out_width) + statistics, None),
        product("dense + residual", out_width, hidden, hidden),
        product("gate_up", hidden, 2 * ffn, 0),
        entry("swiglu_fwd", num_layers, s * 3 * ffn, asked(swiglu::device::fwd_bytes(DTYPE, tokens, ffn))),
        product("down + residual", ffn, hidden, hidden),
        entry("output layer", 1, s * (hidden + vocabulary), None),
        entry("cross_entropy", 1, 2 * s * vocabulary + 8, Some((loss.read + loss.written) as f64 / chunk as f64)),
        entry("output layer, backward", 1, s * (hidden + vocabulary), None),
        product("down, backward", hidden, ffn, 0),
        entry("swiglu_bwd", num_layers, s * 5 * ffn, asked(swiglu::device::bwd_bytes(DTYPE, tokens, ffn))),
        product("gate_up, backward", 2 * ffn, hidden, 0),
        entry("rms_norm_bwd", of_layers + 1, 4 * s * hidden + 4, asked(rms_norm::device::bwd_bytes(DTYPE, tokens, hidden))),
        product("dense, backward", hidden, out_width, 0),
        // Three kernels: delta; dq; dk and dv.
        entry("attention_bwd", num_layers, s * (2 * out_width + 2 * (width + out_width) + width) + 5 * statistics, None),
        entry("rotary, inverse", num_layers, rotary_least, rotary_bytes),
        product("qkv, backward", width, hidden, 0),
        entry("adamw", 1, (28.0 * parameters as f64 / t) as usize, asked(adamw)),
    ]
}

/// Bytes a token of all launches together: the least, and what is asked for, where that is known, else the least.
pub fn total(step: &[Traffic]) -> (f64, f64) {
    let sum = |of: fn(&Traffic) -> f64| step.iter().map(|kernel| kernel.times as f64 * of(kernel)).sum();
    (sum(|kernel| kernel.least), sum(|kernel| kernel.asked.unwrap_or(kernel.least)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_asks_for_at_most_15_percent_more_than_the_least() {
        let step = step(&Shape::CHATGLM2_6B, 28);
        let (least, asked) = total(&step);
        assert!(asked >= least && asked <= 1.15 * least, "{asked} of {least}");
        // No kernel can ask for less than its operands.
        for kernel in &step {
            assert!(kernel.asked.is_none_or(|asked| asked >= 0.999 * kernel.least), "{kernel:?}");
        }
    }
}
