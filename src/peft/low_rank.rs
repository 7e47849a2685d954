//! LoRA's and DoRA's hands in a pass. `lora.rs` has the formulas.
//!
//! Shapes: r rank, T tokens; A `[r, in]`, B `[out, r]`.
#![allow(non_snake_case, reason = "A, B and their gradients are the paper's names")]

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::lora::{Lora, name_of_A, name_of_B, name_of_magnitude};
use super::{RowContext, TrainHooks};
use crate::kernels::host::{F32View, tensor};
use crate::kernels::{elementwise, matmul};
use crate::model::hooks::{Hooks, LinearBackward, LinearSite, Reach};
use crate::model::linear::Linear;
use crate::rng::{KeyedRng, Stream, unit};

pub(super) struct LoraHooks<'a> {
    method: &'a Lora,
    /// Rows whose inputs are dropped from; none where nothing is dropped.
    rows: Option<RowContext<'a>>,
    grad: Vec<f32>,
}

impl<'a> LoraHooks<'a> {
    pub(super) fn new(method: &'a Lora, rows: Option<RowContext<'a>>, num_elements: usize) -> Self {
        Self { method, rows, grad: vec![0.0; num_elements] }
    }

    /// 0 or 1 / (1 - p) for each element of an input `[T, in]`: the same whatever the row is packed with, and in a second forward pass.
    fn multiplier(&self, layer: usize, site: LinearSite, width: usize) -> Result<Option<Tensor>> {
        let Some(rows) = self.rows else { return Ok(None) };
        let p = self.method.dropout();
        let kept = 1.0 / (1.0 - p);
        let blocks = width.div_ceil(4);
        let mut out = Vec::new();
        for (bounds, &position) in rows.row_bounds.windows(2).zip(rows.stream_positions) {
            let rng = KeyedRng::new(self.method.seed(), Stream::LowRankDropout, (position << 12) + (layer * 4 + site as usize) as u64);
            out.par_extend((0..(bounds[1] - bounds[0]) * width).into_par_iter().map(|i| {
                let (token, channel) = (i / width, i % width);
                let bits = rng.block((token * blocks + channel / 4) as u32)[channel % 4];
                if unit(bits) < p { 0.0 } else { kept }
            }));
        }
        let tokens = out.len() / width;
        Ok(Some(tensor(out, &[tokens, width])?))
    }

    /// A and B.
    fn pair(&self, layer: usize, site: LinearSite) -> Result<(Tensor, Tensor)> {
        let params = self.method.parameters();
        Ok((params.get(&name_of_A(layer, site))?, params.get(&name_of_B(layer, site))?))
    }

    /// Adds to the gradient of a parameter; `value(i)` is its element i.
    fn add(&mut self, name: &str, value: impl Fn(usize) -> f32) {
        if let Some(entry) = self.method.parameters().layout().get(name) {
            let part = &mut self.grad[entry.offset..entry.offset + entry.num_elements()];
            part.iter_mut().enumerate().for_each(|(i, g)| *g += value(i));
        }
    }

    /// y += s x Aᵀ Bᵀ.
    fn add_update(&self, layer: usize, site: LinearSite, x: &Tensor, y: &Tensor) -> Result<()> {
        let (A, B) = self.pair(layer, site)?;
        let u_Tr = match self.multiplier(layer, site, x.dim(1)?)? {
            Some(multiplier) => matmul::nt(&(x * multiplier)?, &A)?,
            None => matmul::nt(x, &A)?,
        };
        elementwise::scale_(&u_Tr, self.method.factor())?;
        elementwise::add_(y, &matmul::nt(&u_Tr, &B)?)
    }

    /// Takes the gradients of A and B from that of x Wᵀ + s x Aᵀ Bᵀ, and gives the update's part of dx where dx is wanted.
    fn update_grad(&mut self, of: &LinearBackward, dz: &Tensor, wanted: bool) -> Result<Option<Tensor>> {
        let (layer, site) = (of.layer, of.site);
        let (A, B) = self.pair(layer, site)?;
        let x = (of.x)()?;
        let multiplier = self.multiplier(layer, site, x.dim(1)?)?;
        let x = multiplier.as_ref().map_or_else(|| Ok(x.clone()), |m| &x * m)?;
        let u_Tr = matmul::nt(&x, &A)?;
        elementwise::scale_(&u_Tr, self.method.factor())?;
        let dB_transposed = matmul::tn(&u_Tr, dz)?;
        let du_Tr = matmul::nn(dz, &B)?;
        elementwise::scale_(&du_Tr, self.method.factor())?;
        let dA = matmul::tn(&du_Tr, &x)?;
        {
            let (rank, out) = dB_transposed.dims2()?;
            let (dA, dB) = (F32View::new(&dA)?, F32View::new(&dB_transposed)?);
            self.add(&name_of_A(layer, site), |i| dA[i]);
            self.add(&name_of_B(layer, site), |i| dB[i % rank * out + i / rank]);
        }
        if !wanted {
            return Ok(None);
        }
        let dx = matmul::nn(&du_Tr, &A)?;
        multiplier.map_or_else(|| Ok(dx.clone()), |m| &dx * m).map(Some)
    }

    /// dm += sum over tokens of dy z / norm; gives dz = dy gain.
    fn magnitude_grad(&mut self, of: &LinearBackward, z: &Tensor) -> Result<Tensor> {
        let (norms, gains) = self.method.norms_and_gains(of.layer, of.site)?;
        let dm = elementwise::column_dots(of.dy, z)?;
        self.add(&name_of_magnitude(of.layer, of.site), |i| dm[i] / norms[i]);
        elementwise::scale_columns(of.dy, &gains)
    }
}

impl Hooks for LoraHooks<'_> {
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
        let part = self.update_grad(&of, &dz, dx.is_some())?;
        if let (Some(dx), Some(part)) = (&dx, &part) {
            elementwise::add_(dx, part)?;
        }
        Ok(dx)
    }

    fn reach(&self, layer: usize) -> Reach {
        self.method.reach(layer)
    }
}

impl TrainHooks for LoraHooks<'_> {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        let len = self.grad.len();
        tensor(self.grad, &[len])
    }
}
