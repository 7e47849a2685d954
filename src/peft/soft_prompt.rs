//! Soft tokens in front of every row: what prompt tuning and p-tuning share. The site is the table of soft tokens.
//!
//! Shapes: P soft tokens, H hidden size of the model, R rows.
#![allow(non_snake_case, reason = "tensor names carry shape suffixes")]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;

use candle_core::{DType, Result, Tensor, bail};
use serde_json::{Value, json};

use super::export::{self, ExportError, Files, PEFT_PREFIX, PeftFile};
use super::understood;
use super::{Costs, ExportContext, TrainHooks};
use crate::kernels::host::{F32View, tensor};
use crate::model::ModelConfig;
use crate::model::hooks::{Hooks, Reach};
use crate::model::shape::ModelShape;

/// PEFT's name of the table, `[P, H]`.
pub(super) const TABLE: &str = "prompt_embeddings";

/// Costs of P soft tokens that stand on so many parameters.
pub(super) fn costs(virtual_tokens: NonZeroUsize, shape: &ModelShape, parameters: u64) -> Costs {
    let tokens = virtual_tokens.get() as u64;
    Costs { trainable_parameters: parameters, site_elements: tokens * shape.hidden, soft_tokens: tokens, ..Costs::default() }
}

pub(super) struct SoftHooks {
    table_PH: Tensor,
    /// As the table.
    grad: Vec<f32>,
}

impl SoftHooks {
    pub(super) fn new(table_PH: Tensor) -> Self {
        let grad = vec![0f32; table_PH.elem_count()];
        Self { table_PH, grad }
    }
}

impl Hooks for SoftHooks {
    fn soft_tokens(&self) -> Result<Option<Tensor>> {
        Ok(Some(self.table_PH.clone()))
    }

    /// Row by row, in their order.
    fn soft_tokens_grad(&mut self, grad_RPH: &Tensor) -> Result<()> {
        if grad_RPH.dims().get(1..) != Some(self.table_PH.dims()) {
            bail!("soft tokens: gradient {:?} of a table {:?}", grad_RPH.dims(), self.table_PH.dims());
        }
        let rows = F32View::new(grad_RPH)?;
        for row in rows.chunks_exact(self.grad.len()) {
            self.grad.iter_mut().zip(row).for_each(|(sum, g)| *sum += g);
        }
        Ok(())
    }

    fn reach(&self, _layer: usize) -> Reach {
        Reach::Input
    }
}

impl TrainHooks for SoftHooks {
    fn into_site_grad(self: Box<Self>) -> Result<Tensor> {
        let len = self.grad.len();
        tensor(self.grad, &[len])
    }
}

/// The files of PEFT's format: `own` are the keys that this kind has beyond those of all prompts, `notes` what a reader should know.
pub(super) fn peft_files(
    table_PH: &Tensor,
    own: Value,
    notes: &[&'static str],
    context: &ExportContext,
) -> std::result::Result<Files, ExportError> {
    let (tokens, hidden) = table_PH.dims2()?;
    let mut config = json!({
        "auto_mapping": null,
        "base_model_name_or_path": context.model_dir.display().to_string(),
        "inference_mode": true,
        "modules_to_save": null,
        "num_attention_heads": context.config.num_attention_heads,
        "num_layers": context.config.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "revision": null,
        "task_type": "CAUSAL_LM",
        "token_dim": hidden,
    });
    if let (Value::Object(all), Value::Object(own)) = (&mut config, own) {
        all.extend(own);
    }
    let published = "the published ChatGLM2 code (modeling_chatglm.py) cannot run PEFT's prompt methods: it reads input_ids.shape, and \
                     PEFT passes inputs_embeds alone; run this adapter with glmddp, or with a ChatGLM2 that takes inputs_embeds";
    let about = export::with_notes(context.about, notes.iter().copied().chain([published]));
    let tensors = BTreeMap::from([(TABLE.to_owned(), table_PH.to_dtype(DType::F32)?)]);
    export::peft_adapter(&config, &tensors, &about)
}

/// The table that PEFT saved of prompt tuning or p-tuning for a model of `config`, `[P, H]`.
///
/// # Errors
/// When a file is missing or not whole, the adapter is of another kind, or a size is not the model's.
pub(super) fn read_peft(dir: &Path, config: &ModelConfig) -> std::result::Result<Tensor, ExportError> {
    let file = PeftFile::open_one_of(dir, &["PROMPT_TUNING", "P_TUNING"])?;
    file.expect_understood(understood::PROMPT)?;
    for (key, ours, what) in [
        ("token_dim", config.hidden_size, "the hidden size of the model"),
        ("num_layers", config.num_layers, "the number of layers of the model"),
    ] {
        if file.config.get(key).is_some_and(|found| !understood::is_off(found) && found != &json!(ours)) {
            return Err(file.key_error(key, format!("{ours}, {what}")));
        }
    }
    let tokens: NonZeroUsize = file.read("num_virtual_tokens", "a number above 0")?;
    file.expect_tensors([TABLE].into_iter(), PEFT_PREFIX)?;
    file.tensor(TABLE, &[tokens.get(), config.hidden_size])
}
