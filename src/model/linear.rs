//! A linear layer. The gradient of its weight is the hooks' business, and computed only where it is trained.

use candle_core::{Result, Tensor};

use crate::kernels::{elementwise, matmul};

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
        let y = matmul::nt(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            elementwise::add_bias_(&y, bias)?;
        }
        Ok(y)
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
