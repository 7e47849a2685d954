//! How LoRA and DoRA take part in a pass. `lora.rs` has the formulas.
//!
//! Shapes: r rank, T tokens; A `[r, in]`, B `[out, r]`.
#![allow(non_snake_case, reason = "A, B and their gradients are the paper's names")]

use candle_core::{Result, Tensor};

use super::lora::{Lora, name_of_A, name_of_B, name_of_magnitude};
use super::{RowContext, TrainHooks};
use crate::kernels::dropout::{self, Mask};
use crate::kernels::host::with_f32_mut;
use crate::kernels::{elementwise, matmul};
use crate::model::hooks::{Hooks, LinearBackward, LinearSite, Reach};
use crate::model::linear::Linear;
use crate::rng::Stream;

pub(super) struct LoraHooks<'a> {
    method: &'a Lora,
    /// Rows whose inputs are dropped from; `None` if nothing is dropped.
    rows: Option<dropout::Rows<'a>>,
    /// Of all parameters, f32.
    grad: Tensor,
}

impl<'a> LoraHooks<'a> {
    pub(super) fn new(method: &'a Lora, rows: Option<RowContext<'a>>) -> Result<Self> {
        let flat = method.parameters().flat();
        let rows = rows.map(|rows| dropout::Rows::new(rows.row_bounds, rows.stream_positions, flat.device())).transpose()?;
        Ok(Self { method, rows, grad: flat.zeros_like()? })
    }

    /// What is dropped of the inputs of a layer: the same whatever a row is packed with, and in a second forward pass.
    fn mask(&self, layer: usize, site: LinearSite, width: usize) -> Option<Mask> {
        let place = (layer * 4 + site as usize) as u32;
        let key = dropout::Key { seed: self.method.seed(), stream: Stream::LowRankDropout, place, p: self.method.dropout() };
        self.rows.as_ref().map(|rows| Mask::new(key, rows, width))
    }

    /// Where the gradient of a parameter is added up, in its shape.
    fn grad_of(&self, name: &str) -> Result<Tensor> {
        self.method.parameters().layout().view(&self.grad, name)
    }

    /// y += s x Aᵀ Bᵀ.
    fn add_update(&self, layer: usize, site: LinearSite, x: &Tensor, y: &Tensor) -> Result<()> {
        let (A, B) = self.method.pair(layer, site)?;
        let u_Tr = match self.mask(layer, site, x.dim(1)?) {
            Some(mask) => matmul::nt(&mask.apply(x)?, &A)?,
            None => matmul::nt(x, &A)?,
        };
        elementwise::scale_(&u_Tr, self.method.factor())?;
        matmul::nt_add_(y, &u_Tr, &B)
    }

    /// Takes the gradients of A and B from that of x Wᵀ + s x Aᵀ Bᵀ, and adds the update's part to dx, where that is wanted.
    fn update_grad(&mut self, of: &LinearBackward, dz: &Tensor, dx: Option<&Tensor>) -> Result<()> {
        let (layer, site) = (of.layer, of.site);
        let (A, B) = self.method.pair(layer, site)?;
        let x = (of.x)()?;
        let mask = self.mask(layer, site, x.dim(1)?);
        let x = mask.as_ref().map_or_else(|| Ok(x.clone()), |mask| mask.apply(&x))?;
        let u_Tr = matmul::nt(&x, &A)?;
        elementwise::scale_(&u_Tr, self.method.factor())?;
        matmul::tn_add_(&self.grad_of(&name_of_B(layer, site))?, dz, &u_Tr)?;
        let du_Tr = matmul::nn(dz, &B)?;
        elementwise::scale_(&du_Tr, self.method.factor())?;
        matmul::tn_add_(&self.grad_of(&name_of_A(layer, site))?, &du_Tr, &x)?;
        match (dx, mask) {
            (None, _) => Ok(()),
            (Some(dx), None) => matmul::nn_add_(dx, &du_Tr, &A),
            (Some(dx), Some(mask)) => elementwise::add_(dx, &mask.apply(&matmul::nn(&du_Tr, &A)?)?),
        }
    }

    /// dm += sum over tokens of dy z / norm; gives dz = dy gain.
    fn magnitude_grad(&mut self, of: &LinearBackward, z: &Tensor) -> Result<Tensor> {
        let (norms, gains) = self.method.norms_and_gains(of.layer, of.site)?;
        let dm = elementwise::column_dots(of.dy, z)?;
        let sum = self.grad_of(&name_of_magnitude(of.layer, of.site))?;
        with_f32_mut(&sum, "dora", |sum| sum.iter_mut().zip(&dm).zip(norms).for_each(|((sum, dm), norm)| *sum += dm / norm))?;
        elementwise::scale_columns(of.dy, &gains)
    }
}

impl Hooks for LoraHooks<'_> {
    fn changes_sublayers(&self) -> bool {
        false
    }

    fn changes_linear(&self, layer: usize, site: LinearSite) -> bool {
        self.method.is_target(layer, site)
    }

    fn linear(&self, layer: usize, site: LinearSite, base: &Linear, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        if !self.method.is_target(layer, site) {
            return Ok((base.forward(x)?, None));
        }
        if !self.method.has_magnitudes() {
            let y = base.forward(x)?;
            self.add_update(layer, site, x, &y)?;
            return Ok((y, None));
        }
        let z = base.product(x)?;
        self.add_update(layer, site, x, &z)?;
        let y = elementwise::scale_columns(&z, &self.method.norms_and_gains(layer, site)?.1)?;
        if let Some(bias) = base.bias() {
            elementwise::add_bias_(&y, bias)?;
        }
        Ok((y, Some(z)))
    }

    fn linear_grad(&mut self, of: LinearBackward) -> Result<Option<Tensor>> {
        if !self.method.is_target(of.layer, of.site) {
            return of.base_input_grad();
        }
        let dz = match of.kept {
            Some(z) => self.magnitude_grad(&of, z)?,
            None => of.dy.clone(),
        };
        let dx = LinearBackward { dy: &dz, ..of }.base_input_grad()?;
        self.update_grad(&of, &dz, dx.as_ref())?;
        Ok(dx)
    }

    fn reach(&self, layer: usize) -> Reach {
        self.method.reach(layer)
    }
}

impl TrainHooks for LoraHooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        Ok(self.grad)
    }
}
