//! A golden case's model and inputs, and a pass over them held against its files: on any device.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use glmddp::kernels::attention::Rows;
use glmddp::kernels::elementwise;
use glmddp::model::chatglm2::{Keep, Tokens};
use glmddp::model::hooks::{Hooks, NoHooks};
use glmddp::model::weights::WeightSource;
use glmddp::model::{ChatGlm2, ModelConfig, Recompute, RopeTable, loss};
use glmddp::peft::{Mode, PeftMethod, RowContext, TrainHooks};

use crate::golden::{Case, Comparison};
use crate::golden_subjects::exact_zero;

/// The model of a case, which computes in `dtype`.
pub fn model(case: &Case, dtype: DType, device: &Device) -> ChatGlm2 {
    let dir = case.dir.join("hf");
    let (config, source) = (ModelConfig::load(&dir).unwrap(), WeightSource::open(&dir).unwrap());
    let get = |name: &str, shape: &[usize]| Ok(source.get(name, shape, dtype, &Device::Cpu)?.to_device(device)?);
    ChatGlm2::from_tensors(config, RopeTable::Exact, get).unwrap()
}

/// In f32 on the CPU, where it can be looked at.
fn on_host(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

fn values(parts: &[Tensor]) -> Vec<f32> {
    parts.iter().flat_map(|part| part.to_vec1::<f32>().unwrap()).collect()
}

fn integers(t: &Tensor) -> Vec<i64> {
    t.to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// One of the four input variants.
pub struct Batch {
    ids: Vec<u32>,
    positions: Vec<u32>,
    bounds: Vec<usize>,
    keep: Option<Vec<bool>>,
    /// `[B, S]`
    labels: Vec<i64>,
    pub rows: usize,
    pub len: usize,
}

impl Batch {
    pub fn new(inputs: &BTreeMap<String, Tensor>, variant: &str) -> Self {
        Self::with_offset(inputs, variant, 0)
    }

    pub fn with_offset(inputs: &BTreeMap<String, Tensor>, variant: &str, offset: u32) -> Self {
        let (ids, labels) = if variant == "left_pad" { ("left_ids", "left_labels") } else { ("ids", "labels") };
        let (rows, len) = inputs[ids].dims2().unwrap();
        let unsigned = |name: &str| integers(&inputs[name]).into_iter().map(|x| x as u32).collect::<Vec<_>>();
        let positions = match variant {
            "left_pad" => unsigned("left_pos"),
            "pos_shift" => unsigned("shift_pos"),
            // PEFT's own positions: behind `offset` virtual tokens.
            _ if offset > 0 => (0..rows).flat_map(|_| offset..offset + len as u32).collect(),
            _ => (0..rows).flat_map(|_| 0..len as u32).collect(),
        };
        let mask = match variant {
            "left_pad" => Some("left_mask"),
            "right_mask" => Some("right_mask"),
            _ => None,
        };
        let keep = mask.map(|name| integers(&inputs[name]).into_iter().map(|x| x == 1).collect());
        Self {
            ids: unsigned(ids),
            positions,
            bounds: (0..=rows).map(|r| r * len).collect(),
            keep,
            labels: integers(&inputs[labels]),
            rows,
            len,
        }
    }

    pub fn tokens(&self) -> Tokens<'_> {
        Tokens { ids: &self.ids, positions: &self.positions, rows: Rows { bounds: &self.bounds, keep: self.keep.as_deref(), tables: None } }
    }

    fn targets(&self) -> Vec<(u32, u32)> {
        let at = |row: usize, t: usize| row * self.len + t;
        let all = (0..self.rows).flat_map(|row| (1..self.len).map(move |t| (row, t)));
        all.filter(|&(row, t)| self.labels[at(row, t)] != -100)
            .map(|(row, t)| (at(row, t - 1) as u32, self.labels[at(row, t)] as u32))
            .collect()
    }

    /// `[B, S - 1]` losses from those at the targets.
    fn token_loss(&self, nll: &[f32]) -> Tensor {
        let mut out = vec![0f32; self.rows * (self.len - 1)];
        for (&(at, _), loss) in self.targets().iter().zip(nll) {
            let (row, t) = (at as usize / self.len, at as usize % self.len);
            out[row * (self.len - 1) + t] = *loss;
        }
        Tensor::from_vec(out, (self.rows, self.len - 1), &Device::Cpu).unwrap()
    }
}

fn mean(nll: &[f32]) -> Tensor {
    let mean = nll.iter().map(|&x| f64::from(x)).sum::<f64>() / nll.len() as f64;
    Tensor::new(mean as f32, &Device::Cpu).unwrap()
}

/// Logits, losses and, with a method, gradients of one variant; those of the gradients that the golden file has. Gives the names of these.
pub fn check_variant(
    c: &mut Comparison,
    model: &ChatGlm2,
    method: Option<(&dyn PeftMethod, Box<dyn TrainHooks + '_>)>,
    batch: &Batch,
    name: &str,
    recompute: Recompute,
    gradient: &dyn Fn(&str) -> String,
) -> BTreeSet<String> {
    let tokens = batch.tokens();
    let no_hooks: &dyn Hooks = &NoHooks;
    let (hidden, tape) = match &method {
        Some((_, hooks)) => model.forward(tokens, &**hooks, Keep::ForBackward(recompute)).unwrap(),
        None => model.forward(tokens, no_hooks, Keep::Nothing).unwrap(),
    };
    let v = model.config.padded_vocab_size;
    let whole = c.golden.contains_key(&format!("{name}.logits")); // some variants have a loss and gradients alone
    if whole {
        c.check(&format!("{name}.logits"), &on_host(&loss::logits(model, &hidden).unwrap()).reshape((batch.rows, batch.len, v)).unwrap());
    }
    let targets = batch.targets();
    let Some((method, mut hooks)) = method else {
        let nll = values(&loss::nll(model, &hidden, &targets).unwrap());
        check_losses(c, batch, name, whole, &nll);
        return BTreeSet::new();
    };
    let (nll, dhidden) = loss::nll_and_gradient(model, &hidden, &targets, &mut *hooks).unwrap();
    let nll = values(&nll);
    assert_eq!(values(&loss::nll(model, &hidden, &targets).unwrap()), nll, "with and without a gradient the losses are the same bits");
    check_losses(c, batch, name, whole, &nll);
    model.backward(dhidden, tape, tokens, &mut *hooks, &mut |_| Ok(())).unwrap();
    let site = hooks.into_site_grad().unwrap();
    elementwise::scale_(&site, (1.0 / nll.len() as f64) as f32).unwrap();
    let grads = method.params().layout().views(&on_host(&method.param_grad(&site).unwrap())).unwrap();
    let trains_base = !method.trained_base_weights().unwrap().is_empty();
    let mut compared = BTreeSet::new();
    for (parameter, grad) in grads {
        let golden = gradient(&parameter);
        if c.golden.contains_key(&golden) {
            let zero = exact_zero(&model.config, if trains_base { &parameter } else { "" });
            c.check_except(&golden, &grad, 0.0, &zero);
            compared.insert(golden);
        }
    }
    compared
}

fn check_losses(c: &mut Comparison, batch: &Batch, name: &str, whole: bool, nll: &[f32]) {
    if c.golden.contains_key(&format!("{name}.token_loss")) || whole {
        c.check(&format!("{name}.token_loss"), &batch.token_loss(nll));
    }
    if c.golden.contains_key(&format!("{name}.loss")) {
        c.check(&format!("{name}.loss"), &mean(nll));
    }
}

pub fn eval_hooks(method: &dyn PeftMethod) -> Box<dyn TrainHooks + '_> {
    method.hooks(RowContext { stream_positions: &[], row_bounds: &[], mode: Mode::Eval }).unwrap()
}
