//! What the adapter methods share: one bottleneck's products, u = W_up act(W_down h + b_down) + b_up without a skip, the sum of gradients by
//! name, and how several values of a token are kept in one tensor.
//!
//! Shapes: T tokens, H hidden size, r the adapter's width.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::kernels::activation::{self, Activation};
use crate::kernels::host::F32View;
use crate::kernels::{elementwise, host, matmul};
use crate::model::hooks::Sublayer;
use crate::params::{Layout, ParamSet};
use crate::rng::{KeyedRng, Stream, name_key};

/// Standard deviation of the adapters library's start ("bert": adapters/methods/modeling.py, init_bert_weights).
const START_STD: f32 = 0.02;

const DOWN: &str = "adapter_down.0.weight";
const DOWN_BIAS: &str = "adapter_down.0.bias";
const UP: &str = "adapter_up.weight";
const UP_BIAS: &str = "adapter_up.bias";

/// Where a block's adapters stand, as the library names it.
pub(super) fn site(layer: usize, which: Sublayer) -> String {
    let name = match which {
        Sublayer::Attention => "attention_adapters",
        Sublayer::Mlp => "output_adapters",
    };
    format!("transformer.encoder.layers.{layer}.{name}")
}

/// The parameters of an adapter behind a sublayer, name -> shape.
pub(super) fn shapes(layer: usize, which: Sublayer, adapter: &str, (hidden, width): (usize, usize)) -> BTreeMap<String, Vec<usize>> {
    let parts = [(DOWN, vec![width, hidden]), (DOWN_BIAS, vec![width]), (UP, vec![hidden, width]), (UP_BIAS, vec![hidden])];
    parts.into_iter().map(|(part, shape)| (format!("{}.adapters.{adapter}.{part}", site(layer, which)), shape)).collect()
}

/// Whether a parameter is of an adapter's second layer, whose output is what the adapter adds.
pub(super) fn is_of_output(name: &str) -> bool {
    name.ends_with(UP) || name.ends_with(UP_BIAS)
}

/// N(0, 0.02) for a matrix and zeros for a bias, as the library starts its linear layers.
pub(super) fn start(name: &str, shape: &[usize], seed: u64) -> Result<Tensor> {
    let n = shape.iter().product();
    let values = match shape {
        [_, _] => {
            let normal = KeyedRng::new(seed, Stream::ParameterInit, name_key(name)).normal(n);
            normal.into_iter().map(|x| START_STD * x).collect()
        }
        _ => vec![0.0; n],
    };
    host::tensor(values, shape)
}

/// One adapter behind one sublayer; the tensors share memory with the parameters.
pub(super) struct Bottleneck {
    down_rH: Tensor,
    down_bias_r: Tensor,
    up_Hr: Tensor,
    up_bias_H: Tensor,
    activation: Activation,
}

impl Bottleneck {
    /// The adapter called `adapter` behind a sublayer.
    pub fn of(params: &ParamSet, layer: usize, which: Sublayer, adapter: &str, activation: Activation) -> Result<Self> {
        let get = |part: &str| params.get(&format!("{}.adapters.{adapter}.{part}", site(layer, which)));
        Ok(Self { down_rH: get(DOWN)?, down_bias_r: get(DOWN_BIAS)?, up_Hr: get(UP)?, up_bias_H: get(UP_BIAS)?, activation })
    }

    /// h `[T, H]` -> (u `[T, H]`, what goes into the activation `[T, r]`).
    pub fn forward(&self, h_TH: &Tensor) -> Result<(Tensor, Tensor)> {
        let a_Tr = matmul::nt(h_TH, &self.down_rH)?;
        elementwise::add_bias_(&a_Tr, &self.down_bias_r)?;
        let u_TH = matmul::nt(&activation::fwd(self.activation, &a_Tr)?, &self.up_Hr)?;
        elementwise::add_bias_(&u_TH, &self.up_bias_H)?;
        Ok((u_TH, a_Tr))
    }

    /// du `[T, H]` -> da `[T, r]`, towards what goes into the activation.
    pub fn inner_grad(&self, a_Tr: &Tensor, du_TH: &Tensor) -> Result<Tensor> {
        activation::bwd(self.activation, a_Tr, &matmul::nn(du_TH, &self.up_Hr)?)
    }

    /// da `[T, r]` -> dh `[T, H]`.
    pub fn input_grad(&self, da_Tr: &Tensor) -> Result<Tensor> {
        matmul::nn(da_Tr, &self.down_rH)
    }

    /// Adds the gradients of the four parameters below `prefix`.
    pub fn add_param_grads(
        &self,
        grads: &Gradients,
        prefix: &str,
        (h_TH, a_Tr): (&Tensor, &Tensor),
        (da_Tr, du_TH): (&Tensor, &Tensor),
    ) -> Result<()> {
        let of = |part: &str| grads.get(&format!("{prefix}.{part}"));
        matmul::tn_add_(&of(UP)?, du_TH, &activation::fwd(self.activation, a_Tr)?)?;
        elementwise::add_row_sum_(&of(UP_BIAS)?, du_TH)?;
        matmul::tn_add_(&of(DOWN)?, da_Tr, h_TH)?;
        elementwise::add_row_sum_(&of(DOWN_BIAS)?, da_Tr)
    }
}

/// Sums of gradients, flat in the order of the parameters.
pub(super) struct Gradients<'a> {
    layout: &'a Layout,
    flat: Tensor,
}

impl<'a> Gradients<'a> {
    pub fn zeros(layout: &'a Layout) -> Result<Self> {
        Ok(Self { layout, flat: Tensor::zeros(layout.num_elements(), DType::F32, &Device::Cpu)? })
    }

    /// Where a parameter's gradient is summed, in its shape.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let Some(entry) = self.layout.get(name) else { bail!("there is no parameter `{name}`") };
        self.flat.narrow(0, entry.offset, entry.num_elements())?.reshape(entry.shape.as_slice())
    }

    pub fn into_flat(self) -> Tensor {
        self.flat
    }
}

/// Matrices `[T, w]` of several widths, one behind the other in one tensor: a hook can keep one.
pub(super) fn pack(parts: &[&Tensor]) -> Result<Tensor> {
    let mut values = Vec::with_capacity(parts.iter().map(|part| part.elem_count()).sum());
    for part in parts {
        values.extend_from_slice(&F32View::new(part)?);
    }
    let len = values.len();
    host::tensor(values, &[len])
}

/// The inverse of [`pack`]: views `[T, w]` of the given widths.
pub(super) fn unpack<const N: usize>(packed: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
    let (len, width) = (packed.elem_count(), widths.iter().sum::<usize>().max(1));
    if len % width != 0 {
        bail!("{len} kept values are not {widths:?} a token");
    }
    let (tokens, mut start, mut parts) = (len / width, 0, widths.map(|_| packed.clone()));
    for (part, width) in parts.iter_mut().zip(widths) {
        *part = packed.narrow(0, start, tokens * width)?.reshape((tokens, width))?;
        start += tokens * width;
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_matrices_come_back() {
        let parts = [[2, 3], [2, 1], [2, 4]].map(|[t, w]| host::tensor((0..t * w).map(|i| (i * w) as f32).collect(), &[t, w]).unwrap());
        let packed = pack(&parts.iter().collect::<Vec<_>>()).unwrap();
        let again = unpack(&packed, [3, 1, 4]).unwrap();
        for (part, again) in parts.iter().zip(again) {
            assert_eq!(part.to_vec2::<f32>().unwrap(), again.to_vec2::<f32>().unwrap());
        }
    }
}
