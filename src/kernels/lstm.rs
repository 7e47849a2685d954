//! One direction of one LSTM layer over one sequence, from a zero state (Hochreiter and Schmidhuber 1997, with forget gates).
//!
//! gates = x W_ihᵀ + b_ih + h W_hhᵀ + b_hh in blocks i, f, g, o; c = σ(f) c + σ(i) tanh(g); h = σ(o) tanh(c).
//! Shapes: T steps, N input width, E hidden width. The steps wait for each other, so the recurrent products are matrix times vector, split
//! over their outputs; all else is a product over all steps at once.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{self, F32View};
use super::simd::{dot, exp, vectorize};
use super::{elementwise, matmul};

/// Outputs of a recurrent product that a task computes.
const OUTPUTS: usize = 128;

/// From which end the sequence is read. The output of a step stands at the row that was read in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Forward,
    Reverse,
}

impl Order {
    /// Rows in the order in which they are read.
    fn rows(self, t: usize) -> Vec<usize> {
        match self {
            Self::Forward => (0..t).collect(),
            Self::Reverse => (0..t).rev().collect(),
        }
    }
}

/// As torch.nn.LSTM has them.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[4E, N]`
    pub w_ih: Tensor,
    /// `[4E, E]`
    pub w_hh: Tensor,
    /// `[4E]`
    pub b_ih: Tensor,
    /// `[4E]`
    pub b_hh: Tensor,
}

/// The output, and what the backward pass needs.
#[derive(Clone, Debug)]
pub struct Saved {
    /// h, `[T, E]`
    pub output_TE: Tensor,
    /// σ(i), σ(f), tanh(g), σ(o) of each row, `[T, 4E]`.
    gates: Vec<f32>,
    /// c, `[T, E]`
    cells: Vec<f32>,
}

/// Gradients; both biases have the same.
#[derive(Clone, Debug)]
pub struct Grads {
    pub x_TN: Tensor,
    pub w_ih: Tensor,
    pub w_hh: Tensor,
    pub bias: Tensor,
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// (T, E), where the sizes fit.
fn sizes(x_TN: &Tensor, weights: &Weights) -> Result<(usize, usize)> {
    let ((t, n), (rows, e)) = (x_TN.dims2()?, weights.w_hh.dims2()?);
    let fits = rows == 4 * e && weights.w_ih.dims() == [rows, n] && weights.b_ih.dims() == [rows] && weights.b_hh.dims() == [rows];
    if !fits || e == 0 {
        let Weights { w_ih, w_hh, b_ih, b_hh } = weights;
        bail!("lstm: x [{t}, {n}], w_ih {:?}, w_hh {:?}, b_ih {:?}, b_hh {:?}", w_ih.dims(), w_hh.dims(), b_ih.dims(), b_hh.dims());
    }
    Ok((t, e))
}

/// x `[T, N]` -> h `[T, E]` and what was met on the way.
///
/// # Errors
/// When the sizes do not fit.
pub fn fwd(x_TN: &Tensor, weights: &Weights, order: Order) -> Result<Saved> {
    let (t, e) = sizes(x_TN, weights)?;
    let from_input = matmul::nt(x_TN, &weights.w_ih)?;
    elementwise::add_bias_(&from_input, &weights.b_ih)?;
    elementwise::add_bias_(&from_input, &weights.b_hh)?;
    let mut gates = F32View::new(&from_input)?.to_vec();
    let w_hh = F32View::new(&weights.w_hh)?;
    let (mut cells, mut output) = (vec![0f32; t * e], vec![0f32; t * e]);
    let (mut h, mut c) = (vec![0f32; e], vec![0f32; e]);
    for (step, row) in order.rows(t).into_iter().enumerate() {
        let gates = &mut gates[row * 4 * e..][..4 * e];
        if step > 0 {
            gates.par_chunks_mut(OUTPUTS).zip(w_hh.par_chunks(OUTPUTS * e)).for_each(|(gates, w)| {
                vectorize(|| gates.iter_mut().zip(w.chunks_exact(e)).for_each(|(gate, w)| *gate += dot(w, &h)));
            });
        }
        for j in 0..e {
            let (i, f, g, o) = (sigmoid(gates[j]), sigmoid(gates[e + j]), gates[2 * e + j].tanh(), sigmoid(gates[3 * e + j]));
            c[j] = f * c[j] + i * g;
            h[j] = o * c[j].tanh();
            (gates[j], gates[e + j], gates[2 * e + j], gates[3 * e + j]) = (i, f, g, o);
        }
        cells[row * e..][..e].copy_from_slice(&c);
        output[row * e..][..e].copy_from_slice(&h);
    }
    Ok(Saved { output_TE: host::tensor(output, &[t, e])?, gates, cells })
}

/// dh `[T, E]` towards the output -> all gradients.
///
/// # Errors
/// When the sizes do not fit.
pub fn bwd(dh_TE: &Tensor, x_TN: &Tensor, saved: &Saved, weights: &Weights, order: Order) -> Result<Grads> {
    let (t, e) = sizes(x_TN, weights)?;
    if dh_TE.dims() != [t, e] || saved.output_TE.dims() != [t, e] {
        bail!("lstm: gradient {:?} and output {:?}, expected [{t}, {e}]", dh_TE.dims(), saved.output_TE.dims());
    }
    let (dgates, previous) = {
        let (dh_out, w_hh, output) = (F32View::new(dh_TE)?, F32View::new(&weights.w_hh)?, F32View::new(&saved.output_TE)?);
        let (mut dgates, mut previous) = (vec![0f32; t * 4 * e], vec![0f32; t * e]);
        // What the step after this one hands back.
        let (mut dh_next, mut dc_next) = (vec![0f32; e], vec![0f32; e]);
        let rows = order.rows(t);
        for (step, &row) in rows.iter().enumerate().rev() {
            let gates = &saved.gates[row * 4 * e..][..4 * e];
            let dgates = &mut dgates[row * 4 * e..][..4 * e];
            let before = step.checked_sub(1).map(|step| rows[step]);
            for j in 0..e {
                let (i, f, g, o) = (gates[j], gates[e + j], gates[2 * e + j], gates[3 * e + j]);
                let tanh_c = saved.cells[row * e + j].tanh();
                let c_before = before.map_or(0.0, |row| saved.cells[row * e + j]);
                let dh = dh_out[row * e + j] + dh_next[j];
                let dc = dc_next[j] + dh * o * (1.0 - tanh_c * tanh_c);
                dgates[j] = dc * g * i * (1.0 - i);
                dgates[e + j] = dc * c_before * f * (1.0 - f);
                dgates[2 * e + j] = dc * i * (1.0 - g * g);
                dgates[3 * e + j] = dh * tanh_c * o * (1.0 - o);
                dc_next[j] = dc * f;
            }
            let Some(before) = before else { continue };
            previous[row * e..][..e].copy_from_slice(&output[before * e..][..e]);
            // dgates W_hh, row after row of W_hh.
            dh_next.par_chunks_mut(OUTPUTS).enumerate().for_each(|(chunk, dh)| {
                vectorize(|| {
                    dh.fill(0.0);
                    for (d, w) in dgates.iter().zip(w_hh.chunks_exact(e)) {
                        dh.iter_mut().zip(&w[chunk * OUTPUTS..]).for_each(|(dh, w)| *dh += d * w);
                    }
                });
            });
        }
        (host::tensor(dgates, &[t, 4 * e])?, host::tensor(previous, &[t, e])?)
    };
    let bias = host::tensor(vec![0f32; 4 * e], &[4 * e])?;
    elementwise::add_row_sum_(&bias, &dgates)?;
    let (w_ih, w_hh) = (matmul::tn(&dgates, x_TN)?, matmul::tn(&dgates, &previous)?);
    Ok(Grads { x_TN: matmul::nn(&dgates, &weights.w_ih)?, w_ih, w_hh, bias })
}
