//! AdapterFusion's hands in a pass. `adapter_fusion.rs` has the formulas.
//!
//! Scores and sums are linear in the adapters' outputs, so the matrices act once a token, not once an adapter:
//! q · (W_k u_k + b_k) = (W_kᵀ q) · u_k + q · b_k, where the last term is the same for all adapters and leaves the softmax as it is, and
//! Σ p_k W_v u_k = W_v Σ p_k u_k. The bias of the keys changes nothing, and its gradient is 0.
//!
//! Shapes: T tokens, H hidden size, K adapters, r the sum of their widths.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::adapter::AdapterKind;
use super::adapter_fusion::AdapterFusion;
use super::bottleneck::{Gradients, pack, unpack};
use super::{PeftMethod, TrainHooks};
use crate::kernels::host::{F32View, tensor, with_f32_mut};
use crate::kernels::{elementwise, matmul};
use crate::model::hooks::{Hooks, Reach, Sublayer, SublayerGrad};

pub(super) struct FusionHooks<'a> {
    method: &'a AdapterFusion,
    grads: Gradients<'a>,
}

impl<'a> FusionHooks<'a> {
    pub(super) fn new(method: &'a AdapterFusion) -> Result<Self> {
        Ok(Self { method, grads: Gradients::zeros(method.params().layout())? })
    }

    fn param(&self, layer: usize, part: &str) -> Result<Tensor> {
        self.method.params().get(&self.method.parameter(layer, part))
    }

    fn grad(&self, layer: usize, part: &str) -> Result<Tensor> {
        self.grads.get(&self.method.parameter(layer, part))
    }
}

impl Hooks for FusionHooks<'_> {
    fn sublayer(&self, layer: usize, which: Sublayer, x_TH: &Tensor, z_TH: &Tensor) -> Result<Option<Tensor>> {
        if which != Sublayer::Mlp {
            return Ok(None);
        }
        let h_TH = z_TH.copy()?;
        elementwise::add_(&h_TH, x_TH)?;
        let outputs = self.method.adapters().iter().map(|adapter| adapter.bottleneck(layer, which)?.forward(&h_TH));
        let (u_KTH, a_KTr): (Vec<Tensor>, Vec<Tensor>) = outputs.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let q_TH = matmul::nt(&h_TH, &self.param(layer, "query.weight")?)?;
        elementwise::add_bias_(&q_TH, &self.param(layer, "query.bias")?)?;
        let g_TH = matmul::nn(&q_TH, &self.param(layer, "key.weight")?)?;
        let p_TK = softmax_of_scores(&g_TH, &u_KTH)?;
        elementwise::add_(z_TH, &matmul::nt(&weighted_sum(&p_TK, &u_KTH)?, &self.param(layer, "value.weight")?)?)?;
        let kept: Vec<&Tensor> = [&h_TH, &q_TH, &g_TH, &p_TK].into_iter().chain(&u_KTH).chain(&a_KTr).collect();
        pack(&kept).map(Some)
    }

    fn sublayer_grad(&mut self, layer: usize, which: Sublayer, kept: Option<&Tensor>, dy_TH: &Tensor) -> Result<Option<SublayerGrad>> {
        let Some(kept) = kept else { return Ok(None) };
        let (tokens, hidden) = dy_TH.dims2()?;
        let widths = self.method.adapters().iter().map(|adapter| adapter.width()).collect::<Vec<_>>();
        let num_adapters = widths.len();
        let [h_TH, q_TH, g_TH, p_TK, u, a] =
            unpack(kept, [hidden, hidden, hidden, num_adapters, num_adapters * hidden, widths.iter().sum()])?;
        let u_KTH = split(&u, tokens, &vec![hidden; num_adapters])?;

        let dmix_TH = matmul::nn(dy_TH, &self.param(layer, "value.weight")?)?;
        matmul::tn_add_(&self.grad(layer, "value.weight")?, dy_TH, &weighted_sum(&p_TK, &u_KTH)?)?;
        let ds_TK = score_grad(&p_TK, &dmix_TH, &u_KTH)?;
        let dg_TH = weighted_sum(&ds_TK, &u_KTH)?;
        matmul::tn_add_(&self.grad(layer, "key.weight")?, &q_TH, &dg_TH)?;
        let dq_TH = matmul::nt(&dg_TH, &self.param(layer, "key.weight")?)?;
        matmul::tn_add_(&self.grad(layer, "query.weight")?, &dq_TH, &h_TH)?;
        elementwise::add_row_sum_(&self.grad(layer, "query.bias")?, &dq_TH)?;
        if layer == 0 {
            return Ok(None); // nothing below is trained: nobody reads the gradients towards z and x
        }

        let dh_TH = matmul::nn(&dq_TH, &self.param(layer, "query.weight")?)?;
        for (k, (adapter, a_Tr)) in self.method.adapters().iter().zip(split(&a, tokens, &widths)?).enumerate() {
            let du_TH = output_grad(k, (&p_TK, &dmix_TH), (&ds_TK, &g_TH))?;
            let adapter = adapter.bottleneck(layer, which)?;
            elementwise::add_(&dh_TH, &adapter.input_grad(&adapter.inner_grad(&a_Tr, &du_TH)?)?)?;
        }
        let dz_TH = dy_TH.copy()?;
        elementwise::add_(&dz_TH, &dh_TH)?;
        Ok(Some(SublayerGrad { dy_TH: dz_TH, dx_TH: Some(dh_TH) }))
    }

    fn reach(&self, layer: usize) -> Reach {
        AdapterKind::Pfeiffer.reach(layer)
    }
}

impl TrainHooks for FusionHooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        Ok(self.grads.into_flat())
    }
}

/// Matrices `[T, w]` that lie one behind the other.
fn split(packed: &Tensor, tokens: usize, widths: &[usize]) -> Result<Vec<Tensor>> {
    let (flat, mut start) = (packed.flatten_all()?, 0);
    let parts = widths.iter().map(|width| {
        let part = flat.narrow(0, start, tokens * width)?.reshape((tokens, *width));
        start += tokens * width;
        part
    });
    parts.collect()
}

fn views(parts: &[Tensor]) -> Result<Vec<F32View<'_>>> {
    parts.iter().map(F32View::new).collect()
}

/// A `[T, n]` whose row t is made by `row(t, out)`.
fn rows((tokens, n): (usize, usize), row: impl Fn(usize, &mut [f32]) + Sync) -> Result<Tensor> {
    let mut out = vec![0f32; tokens * n];
    out.par_chunks_mut(n).enumerate().for_each(|(t, out)| row(t, out));
    tensor(out, &[tokens, n])
}

/// In f64: a score is a sum over the whole width, unscaled, and an error in it is one in the exponent.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// g `[T, H]`, u K of `[T, H]` -> p `[T, K]`, the softmax of g · u_k.
fn softmax_of_scores(g_TH: &Tensor, u_KTH: &[Tensor]) -> Result<Tensor> {
    let (tokens, hidden) = g_TH.dims2()?;
    let (g, u) = (F32View::new(g_TH)?, views(u_KTH)?);
    let (g, u): (&[f32], Vec<&[f32]>) = (&g, u.iter().map(|u| &**u).collect());
    rows((tokens, u.len()), |t, p| {
        let at = t * hidden..(t + 1) * hidden;
        let scores: Vec<f64> = u.iter().map(|u| dot(&g[at.clone()], &u[at.clone()])).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        p.iter_mut().zip(scores).for_each(|(p, s)| *p = ((s - largest).exp() / sum) as f32);
    })
}

/// p `[T, K]`, u K of `[T, H]` -> Σ p_k u_k `[T, H]`.
fn weighted_sum(p_TK: &Tensor, u_KTH: &[Tensor]) -> Result<Tensor> {
    let (tokens, hidden) = u_KTH[0].dims2()?;
    let (p, u) = (F32View::new(p_TK)?, views(u_KTH)?);
    let (p, u): (&[f32], Vec<&[f32]>) = (&p, u.iter().map(|u| &**u).collect());
    rows((tokens, hidden), |t, out| {
        for (u, p) in u.iter().zip(&p[t * u.len()..]) {
            out.iter_mut().zip(&u[t * hidden..]).for_each(|(out, u)| *out += p * u);
        }
    })
}

/// p `[T, K]`, dmix `[T, H]` towards Σ p_k u_k -> towards the scores `[T, K]`; a token's sum is 0.
fn score_grad(p_TK: &Tensor, dmix_TH: &Tensor, u_KTH: &[Tensor]) -> Result<Tensor> {
    let (tokens, hidden) = dmix_TH.dims2()?;
    let (p, dmix, u) = (F32View::new(p_TK)?, F32View::new(dmix_TH)?, views(u_KTH)?);
    let (p, dmix, u): (&[f32], &[f32], Vec<&[f32]>) = (&p, &dmix, u.iter().map(|u| &**u).collect());
    rows((tokens, u.len()), |t, ds| {
        let at = t * hidden..(t + 1) * hidden;
        let dp: Vec<f64> = u.iter().map(|u| dot(&dmix[at.clone()], &u[at.clone()])).collect();
        let p = &p[t * u.len()..(t + 1) * u.len()];
        let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| f64::from(*p) * dp).sum();
        ds.iter_mut().zip(p).zip(dp).for_each(|((ds, p), dp)| *ds = (f64::from(*p) * (dp - mean)) as f32);
    })
}

/// p_k dmix + ds_k g `[T, H]`: towards the output of adapter k, through the sum and through its score.
fn output_grad(k: usize, (p_TK, dmix_TH): (&Tensor, &Tensor), (ds_TK, g_TH): (&Tensor, &Tensor)) -> Result<Tensor> {
    let ((tokens, hidden), num_adapters) = (g_TH.dims2()?, p_TK.dim(1)?);
    let (p, dmix, ds, g) = (F32View::new(p_TK)?, F32View::new(dmix_TH)?, F32View::new(ds_TK)?, F32View::new(g_TH)?);
    let (p, dmix, ds, g): (&[f32], &[f32], &[f32], &[f32]) = (&p, &dmix, &ds, &g);
    rows((tokens, hidden), |t, out| {
        let (p, ds) = (p[t * num_adapters + k], ds[t * num_adapters + k]);
        let inputs = dmix[t * hidden..].iter().zip(&g[t * hidden..]);
        out.iter_mut().zip(inputs).for_each(|(out, (dmix, g))| *out = p * dmix + ds * g);
    })
}

/// V - I, element by element.
fn off_identity(value: &[f32], n: usize) -> impl Iterator<Item = f32> {
    value.iter().enumerate().map(move |(i, &v)| if i % (n + 1) == 0 { v - 1.0 } else { v })
}

/// V `[H, H]` -> λ Σ (V - I)².
pub(super) fn regularization(value_HH: &Tensor, weight: f64) -> Result<f64> {
    let n = value_HH.dim(0)?;
    Ok(weight * off_identity(&F32View::new(value_HH)?, n).map(|off| f64::from(off).powi(2)).sum::<f64>())
}

/// grad += 2 λ (V - I).
pub(super) fn add_regularization_grad_(grad_HH: &Tensor, value_HH: &Tensor, weight: f64) -> Result<()> {
    let (n, factor, value) = (value_HH.dim(0)?, (2.0 * weight) as f32, F32View::new(value_HH)?);
    with_f32_mut(grad_HH, "regularization", |grad| {
        grad.iter_mut().zip(off_identity(&value, n)).for_each(|(grad, off)| *grad += factor * off);
    })
}
