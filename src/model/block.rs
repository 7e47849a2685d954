//! One transformer block, forward and backward.
//!
//! x1 = x + attention(norm(x)); y = x1 + mlp(norm(x1)). What the backward pass needs is in [`Saved`]; no linear layer's input has to be kept for a
//! weight gradient: it is cheap to compute again.

use candle_core::{Result, Tensor};

use super::hooks::{BaseWeight, Hooks, InputGradient, LinearBackward, LinearSite, PrefixKv, Reach, Sublayer};
use super::linear::Linear;
use crate::kernels::attention::{self, Grads, Heads, Prefix, Rows, Wanted};
use crate::kernels::rotary::{self, Direction, Table};
use crate::kernels::{elementwise, rms_norm, swiglu};

/// What every block of one pass shares.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub rows: Rows<'a>,
    pub rotary: &'a Table,
}

/// The weights of one block.
#[derive(Clone, Debug)]
pub struct Block {
    pub layer: usize,
    pub heads: Heads,
    pub norm_eps: f64,
    pub input_layernorm_H: Tensor,
    pub query_key_value: Linear,
    pub dense: Linear,
    pub post_attention_layernorm_H: Tensor,
    pub dense_h_to_4h: Linear,
    pub dense_4h_to_h: Linear,
}

/// What the backward pass of a block needs: H + (N + 2G) D + N D + H + 2F values a token, N + 2 statistics, and what the hooks keep.
#[derive(Debug)]
pub struct Saved {
    x_TH: Tensor,
    rstd1_T: Tensor,
    /// q and k rotated, v: also what a key-value cache keeps.
    pub qkv_TN: Tensor,
    attn_TN: Tensor,
    lse_TN: Tensor,
    x1_TH: Tensor,
    rstd2_T: Tensor,
    gate_up_T2F: Tensor,
    hooks: KeptByHooks,
}

/// What the hooks asked to keep.
#[derive(Debug, Default)]
struct KeptByHooks {
    /// In the order of [`LinearSite::ALL`].
    linear: [Option<Tensor>; 4],
    attention: Option<Tensor>,
    mlp: Option<Tensor>,
}

impl KeptByHooks {
    fn of(&mut self, which: Sublayer) -> &mut Option<Tensor> {
        match which {
            Sublayer::Attention => &mut self.attention,
            Sublayer::Mlp => &mut self.mlp,
        }
    }
}

/// Intermediate results by name, for those who look inside (parity tests).
pub trait Observer {
    /// `name` is `attn_out`, `mlp_out` or `out`; `value` is `[T, H]` and may be changed in place afterwards: copy it.
    fn observe(&mut self, layer: usize, name: &'static str, value: &Tensor) -> Result<()>;

    /// Whether it wants to see anything: if not, nothing has to be computed for it alone.
    fn looks(&self) -> bool {
        true
    }
}

/// Looks at nothing.
pub struct NoObserver;

impl Observer for NoObserver {
    fn observe(&mut self, _: usize, _: &'static str, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn looks(&self) -> bool {
        false
    }
}

impl Block {
    /// x `[T, H]` -> (y `[T, H]`, what the backward pass needs).
    ///
    /// # Source
    /// THUDM modeling_chatglm.py, GLMBlock.forward and SelfAttention.forward.
    pub fn forward(&self, x_TH: &Tensor, pass: Pass, hooks: &dyn Hooks, observer: &mut dyn Observer) -> Result<(Tensor, Saved)> {
        let mut kept = KeptByHooks::default();
        let (h_TH, rstd1_T) = rms_norm::fwd(x_TH, &self.input_layernorm_H, self.norm_eps)?;
        let qkv_TN = self.linear(LinearSite::QueryKeyValue, &h_TH, hooks, &mut kept)?;
        rotary::rotate_(&qkv_TN, pass.rotary, self.rotated_heads(), self.heads.head_dim, Direction::Forward)?;
        let prefix = hooks.prefix_kv(self.layer)?;
        let (attn_TN, lse_TN) = attention::fwd(&qkv_TN, prefix.as_ref().map(as_prefix), pass.rows, self.heads)?;
        let x1_TH = self.sublayer_end(Sublayer::Attention, &attn_TN, x_TH, hooks, &mut kept, observer)?;
        let (h_TH, rstd2_T) = rms_norm::fwd(&x1_TH, &self.post_attention_layernorm_H, self.norm_eps)?;
        let gate_up_T2F = self.linear(LinearSite::DenseHTo4h, &h_TH, hooks, &mut kept)?;
        let y_TH = self.sublayer_end(Sublayer::Mlp, &swiglu::fwd(&gate_up_T2F)?, &x1_TH, hooks, &mut kept, observer)?;
        observer.observe(self.layer, "out", &y_TH)?;
        Ok((y_TH, Saved { x_TH: x_TH.clone(), rstd1_T, qkv_TN, attn_TN, lse_TN, x1_TH, rstd2_T, gate_up_T2F, hooks: kept }))
    }

    /// dy `[T, H]` -> dx `[T, H]`, unless the hooks need nothing that far down. The memory of `dy` is used for the result of the first half.
    pub fn backward(&self, dy_TH: Tensor, saved: Saved, pass: Pass, hooks: &mut dyn Hooks) -> Result<Option<Tensor>> {
        let (layer, reach) = (self.layer, hooks.reach(self.layer));
        let beyond = |level| if reach > level { InputGradient::Wanted } else { InputGradient::Unwanted };
        let Saved { x_TH, rstd1_T, qkv_TN, attn_TN, lse_TN, x1_TH, rstd2_T, gate_up_T2F, hooks: kept } = saved;

        let through = hooks.sublayer_grad(layer, Sublayer::Mlp, kept.mlp.as_ref(), &dy_TH)?;
        let (dz_TH, dx1_extra) = through.map_or_else(|| (dy_TH.clone(), None), |grad| (grad.dy_TH, grad.dx_TH));
        let x = || swiglu::fwd(&gate_up_T2F);
        let dact_TF = self.linear_backward(LinearSite::Dense4hToH, &dz_TH, &x, &kept, beyond(Reach::MlpOutput), hooks)?;
        let Some(dact_TF) = dact_TF else { return Ok(None) };
        let dgate_up_T2F = swiglu::bwd(gate_up_T2F, &dact_TF)?;
        let x = || Ok(rms_norm::fwd(&x1_TH, &self.post_attention_layernorm_H, self.norm_eps)?.0);
        let dw_H = hooks.weight_grad(BaseWeight::PostAttentionLayernorm(layer))?;
        let input = if dw_H.is_some() { InputGradient::Wanted } else { beyond(Reach::Mlp) };
        let dh_TH = self.linear_backward(LinearSite::DenseHTo4h, &dgate_up_T2F, &x, &kept, input, hooks)?;
        let Some(dh_TH) = dh_TH else { return Ok(None) };
        if let Some(dw_H) = dw_H {
            rms_norm::bwd_weight_add_(&dw_H, &dh_TH, &x1_TH, &rstd2_T)?;
        }
        if reach <= Reach::Mlp {
            return Ok(None);
        }
        drop(dz_TH);
        let dx1_TH = dy_TH;
        if let Some(extra) = dx1_extra {
            elementwise::add_(&dx1_TH, &extra)?;
        }
        rms_norm::bwd_add_(&dx1_TH, &dh_TH, &x1_TH, &rstd2_T, &self.post_attention_layernorm_H)?;

        let through = hooks.sublayer_grad(layer, Sublayer::Attention, kept.attention.as_ref(), &dx1_TH)?;
        let (dz_TH, dx_extra) = through.map_or_else(|| (dx1_TH.clone(), None), |grad| (grad.dy_TH, grad.dx_TH));
        let x = || Ok(attn_TN.clone());
        let dattn_TN = self.linear_backward(LinearSite::Dense, &dz_TH, &x, &kept, beyond(Reach::AttentionOutput), hooks)?;
        let Some(dattn_TN) = dattn_TN else { return Ok(None) };
        let prefix = hooks.prefix_kv(layer)?;
        let wanted = if reach >= Reach::QueryKeyValue { Wanted::All } else { Wanted::PrefixOnly };
        let grads = attention::bwd(&dattn_TN, &qkv_TN, prefix.as_ref().map(as_prefix), &attn_TN, &lse_TN, pass.rows, self.heads, wanted)?;
        let Grads { dqkv, dprefix } = grads;
        if let Some((k_RGPD, v_RGPD)) = dprefix {
            hooks.prefix_kv_grad(layer, PrefixKv { k_RGPD, v_RGPD })?;
        }
        let Some(dqkv_TN) = dqkv else { return Ok(None) };
        rotary::rotate_(&dqkv_TN, pass.rotary, self.rotated_heads(), self.heads.head_dim, Direction::Inverse)?;
        let x = || Ok(rms_norm::fwd(&x_TH, &self.input_layernorm_H, self.norm_eps)?.0);
        let dh_TH = self.linear_backward(LinearSite::QueryKeyValue, &dqkv_TN, &x, &kept, beyond(Reach::QueryKeyValue), hooks)?;
        let Some(dh_TH) = dh_TH else { return Ok(None) };
        if let Some(dw_H) = hooks.weight_grad(BaseWeight::InputLayernorm(layer))? {
            rms_norm::bwd_weight_add_(&dw_H, &dh_TH, &x_TH, &rstd1_T)?;
        }
        let dx_TH = dx1_TH;
        if let Some(extra) = dx_extra {
            elementwise::add_(&dx_TH, &extra)?;
        }
        rms_norm::bwd_add_(&dx_TH, &dh_TH, &x_TH, &rstd1_T, &self.input_layernorm_H)?;
        Ok(Some(dx_TH))
    }

    pub(super) fn weights_of(&self, site: LinearSite) -> &Linear {
        match site {
            LinearSite::QueryKeyValue => &self.query_key_value,
            LinearSite::Dense => &self.dense,
            LinearSite::DenseHTo4h => &self.dense_h_to_4h,
            LinearSite::Dense4hToH => &self.dense_4h_to_h,
        }
    }

    /// The last linear layer of a sublayer, z `[T, in]`, and what it adds to the residual stream x `[T, H]` -> `[T, H]`.
    fn sublayer_end(
        &self,
        which: Sublayer,
        z: &Tensor,
        x_TH: &Tensor,
        hooks: &dyn Hooks,
        kept: &mut KeptByHooks,
        observer: &mut dyn Observer,
    ) -> Result<Tensor> {
        let (site, name) = match which {
            Sublayer::Attention => (LinearSite::Dense, "attn_out"),
            Sublayer::Mlp => (LinearSite::Dense4hToH, "mlp_out"),
        };
        if !hooks.changes_sublayers() && !observer.looks() {
            let (y_TH, keep) = hooks.linear_onto(self.layer, site, self.weights_of(site), z, x_TH)?;
            kept.linear[site as usize] = keep;
            return Ok(y_TH);
        }
        let y_TH = self.linear(site, z, hooks, kept)?;
        observer.observe(self.layer, name, &y_TH)?;
        *kept.of(which) = hooks.sublayer(self.layer, which, x_TH, &y_TH)?;
        elementwise::add_(&y_TH, x_TH)?;
        Ok(y_TH)
    }

    /// x `[T, in]` -> y `[T, out]`, as the hooks want it.
    fn linear(&self, site: LinearSite, x: &Tensor, hooks: &dyn Hooks, kept: &mut KeptByHooks) -> Result<Tensor> {
        let (y, keep) = hooks.linear(self.layer, site, self.weights_of(site), x)?;
        kept.linear[site as usize] = keep;
        Ok(y)
    }

    /// dy `[T, out]` -> dx `[T, in]`, if it is wanted; `x` computes the layer's input again where the hooks need it.
    fn linear_backward(
        &self,
        site: LinearSite,
        dy: &Tensor,
        x: &dyn Fn() -> Result<Tensor>,
        kept: &KeptByHooks,
        input: InputGradient,
        hooks: &mut dyn Hooks,
    ) -> Result<Option<Tensor>> {
        let kept = kept.linear[site as usize].as_ref();
        hooks.linear_grad(LinearBackward { layer: self.layer, site, base: self.weights_of(site), x, dy, kept, input })
    }

    pub(super) fn weights_of_mut(&mut self, site: LinearSite) -> &mut Linear {
        match site {
            LinearSite::QueryKeyValue => &mut self.query_key_value,
            LinearSite::Dense => &mut self.dense,
            LinearSite::DenseHTo4h => &mut self.dense_h_to_4h,
            LinearSite::Dense4hToH => &mut self.dense_4h_to_h,
        }
    }

    /// Query heads and key groups turn, values do not.
    fn rotated_heads(&self) -> usize {
        self.heads.num_heads + self.heads.num_groups
    }
}

fn as_prefix(prefix: &PrefixKv) -> Prefix<'_> {
    Prefix { k_RGPD: &prefix.k_RGPD, v_RGPD: &prefix.v_RGPD }
}
