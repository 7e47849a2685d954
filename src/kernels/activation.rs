//! Activations by element: silu(x) = x / (1 + e^-x) (Hendrycks and Gimpel 2016, arXiv:1606.08415; also called swish), relu(x) = max(x, 0).

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{self, F32View};
use super::simd::{exp, vectorize};

/// Elements a task works on.
const CHUNK: usize = 1 << 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    Relu,
}

/// x -> act(x), any shape.
///
/// # Errors
/// When the tensor is not on a supported device.
pub fn fwd(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => each(x, x, |x, _| x / (1.0 + exp(-x))),
        Activation::Relu => each(x, x, |x, _| if x > 0.0 { x } else { 0.0 }),
    }
}

/// x, dy -> dy act'(x); of the ReLU at 0 it is 0, as in PyTorch.
///
/// # Errors
/// When the shapes differ.
pub fn bwd(activation: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => each(x, dy, |x, dy| {
            let s = 1.0 / (1.0 + exp(-x));
            dy * s * (1.0 + x * (1.0 - s))
        }),
        Activation::Relu => each(x, dy, |x, dy| if x > 0.0 { dy } else { 0.0 }),
    }
}

fn each(a: &Tensor, b: &Tensor, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<Tensor> {
    if a.dims() != b.dims() {
        bail!("activation: shapes {:?} and {:?} differ", a.dims(), b.dims());
    }
    let mut out = vec![0f32; a.elem_count()];
    {
        let (a, b) = (F32View::new(a)?, F32View::new(b)?);
        let chunks = out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK));
        chunks.for_each(|((out, a), b)| vectorize(|| out.iter_mut().zip(a).zip(b).for_each(|((out, &a), &b)| *out = f(a, b))));
    }
    host::tensor(out, a.dims())
}
