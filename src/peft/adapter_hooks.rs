//! The adapters' hands in a pass. `adapter.rs` has the formulas.
//!
//! Shapes: T tokens, H hidden size, r the adapters' width.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use candle_core::{Result, Tensor};

use super::adapter::{Adapter, AdapterKind};
use super::bottleneck::{self, Gradients, pack, unpack};
use super::{PeftMethod, TrainHooks};
use crate::kernels::elementwise;
use crate::model::hooks::{Hooks, Reach, Sublayer, SublayerGrad};

pub(super) struct AdapterHooks<'a> {
    method: &'a Adapter,
    grads: Gradients<'a>,
}

impl<'a> AdapterHooks<'a> {
    pub(super) fn new(method: &'a Adapter) -> Result<Self> {
        Ok(Self { method, grads: Gradients::zeros(method.params().layout())? })
    }
}

impl Hooks for AdapterHooks<'_> {
    fn sublayer(&self, layer: usize, which: Sublayer, x_TH: &Tensor, y_TH: &Tensor) -> Result<Option<Tensor>> {
        let kind = self.method.settings().kind;
        if !kind.sublayers().contains(&which) {
            return Ok(None);
        }
        let h_TH = y_TH.copy()?;
        if kind == AdapterKind::Pfeiffer {
            elementwise::add_(&h_TH, x_TH)?;
        }
        let (u_TH, a_Tr) = self.method.bottleneck(layer, which)?.forward(&h_TH)?;
        elementwise::add_(y_TH, &u_TH)?;
        pack(&[&h_TH, &a_Tr]).map(Some)
    }

    fn sublayer_grad(&mut self, layer: usize, which: Sublayer, kept: Option<&Tensor>, dy_TH: &Tensor) -> Result<Option<SublayerGrad>> {
        let Some(kept) = kept else { return Ok(None) };
        let settings = self.method.settings();
        let [h_TH, a_Tr] = &unpack(kept, [dy_TH.dim(1)?, self.method.width()])?;
        let adapter = self.method.bottleneck(layer, which)?;
        let da_Tr = adapter.inner_grad(a_Tr, dy_TH)?;
        let prefix = format!("{}.adapters.{}", bottleneck::site(layer, which), settings.adapter_name);
        adapter.add_param_grads(&self.grads, &prefix, (h_TH, a_Tr), (&da_Tr, dy_TH))?;
        if layer == 0 && settings.kind.sublayers().first() == Some(&which) {
            return Ok(None); // nothing below is trained: nobody reads the gradients towards y and x
        }
        let dh_TH = adapter.input_grad(&da_Tr)?;
        let own_TH = dy_TH.copy()?;
        elementwise::add_(&own_TH, &dh_TH)?;
        Ok(Some(SublayerGrad { dy_TH: own_TH, dx_TH: (settings.kind == AdapterKind::Pfeiffer).then_some(dh_TH) }))
    }

    fn reach(&self, layer: usize) -> Reach {
        self.method.settings().kind.reach(layer)
    }
}

impl TrainHooks for AdapterHooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        Ok(self.grads.into_flat())
    }
}
