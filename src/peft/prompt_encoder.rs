//! What computes the soft tokens of p-tuning: PEFT's PromptEncoder, forward and backward (peft/tuners/p_tuning/model.py).
//!
//! Shapes: P soft tokens, H hidden size of the model, E width of the encoder. The MLP is three linear layers H -> E -> E -> H with ReLUs between;
//! the LSTM has two bidirectional layers over the P rows as one sequence, H -> 2E -> 2E, and two linear layers 2E -> 2E -> H behind them.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use crate::kernels::host::tensor;
use crate::kernels::lstm::{self, Order};
use crate::kernels::{elementwise, matmul};
use crate::params::ParamSet;
use crate::rng::{KeyedRng, Stream, name_key};

/// `[P, H]`, what the encoder reads.
pub const EMBEDDING: &str = "embedding.weight";
/// Bidirectional layers of the LSTM; PEFT's default.
pub const LSTM_LAYERS: usize = 2;
/// The two directions, and what torch puts behind their parameters' names.
const DIRECTIONS: [(Order, &str); 2] = [(Order::Forward, ""), (Order::Reverse, "_reverse")];

/// What computes the soft tokens, under PEFT's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EncoderKind {
    Mlp,
    Lstm,
}

impl EncoderKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Mlp => "MLP",
            Self::Lstm => "LSTM",
        }
    }
}

/// Sizes of an encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub kind: EncoderKind,
    /// P
    pub virtual_tokens: usize,
    /// H
    pub hidden_size: usize,
    /// E
    pub width: usize,
}

impl Shape {
    /// The linear layers: (place in PEFT's `mlp_head`, outputs, inputs).
    fn linears(&self) -> Vec<(usize, usize, usize)> {
        let (h, e) = (self.hidden_size, self.width);
        match self.kind {
            EncoderKind::Mlp => vec![(0, e, h), (2, e, e), (4, h, e)],
            EncoderKind::Lstm => vec![(0, 2 * e, 2 * e), (2, h, 2 * e)],
        }
    }

    /// Inputs of the LSTM's layers; none for an MLP.
    fn lstm_inputs(&self) -> Vec<usize> {
        match self.kind {
            EncoderKind::Mlp => Vec::new(),
            EncoderKind::Lstm => (0..LSTM_LAYERS).map(|layer| if layer == 0 { self.hidden_size } else { 2 * self.width }).collect(),
        }
    }

    /// Name -> shape, and the bound of its uniform start; none: N(0, 1).
    fn parameters(&self) -> BTreeMap<String, (Vec<usize>, Option<f32>)> {
        let bound = |width: usize| Some(1.0 / (width as f32).sqrt());
        let e = self.width;
        let mut all = BTreeMap::from([(EMBEDDING.to_owned(), (vec![self.virtual_tokens, self.hidden_size], None))]);
        for (layer, input) in self.lstm_inputs().into_iter().enumerate() {
            for (_, direction) in DIRECTIONS {
                let shapes = [vec![4 * e, input], vec![4 * e, e], vec![4 * e], vec![4 * e]];
                all.extend(lstm_names(layer, direction).into_iter().zip(shapes.map(|shape| (shape, bound(e)))));
            }
        }
        for (place, out, input) in self.linears() {
            let [weight, bias] = linear_names(place);
            all.extend([(weight, (vec![out, input], bound(input))), (bias, (vec![out], bound(input)))]);
        }
        all
    }

    /// Parameters of the encoder, the embedding included.
    pub fn num_parameters(&self) -> usize {
        self.parameters().values().map(|(shape, _)| shape.iter().product::<usize>()).sum()
    }
}

/// weight_ih, weight_hh, bias_ih, bias_hh.
fn lstm_names(layer: usize, direction: &str) -> [String; 4] {
    ["weight_ih", "weight_hh", "bias_ih", "bias_hh"].map(|what| format!("lstm_head.{what}_l{layer}{direction}"))
}

fn linear_names(place: usize) -> [String; 2] {
    ["weight", "bias"].map(|what| format!("mlp_head.{place}.{what}"))
}

/// What a pass of the encoder left.
struct Pass {
    /// `[P, H]`
    output_PH: Tensor,
    /// Input of each LSTM layer, and both directions.
    lstm: Vec<(Tensor, [lstm::Saved; 2])>,
    /// Input of each linear layer.
    linear: Vec<Tensor>,
}

/// The encoder and its output.
pub struct PromptEncoder {
    shape: Shape,
    params: ParamSet,
    pass: Pass,
}

impl PromptEncoder {
    /// A fresh encoder, as torch starts it: N(0, 1) for the embedding, uniform ±1/√E for the LSTM, ±1/√in for linear layers and their biases.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn new(shape: Shape, seed: u64) -> Result<Self> {
        let init = |(name, (dims, bound)): (String, (Vec<usize>, Option<f32>))| {
            let rng = KeyedRng::new(seed, Stream::ParameterInit, name_key(&name));
            let n = dims.iter().product();
            let values = match bound {
                Some(bound) => (0..n as u64).map(|i| (2.0 * rng.uniform(i) - 1.0) * bound).collect(),
                None => rng.normal(n),
            };
            Ok((name, tensor(values, &dims)?))
        };
        Self::from_tensors(shape, &shape.parameters().into_iter().map(init).collect::<Result<_>>()?)
    }

    /// An encoder with given values.
    ///
    /// # Errors
    /// When a name is missing or unknown or has another shape than `shape` says.
    pub fn from_tensors(shape: Shape, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let zeros = |(name, (dims, _)): (String, (Vec<usize>, _))| Ok((name, Tensor::zeros(dims, DType::F32, &Device::Cpu)?));
        let mut params = ParamSet::new(&shape.parameters().into_iter().map(zeros).collect::<Result<_>>()?)?;
        params.load(tensors)?;
        let pass = forward(&shape, &params)?;
        Ok(Self { shape, params, pass })
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    pub fn params_mut(&mut self) -> &mut ParamSet {
        &mut self.params
    }

    /// The soft tokens, `[P, H]`.
    pub fn output(&self) -> &Tensor {
        &self.pass.output_PH
    }

    /// Computes the output from the parameters.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn refresh(&mut self) -> Result<()> {
        self.pass = forward(&self.shape, &self.params)?;
        Ok(())
    }

    /// The output's gradient, P H values, pulled back to all parameters, flat in their order.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn param_grad(&self, doutput: &Tensor) -> Result<Tensor> {
        let mut grads = BTreeMap::new();
        let mut dy = doutput.reshape((self.shape.virtual_tokens, self.shape.hidden_size))?;
        for (n, ((place, out, _), x)) in self.shape.linears().into_iter().zip(&self.pass.linear).enumerate().rev() {
            let [weight, bias] = linear_names(place);
            let dbias = Tensor::zeros(out, DType::F32, &Device::Cpu)?;
            elementwise::add_row_sum_(&dbias, &dy)?;
            let mut dx = matmul::nn(&dy, &self.params.get(&weight)?)?;
            if n > 0 {
                dx = (dx * x.gt(0f32)?.to_dtype(DType::F32)?)?; // x came through a ReLU
            }
            grads.extend([(weight, matmul::tn(&dy, x)?), (bias, dbias)]);
            dy = dx;
        }
        for (layer, (x, directions)) in self.pass.lstm.iter().enumerate().rev() {
            let mut dx = None;
            for (half, ((order, direction), saved)) in DIRECTIONS.into_iter().zip(directions).enumerate() {
                let dh = dy.narrow(1, half * self.shape.width, self.shape.width)?.contiguous()?;
                let of = lstm::bwd(&dh, x, saved, &lstm_weights(&self.params, layer, direction)?, order)?;
                let names = lstm_names(layer, direction);
                grads.extend(names.into_iter().zip([of.w_ih, of.w_hh, of.bias.clone(), of.bias]));
                dx = Some(match dx {
                    None => of.x_TN,
                    Some(dx) => (dx + of.x_TN)?,
                });
            }
            let Some(dx) = dx else { bail!("an LSTM layer without directions") };
            dy = dx;
        }
        grads.insert(EMBEDDING.to_owned(), dy);
        self.params.layout().flatten(&grads)
    }
}

fn lstm_weights(params: &ParamSet, layer: usize, direction: &str) -> Result<lstm::Weights> {
    let [w_ih, w_hh, b_ih, b_hh] = lstm_names(layer, direction);
    Ok(lstm::Weights { w_ih: params.get(&w_ih)?, w_hh: params.get(&w_hh)?, b_ih: params.get(&b_ih)?, b_hh: params.get(&b_hh)? })
}

fn forward(shape: &Shape, params: &ParamSet) -> Result<Pass> {
    let mut x = params.get(EMBEDDING)?;
    let mut pass = Pass { output_PH: x.clone(), lstm: Vec::new(), linear: Vec::new() };
    for layer in 0..shape.lstm_inputs().len() {
        let run = |(order, direction): (Order, &str)| lstm::fwd(&x, &lstm_weights(params, layer, direction)?, order);
        let directions = [run(DIRECTIONS[0])?, run(DIRECTIONS[1])?];
        let y = Tensor::cat(&[&directions[0].output_TE, &directions[1].output_TE], 1)?;
        pass.lstm.push((x, directions));
        x = y;
    }
    let linears = shape.linears();
    for (n, &(place, ..)) in linears.iter().enumerate() {
        let [weight, bias] = linear_names(place);
        let y = matmul::nt(&x, &params.get(&weight)?)?;
        elementwise::add_bias_(&y, &params.get(&bias)?)?;
        pass.linear.push(x);
        x = if n + 1 < linears.len() { y.relu()? } else { y };
    }
    pass.output_PH = x;
    Ok(pass)
}
