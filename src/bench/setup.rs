//! A random ChatGLM2 of given sizes and real rows, ready for steps.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use candle_core::DType;
use rayon::prelude::*;

use crate::config::plan::LossMean;
use crate::data::demo::{self, DemoKind};
use crate::data::load::LoadRequest;
use crate::data::prompt::Truncation;
use crate::data::record::{Columns, OnBadRow};
use crate::data::tokenize::Limits;
use crate::data::{self, Alone, Dataset, MicroBatch, collate::collate};
use crate::kernels::host;
use crate::model::config::Rope;
use crate::model::{ChatGlm2, ModelConfig, Recompute, RopeTable};
use crate::optim::AdamWConfig;
use crate::peft::{self, MethodPlan, PeftMethod};
use crate::rng::{KeyedRng, Stream, name_key, unit};
use crate::tokenizer::{GlmTokenizer, train_small};
use crate::train::TrainError;
use crate::train::adapters::Tokenizer;
use crate::train::optimizer::Optimizer;
use crate::train::step::StepSettings;

/// Sizes of the model, of the prefix and of a step.
#[derive(Clone, Debug)]
pub struct BenchSetup {
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub groups: usize,
    pub kv: usize,
    pub vocab: usize,
    pub method: MethodPlan,
    /// Rows of a micro-batch.
    pub rows: NonZeroUsize,
    /// Micro-batches of a step.
    pub slots: NonZeroUsize,
    pub recompute: Recompute,
    /// tokenizer.model; none: a small one made on the spot.
    pub tokenizer: Option<PathBuf>,
    /// Rows in AdvertiseGen's columns; none: demo rows.
    pub train_file: Option<PathBuf>,
    /// Longest row (tokens), prompt 64 and eos included.
    pub seq: usize,
}

/// A model, a method and an optimizer with random values.
pub struct Bench {
    pub model: ChatGlm2,
    pub method: Box<dyn PeftMethod>,
    pub optimizer: Optimizer<'static>,
    pub data: Dataset,
    pub settings: StepSettings,
    setup: BenchSetup,
}

impl Bench {
    /// # Errors
    /// When a file cannot be read or the sizes do not fit each other.
    pub fn new(setup: &BenchSetup) -> Result<Self, TrainError> {
        let config = setup.config();
        let data = setup.data()?;
        let mut model = ChatGlm2::from_tensors(config, RopeTable::Exact, random)?;
        let method = peft::create(&setup.method, &model, 0)?;
        model.replace_weights(&method.trained_base_weights()?)?;
        let adamw = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let optimizer = Optimizer::replicated(adamw, method.params().layout().num_elements(), model.device())?;
        let settings = StepSettings { recompute: setup.recompute, loss_mean: LossMean::Token, max_grad_norm: Some(1.0) };
        Ok(Self { model, method, optimizer, data, settings, setup: setup.clone() })
    }

    /// Slot `slot` of step `step`: rows in file order, from the front again after the last.
    pub fn micro_batch(&self, step: usize, slot: usize) -> MicroBatch {
        let rows = self.setup.rows.get();
        let first = (step * self.setup.slots.get() + slot) * rows;
        let rows: Vec<(u64, usize)> = (first..first + rows).map(|i| (i as u64, i % self.data.num_samples())).collect();
        collate(&rows, &self.data)
    }

    /// Tokens of a micro-batch's rows, the last of each row included.
    pub fn real_tokens(&self, batch: &MicroBatch) -> usize {
        batch.sample_indices.iter().map(|&i| self.data.sample(i).ids.len()).sum()
    }
}

impl BenchSetup {
    fn config(&self) -> ModelConfig {
        ModelConfig {
            name: "bench".to_owned(),
            num_layers: self.layers,
            hidden_size: self.hidden,
            ffn_hidden_size: self.ffn,
            num_attention_heads: self.heads,
            kv_channels: self.kv,
            multi_query_group_num: self.groups,
            padded_vocab_size: self.vocab,
            layernorm_epsilon: 1e-5,
            seq_length: 32768,
            add_qkv_bias: true,
            add_bias_linear: false,
            post_layer_norm: true,
            rope: Rope { base: 10_000.0, position_scale: 1.0 },
            torch_dtype: DType::F32,
            eos_token_id: 2,
            pad_token_id: 0,
            pre_seq_len: None,
            prefix_projection: false,
        }
    }

    fn data(&self) -> Result<Dataset, TrainError> {
        let demo_rows = demo::demo_rows(DemoKind::Advert, 512, 1);
        let tokenizer = match &self.tokenizer {
            Some(path) => GlmTokenizer::from_file(path)?,
            None => {
                let corpus: Vec<String> = demo_rows.iter().flat_map(|(a, b)| [a.clone(), b.clone()]).collect();
                GlmTokenizer::from_bytes(&train_small(&corpus, 600), Path::new("tokenizer.model"))?
            }
        };
        // Our own small one leaves most of a large vocabulary unused, which is no matter here.
        if self.tokenizer.is_some() || tokenizer.vocab_size() > self.vocab {
            tokenizer.check_fits(self.vocab)?;
        }
        let limits =
            Limits { max_source_length: 64, max_target_length: self.seq.saturating_sub(65).max(1), truncation: Truncation::Published };
        let Some(file) = &self.train_file else {
            let mut data = Dataset::new(Path::new("demo rows"));
            let maker_tokenizer = Tokenizer(&tokenizer);
            let maker = data::tokenize::SampleMaker::new(&maker_tokenizer, limits)?;
            for (i, (prompt, response)) in demo_rows.into_iter().enumerate() {
                let origin = data::RowOrigin { file: std::sync::Arc::from(Path::new("demo rows")), row: i + 1 };
                let example = data::Example { prompt, response, history: Vec::new(), origin };
                let tokenized = maker.make(&example).map_err(|message| data::DataError::Loader { message })?;
                data.push(tokenized.sample.as_ref(), i + 1);
            }
            return Ok(data);
        };
        let request = LoadRequest {
            file: file.clone(),
            columns: Columns { prompt: "content".to_owned(), input: None, response: "summary".to_owned(), history: None },
            limits,
            on_bad_row: OnBadRow::Stop,
            max_samples: None,
            cache: None,
        };
        Ok(data::load::load(&request, &Tokenizer(&tokenizer), &Alone)?.0)
    }
}

/// Uniform values with a standard deviation of 0.02, norms 1 and biases 0.
fn random(name: &str, shape: &[usize]) -> Result<candle_core::Tensor, crate::model::ModelError> {
    let n: usize = shape.iter().product();
    let values = if name.contains("layernorm") {
        vec![1.0; n]
    } else if name.ends_with("bias") {
        vec![0.0; n]
    } else {
        let rng = KeyedRng::new(0, Stream::ModelInit, name_key(name));
        let bound = 0.02 * 3f32.sqrt();
        let mut values = vec![0f32; n];
        values.par_chunks_mut(4).enumerate().with_min_len(4096).for_each(|(block, values)| {
            values.iter_mut().zip(rng.block(block as u32)).for_each(|(v, bits)| *v = (2.0 * unit(bits) - 1.0) * bound);
        });
        values
    };
    Ok(host::tensor(values, shape)?)
}

/// Sizes by name, for a report.
pub fn describe(setup: &BenchSetup) -> BTreeMap<&'static str, usize> {
    BTreeMap::from([
        ("layers", setup.layers),
        ("hidden", setup.hidden),
        ("ffn", setup.ffn),
        ("heads", setup.heads),
        ("groups", setup.groups),
        ("kv", setup.kv),
        ("vocab", setup.vocab),
        ("rows", setup.rows.get()),
        ("slots", setup.slots.get()),
    ])
}
