//! A linear layer. The gradient of its weight is the hooks' business, and computed only where it is trained.

use candle_core::{Result, Tensor, bail};

use crate::kernels::matmul;

/// y = x Wᵀ + b.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Option<Tensor>,
}

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// x `[T, in]` -> `[T, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            Some(bias) => matmul::nt_bias(x, &self.weight, bias),
            None => matmul::nt(x, &self.weight),
        }
    }

    /// As [`Self::forward`], with `residual` `[T, out]` added.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn forward_onto(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        matmul::nt_onto(x, &self.weight, self.bias.as_ref(), residual)
    }

    /// As [`Self::forward`], in f32 whatever the weight's type.
    ///
    /// # Errors
    /// When the sizes do not fit, or there is a bias.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        if self.bias.is_some() {
            bail!("a product in f32 has no bias");
        }
        matmul::nt_f32(x, &self.weight)
    }

    /// x Wᵀ alone.
    ///
    /// # Errors
    /// When the sizes do not fit.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        matmul::nt(x, &self.weight)
    }

    /// `[out, in]`
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[out]`
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    pub(super) fn weight_mut(&mut self) -> &mut Tensor {
        &mut self.weight
    }

    pub(super) fn bias_mut(&mut self) -> Option<&mut Tensor> {
        self.bias.as_mut()
    }

    /// dy `[T, out]` -> dx `[T, in]`.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        matmul::nn(dy, &self.weight)
    }
}
