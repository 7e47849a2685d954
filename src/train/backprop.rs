//! One micro-batch forward and backward.

use candle_core::{Result, Tensor};

use crate::data::MicroBatch;
use crate::kernels::attention::Rows;
use crate::kernels::ids::Ids;
use crate::kernels::{embedding, host};
use crate::model::chatglm2::{Keep, Tokens};
use crate::model::hooks::{Hooks, NoHooks, Stage};
use crate::model::{ChatGlm2, Recompute, loss};
use crate::peft::{Mode, PeftMethod, RowContext};

/// What one micro-batch contributes, on the model's device.
pub struct SlotPass {
    /// Negative log-likelihood of each target, in the order of `MicroBatch::targets`, in parts `[N]` f32.
    pub nll: Vec<Tensor>,
    /// Gradient of their sum at the method's sites, `[site_len]`. Where a loss is not finite it is not either.
    pub site_grad: Tensor,
}

impl SlotPass {
    /// The losses, on the host.
    ///
    /// # Errors
    /// When the device fails.
    pub fn read_nll(&self) -> Result<Vec<f32>> {
        read(&self.nll)
    }
}

/// Loss and site gradient of a micro-batch.
///
/// # Errors
/// When an id or a size does not fit the model.
pub fn forward_backward(model: &ChatGlm2, method: &dyn PeftMethod, batch: &MicroBatch, recompute: Recompute) -> Result<SlotPass> {
    forward_backward_watched(model, method, batch, recompute, &mut |_, _| Ok(()))
}

/// As [`forward_backward`]. Where the site gradient grows in place, `watch` sees it on the way, with the stage up to which its parts
/// ([`PeftMethod::site_stages`]) are final, and may change those; at the end it has seen all.
///
/// # Errors
/// As [`forward_backward`], or that of `watch`.
pub fn forward_backward_watched(
    model: &ChatGlm2,
    method: &dyn PeftMethod,
    batch: &MicroBatch,
    recompute: Recompute,
    watch: &mut dyn FnMut(&Tensor, Stage) -> Result<()>,
) -> Result<SlotPass> {
    let mut hooks = method.hooks(rows(batch, Mode::Train))?;
    let running = hooks.running_site_grad();
    let mut watch = |stage| running.as_ref().map_or(Ok(()), |grad| watch(grad, stage));
    let tokens = tokens(batch);
    let (hidden, tape) = model.forward(tokens, &*hooks, Keep::ForBackward(recompute))?;
    let (nll, dhidden) = loss::nll_and_gradient(model, &hidden, &batch.targets, &mut *hooks)?;
    drop(hidden);
    watch(Stage::Head)?;
    model.backward(dhidden, tape, tokens, &mut *hooks, &mut |layer| watch(Stage::Layer(layer)))?;
    watch(Stage::Embedding)?;
    Ok(SlotPass { nll, site_grad: hooks.into_site_grad()? })
}

/// Sum of the losses of a micro-batch without dropout and without a gradient; of the base alone where there is no method.
///
/// # Errors
/// When an id or a size does not fit the model.
pub fn forward(model: &ChatGlm2, method: Option<&dyn PeftMethod>, batch: &MicroBatch) -> Result<f64> {
    let hooks: Box<dyn Hooks> = match method {
        Some(method) => method.hooks(rows(batch, Mode::Eval))?,
        None => Box::new(NoHooks),
    };
    let (hidden, _) = model.forward(tokens(batch), &*hooks, Keep::Nothing)?;
    Ok(sum(&read(&loss::nll(model, &hidden, &batch.targets)?)?))
}

/// As [`forward`], and the logits behind the tokens `at` of the micro-batch, one list a token.
///
/// # Errors
/// When an id, a place or a size does not fit the model.
pub fn forward_with_logits(model: &ChatGlm2, method: &dyn PeftMethod, batch: &MicroBatch, at: &[u32]) -> Result<(f64, Vec<Vec<f32>>)> {
    let hooks = method.hooks(rows(batch, Mode::Eval))?;
    let (hidden, _) = model.forward(tokens(batch), &*hooks, Keep::Nothing)?;
    let nll_sum = sum(&read(&loss::nll(model, &hidden, &batch.targets)?)?);
    let logits = loss::logits(model, &embedding::gather(&hidden, &Ids::new(at))?)?;
    Ok((nll_sum, logits.to_vec2()?))
}

/// KL(base || tuned) in nats, without dropout, summed over the target positions of a micro-batch; `base` is the model that no method touches.
///
/// # Errors
/// When an id or a size does not fit the models.
pub fn divergence(base: &ChatGlm2, model: &ChatGlm2, method: &dyn PeftMethod, batch: &MicroBatch) -> Result<f64> {
    let (base_hidden, _) = base.forward(tokens(batch), &NoHooks, Keep::Nothing)?;
    let hooks = method.hooks(rows(batch, Mode::Eval))?;
    let (hidden, _) = model.forward(tokens(batch), &*hooks, Keep::Nothing)?;
    Ok(loss::kl((base, &base_hidden), (model, &hidden), &batch.targets)?.iter().sum())
}

fn rows(batch: &MicroBatch, mode: Mode) -> RowContext<'_> {
    RowContext { stream_positions: &batch.stream_positions, row_bounds: &batch.row_bounds, mode }
}

fn tokens(batch: &MicroBatch) -> Tokens<'_> {
    Tokens { ids: &batch.ids, positions: &batch.positions, rows: Rows { bounds: &batch.row_bounds, keep: None, tables: None } }
}

fn read(losses: &[Tensor]) -> Result<Vec<f32>> {
    Ok(host::read(&losses.iter().collect::<Vec<_>>())?.concat())
}

/// The sum of losses, in their order.
pub(super) fn sum(losses: &[f32]) -> f64 {
    losses.iter().map(|&l| f64::from(l)).sum()
}
