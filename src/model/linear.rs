//! A frozen linear layer: no gradient of its weight is ever computed.

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

    /// dy `[T, out]` -> dx `[T, in]`.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        matmul::nn(dy, &self.weight)
    }
}
