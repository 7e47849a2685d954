//! Head and loss: logits exist only at target positions, a chunk at a time, and turn into their own gradient.

use candle_core::{Result, Tensor, bail};

use super::chatglm2::ChatGlm2;
use super::hooks::{BaseWeight, Hooks};
use crate::kernels::cross_entropy::{self, Logits};
use crate::kernels::host::on_host;
use crate::kernels::ids::Ids;
use crate::kernels::{elementwise, embedding, kl, matmul, rms_norm};

/// Positions whose logits are held at once: 133 MB in f32 at ChatGLM2's vocabulary. A weight of the head is packed once a chunk, so smaller
/// chunks cost time.
pub const LOGITS_CHUNK: usize = 512;

/// Logits of hidden states `[N, H]` (before the final norm) -> `[N, V]` in f32: rounded to bfloat16 they would lose more of the loss than all layers.
///
/// # Errors
/// When the sizes do not fit.
pub fn logits(model: &ChatGlm2, hidden_NH: &Tensor) -> Result<Tensor> {
    model.output_layer().forward_f32(&model.final_norm(hidden_NH)?.0)
}

/// Negative log-likelihoods of `targets` = (index of the predicting token, id), without a gradient, in their order: one tensor `[N]` f32 for each
/// [`LOGITS_CHUNK`] of them.
///
/// # Errors
/// When a target's index or id is out of range.
pub fn nll(model: &ChatGlm2, hidden_TH: &Tensor, targets: &[(u32, u32)]) -> Result<Vec<Tensor>> {
    let mut losses = Vec::with_capacity(targets.len().div_ceil(LOGITS_CHUNK));
    for chunk in targets.chunks(LOGITS_CHUNK) {
        let (index, ids) = split(chunk);
        losses.push(cross_entropy::nll_(&logits(model, &embedding::gather(hidden_TH, &index)?)?, &ids, Logits::Discard)?);
    }
    Ok(losses)
}

/// As [`nll`], and the gradient of their sum towards the hidden states, `[T, H]`; the hooks receive that of the head and the final norm, where they
/// train them.
///
/// # Errors
/// As [`nll`].
pub fn nll_and_gradient(
    model: &ChatGlm2,
    hidden_TH: &Tensor,
    targets: &[(u32, u32)],
    hooks: &mut dyn Hooks,
) -> Result<(Vec<Tensor>, Tensor)> {
    if targets.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
        bail!("targets do not ascend: a token would predict twice");
    }
    let mut losses = Vec::with_capacity(targets.len().div_ceil(LOGITS_CHUNK));
    let dx_TH = hidden_TH.zeros_like()?;
    for chunk in targets.chunks(LOGITS_CHUNK) {
        let (index, ids) = split(chunk);
        let x_NH = embedding::gather(hidden_TH, &index)?;
        let (h_NH, rstd) = model.final_norm(&x_NH)?;
        let logits_NV = model.output_layer().forward_f32(&h_NH)?;
        losses.push(cross_entropy::nll_(&logits_NV, &ids, Logits::ToGradient)?);
        let logits_NV = elementwise::cast(&logits_NV, hidden_TH.dtype())?;
        if let Some(dw_VH) = hooks.weight_grad(BaseWeight::OutputLayer)? {
            matmul::tn_add_(&dw_VH, &logits_NV, &h_NH)?;
        }
        let dh_NH = model.output_layer().backward(&logits_NV)?;
        if let (Some(rstd), Some(dw_H)) = (&rstd, hooks.weight_grad(BaseWeight::FinalLayernorm)?) {
            rms_norm::bwd_weight_add_(&dw_H, &dh_NH, &x_NH, rstd)?;
        }
        embedding::put_rows_(&dx_TH, &index, &model.final_norm_backward(dh_NH, &x_NH, rstd.as_ref())?)?;
    }
    Ok((losses, dx_TH))
}

/// KL(p || q) in nats at each of `targets` = (index of the predicting token, id): p what `base` predicts from its hidden states, q what
/// `tuned` predicts from its own, both `[T, H]`. It is a figure of reports: the host computes it.
///
/// # Errors
/// When a target's index is out of range or the vocabularies differ.
pub fn kl(base: (&ChatGlm2, &Tensor), tuned: (&ChatGlm2, &Tensor), targets: &[(u32, u32)]) -> Result<Vec<f64>> {
    let mut divergences = Vec::with_capacity(targets.len());
    for chunk in targets.chunks(LOGITS_CHUNK) {
        let (index, _) = split(chunk);
        let logits_NV = |(model, hidden_TH): (&ChatGlm2, &Tensor)| logits(model, &embedding::gather(hidden_TH, &index)?);
        divergences.extend(kl::rows(&on_host(&logits_NV(base)?)?, &on_host(&logits_NV(tuned)?)?)?);
    }
    Ok(divergences)
}

/// The predicting tokens, and the ids that they are to predict.
fn split(targets: &[(u32, u32)]) -> (Ids, Vec<u32>) {
    let (index, ids): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
    (Ids::new(index), ids)
}
