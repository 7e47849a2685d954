//! Arguments of THUDM's scripts and the Hugging Face Trainer that are not keys of ours.
//!
//! Scripts that people have should run as they are: what has no meaning here is accepted with a line that says why. What would give
//! other results than asked for is refused.

use toml::Value;

use super::off::Asks;
use super::{ConfigError, Place, Source};

/// How many values an argument takes on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// A bare flag, or one that is followed by true or false.
    Flag,
    One,
    Many,
}

/// What happens to the argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Accepted, whatever it says.
    Idle,
    /// Accepted if it is off or asks for one of these, which happens anyway; refused otherwise.
    RefusedUnless(&'static [&'static str]),
    /// As `RefusedUnless`, of what is on by default: `false` and `"no"` ask for something.
    Only(&'static [&'static str]),
}

#[derive(Clone, Copy, Debug)]
pub struct ForeignArgument {
    pub name: &'static str,
    pub arity: Arity,
    pub verdict: Verdict,
    /// Why it does nothing, or why it is refused.
    pub reason: &'static str,
}

impl ForeignArgument {
    /// What is said of `key = value`, or that it is refused. A bare flag has the value `true`.
    ///
    /// # Errors
    /// When it asks for what this program does not do.
    pub fn judge(&self, key: &str, value: &Value, place: Place) -> Result<Idle, ConfigError> {
        if !self.accepts(value) {
            return Err(ConfigError::Unsupported { key: key.to_owned(), reason: self.reason, place });
        }
        let defaults = DEFAULTS.iter().find(|(name, _)| *name == key).map_or(&[][..], |(_, values)| values);
        let asks = self.verdict == Verdict::Idle && Asks::of(value) == Asks::Something && !is_one_of(value, defaults);
        Ok(Idle { key: key.to_owned(), reason: asks.then_some(self.reason), place })
    }

    fn accepts(&self, value: &Value) -> bool {
        match (self.verdict, Asks::of(value)) {
            (Verdict::Idle, _) | (_, Asks::Nothing) | (Verdict::RefusedUnless(_), Asks::Off) => true,
            (Verdict::RefusedUnless(harmless) | Verdict::Only(harmless), _) => is_one_of(value, harmless),
        }
    }
}

/// Whether `value` is one of these texts, as a number or a text; of a list each element, of a table each entry as `key=value`, unless it is off.
fn is_one_of(value: &Value, texts: &[&str]) -> bool {
    let is_off = |inner: &Value| Asks::of(inner) != Asks::Something || text_of(inner).parse() == Ok(0.0);
    match value {
        Value::Array(values) => values.iter().all(|inner| is_off(inner) || is_one_of(inner, texts)),
        Value::Table(table) => {
            table.iter().all(|(key, inner)| is_off(inner) || texts.contains(&format!("{key}={}", text_of(inner)).as_str()))
        }
        _ => {
            let text = text_of(value);
            let is_number = |one: &str| matches!((one.parse::<f64>(), text.parse::<f64>()), (Ok(a), Ok(b)) if a == b);
            texts.iter().any(|one| one.eq_ignore_ascii_case(&text) || is_number(one))
        }
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A key that was accepted and does nothing.
#[derive(Clone, Debug)]
pub struct Idle {
    pub key: String,
    /// Why it does nothing; `None` where it is off or has its default, and so asks for nothing.
    pub reason: Option<&'static str>,
    pub place: Place,
}

/// Names in one line, at most.
const SHOWN: usize = 12;

/// The one warning about keys that do nothing, or none.
pub fn warnings(idle: &[Idle]) -> Vec<String> {
    let name = |one: &Idle| if one.place.source == Source::CommandLine { format!("`--{}`", one.key) } else { format!("`{}`", one.key) };
    let place = |one: &Idle| if one.place.source == Source::CommandLine { String::new() } else { format!(" ({})", one.place) };
    if let [one] = idle {
        let reason = one.reason.unwrap_or("it is off or has its default");
        return vec![format!("{} does nothing here: {reason}{}", name(one), place(one))];
    }
    let (told, quiet): (Vec<&Idle>, Vec<&Idle>) = idle.iter().partition(|one| one.reason.is_some());
    let mut lines = vec![format!("{} keys do nothing here:", idle.len())];
    lines.extend(told.into_iter().map(|one| format!("{}: {}{}", name(one), one.reason.unwrap_or_default(), place(one))));
    if !quiet.is_empty() {
        let names: Vec<String> = quiet.iter().take(SHOWN).map(|one| name(one)).collect();
        let more = if quiet.len() > SHOWN { format!(" and {} more", quiet.len() - SHOWN) } else { String::new() };
        lines.push(format!("off, or at their defaults: {}{more}", names.join(", ")));
    }
    if idle.is_empty() { Vec::new() } else { vec![lines.join("\n  ")] }
}

pub fn find(name: &str) -> Option<&'static ForeignArgument> {
    FOREIGN_ARGUMENTS.iter().find(|a| a.name == name || a.name.strip_suffix('*').is_some_and(|family| name.starts_with(family)))
}

const fn idle(name: &'static str, arity: Arity, reason: &'static str) -> ForeignArgument {
    ForeignArgument { name, arity, verdict: Verdict::Idle, reason }
}

const fn refused(name: &'static str, arity: Arity, unless: &'static [&'static str], reason: &'static str) -> ForeignArgument {
    ForeignArgument { name, arity, verdict: Verdict::RefusedUnless(unless), reason }
}

const fn only(name: &'static str, arity: Arity, these: &'static [&'static str], reason: &'static str) -> ForeignArgument {
    ForeignArgument { name, arity, verdict: Verdict::Only(these), reason }
}

use Arity::{Flag, Many, One};

const ON: &[&str] = &["true"];
/// Off, or refused.
const NEVER: &[&str] = &[];

/// A name that ends in `*` stands for all that begin like it.
#[rustfmt::skip]
pub const FOREIGN_ARGUMENTS: &[ForeignArgument] = &[
    // THUDM/ChatGLM2-6B ptuning/arguments.py
    idle("preprocessing_num_workers", One, "the ranks tokenize together, each with its own threads"),
    idle("predict_with_generate", Flag, "nothing is generated while training"),
    idle("use_fast_tokenizer", Flag, "tokenizer.model is read directly"),
    idle("pad_to_max_length", Flag, "rows are packed, nothing is padded"),
    idle("ignore_pad_token_for_loss", Flag, "nothing is padded"),
    idle("config_name", One, "config.json is read from model_name_or_path"),
    idle("tokenizer_name", One, "tokenizer.model is read from model_name_or_path"),
    idle("model_revision", One, "model_name_or_path is a folder"),
    idle("use_auth_token", Flag, "nothing is downloaded"),
    idle("trust_remote_code", Flag, "no code is taken from the model's folder"),
    idle("resize_position_embeddings", One, "positions are rotary, there is no table to resize"),
    idle("lang", One, "the published code does not use it"),
    idle("dataset_name", One, "the published code does not use it"),
    idle("dataset_config_name", One, "the published code does not use it"),
    idle("forced_bos_token", One, "the published code does not use it"),
    idle("test_file", One, "only prediction reads it"),
    idle("max_predict_samples", One, "only prediction reads it"),
    idle("num_beams", One, "nothing is generated while training"),
    refused("quantization_bit", One, NEVER, "the base model is not quantized yet"),
    refused("ptuning_checkpoint", One, NEVER, "`glmddp checkpoint import` makes an adapter the start of a run; resume_from_checkpoint goes on with a run"),
    refused("source_prefix", One, NEVER, "nothing is put before the prompt"),
    refused("val_max_target_length", One, NEVER, "held-out answers are cut at max_target_length"),
    // transformers Seq2SeqTrainingArguments
    idle("do_train", Flag, "the sub-command says so"),
    idle("do_eval", Flag, "validation_file turns evaluation on"),
    refused("do_predict", Flag, NEVER, "`glmddp generate` answers the rows of a file"),
    refused("fp16", Flag, NEVER, "a GPU computes in bfloat16 and a CPU in float32, unless compute_dtype says otherwise"),
    idle("bf16", Flag, "a GPU computes in bfloat16 and a CPU in float32, unless compute_dtype says otherwise"),
    refused("fp16_full_eval", Flag, NEVER, "a GPU computes in bfloat16 and a CPU in float32, unless compute_dtype says otherwise"),
    idle("bf16_full_eval", Flag, "a GPU computes in bfloat16 and a CPU in float32, unless compute_dtype says otherwise"),
    idle("fp16_opt_level", One, "it goes with fp16"),
    idle("half_precision_backend", One, "it goes with fp16"),
    idle("tf32", Flag, "it goes with CUDA"),
    refused("optim", One, &["adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_torch_xla", "adamw_apex_fused"], "the optimizer is AdamW"),
    refused("adafactor", Flag, NEVER, "the optimizer is AdamW"),
    refused("label_smoothing_factor", One, &["0"], "the loss is plain cross-entropy"),
    refused("group_by_length", Flag, NEVER, "rows come in shuffled order"),
    refused("data_seed", One, NEVER, "`seed` covers the order of the rows too"),
    refused("ignore_data_skip", Flag, NEVER, "a resumed run goes on with the row after the last one"),
    refused("load_best_model_at_end", Flag, NEVER, "the last adapter is exported; save_best keeps the best checkpoint, which has its own"),
    refused("metric_for_best_model", One, &["loss", "eval_loss"], "save_best keeps the checkpoint with the lowest loss"),
    refused("greater_is_better", One, NEVER, "save_best keeps the checkpoint with the lowest loss"),
    refused("early_stopping*", One, NEVER, "a run ends at its last step"),
    refused("deepspeed", One, NEVER, "glmddp is data-parallel by itself; start it with mpirun"),
    refused("fsdp_min_num_params", One, &["0"], "glmddp is data-parallel by itself; start it with mpirun"),
    refused("fsdp*", Many, NEVER, "glmddp is data-parallel by itself; start it with mpirun"),
    refused("per_gpu_train_batch_size", One, NEVER, "its name is per_device_train_batch_size"),
    refused("per_gpu_eval_batch_size", One, NEVER, "its name is per_device_eval_batch_size"),
    refused("evaluation_strategy", One, &["steps"], "eval_steps says when to evaluate"),
    refused("eval_strategy", One, &["steps"], "eval_steps says when to evaluate"),
    only("save_strategy", One, &["steps"], "save_steps says when to save; 0 saves at the end only"),
    only("logging_strategy", One, &["steps"], "logging_steps says when to log"),
    refused("push_to_hub", Flag, NEVER, "nothing is uploaded"),
    idle("eval_accumulation_steps", One, "the evaluation keeps sums only"),
    idle("logging_first_step", Flag, "logging_steps says when to log"),
    idle("logging_nan_inf_filter", Flag, "the first loss that is not finite stops the run"),
    idle("logging_dir", One, "logs go to output_dir"),
    idle("log_level*", One, "the environment variable RUST_LOG says what is logged"),
    idle("log_on_each_node", Flag, "rank 0 logs"),
    idle("report_to", Many, "every run writes trainer_log.jsonl"),
    idle("run_name", One, "output_dir names the run"),
    idle("disable_tqdm", Flag, "the progress bar shows on a terminal only"),
    idle("full_determinism", Flag, "runs are always deterministic"),
    idle("save_safetensors", Flag, "each method is saved in the format of the library that reads it"),
    idle("save_on_each_node", Flag, "the ranks save together"),
    idle("dataloader_num_workers", One, "rows are tokenized before the first step"),
    idle("dataloader_pin_memory", Flag, "rows are tokenized before the first step"),
    idle("dataloader_drop_last", Flag, "the order of rows runs on from one epoch to the next"),
    idle("remove_unused_columns", Flag, "other columns are not read"),
    idle("prediction_loss_only", Flag, "the evaluation computes the loss only"),
    idle("generation_max_length", One, "nothing is generated while training"),
    idle("generation_num_beams", One, "nothing is generated while training"),
    idle("include_inputs_for_metrics", Flag, "nothing is generated while training"),
    idle("ddp_timeout", One, "`stall_timeout` says how long ranks wait for each other"),
    idle("ddp_backend", One, "the ranks talk over MPI"),
    idle("ddp_find_unused_parameters", Flag, "the gradient is one buffer"),
    idle("ddp_bucket_cap_mb", One, "the gradient is one buffer"),
    idle("ddp_broadcast_buffers", Flag, "the gradient is one buffer"),
    idle("local_rank", One, "MPI says which rank this is"),
    refused("no_cuda", Flag, NEVER, "device = cpu says it"),
    refused("use_cpu", Flag, NEVER, "device = cpu says it"),
    idle("torch_compile*", One, "there is no PyTorch"),
    idle("skip_memory_metrics", Flag, "the step line shows memory always"),
    refused("lr_scheduler_kwargs", One, NEVER, "the schedules have no settings of their own"),
    refused("optim_args", One, NEVER, "AdamW's settings are adam_beta1, adam_beta2, adam_epsilon and weight_decay"),
    refused("optim_target_modules", Many, NEVER, "the optimizer is AdamW for all trained parameters"),
    refused("gradient_checkpointing_kwargs", One, NEVER, "recompute = \"block\" recomputes each block, in one way"),
    refused("accelerator_config", One, &["even_batches=true", "use_seedable_sampler=true"], "glmddp deals the rows to the ranks itself"),
    refused("split_batches", Flag, NEVER, "global_batch_size says how many rows a step has over all ranks"),
    refused("parallelism_config", One, NEVER, "glmddp is data-parallel"),
    refused("auto_find_batch_size", Flag, NEVER, "`glmddp plan` shows the memory of a batch before it is trained"),
    refused("past_index", One, &["-1"], "ChatGLM2 has no state of earlier batches"),
    refused("label_names", Many, &["labels"], "the labels are the answer's tokens"),
    refused("eval_delay", One, &["0"], "eval_steps says when to evaluate"),
    refused("eval_on_start", Flag, NEVER, "eval_steps says when to evaluate; `glmddp evaluate` does so for the base alone"),
    refused("sortish_sampler", Flag, NEVER, "rows come in shuffled order"),
    refused("sharded_ddp", Many, NEVER, "shard_optimizer shares AdamW's moments among the ranks"),
    refused("mp_parameters", One, NEVER, "glmddp is data-parallel"),
    refused("batch_eval_metrics", Flag, NEVER, "the evaluation computes the loss only"),
    idle("average_tokens_across_devices", Flag, "loss_mean says how the tokens of all ranks are averaged"),
    idle("dispatch_batches", Flag, "every rank reads its own rows"),
    idle("length_column_name", One, "it goes with group_by_length"),
    idle("generation_config", One, "nothing is generated while training"),
    idle("fp16_backend", One, "it goes with fp16"),
    idle("use_mps_device", Flag, "the device follows from the build"),
    idle("tpu_*", One, "there is no PyTorch"),
    idle("xpu_backend", One, "there is no PyTorch"),
    idle("use_ipex", Flag, "there is no PyTorch"),
    idle("jit_mode_eval", Flag, "there is no PyTorch"),
    idle("torchdynamo", One, "there is no PyTorch"),
    idle("torch_empty_cache_steps", One, "there is no PyTorch"),
    idle("use_liger_kernel", Flag, "there is no PyTorch"),
    idle("liger_kernel_config", One, "there is no PyTorch"),
    idle("use_legacy_prediction_loop", Flag, "the evaluation computes the loss only"),
    idle("eval_do_concat_batches", Flag, "the evaluation keeps sums only"),
    idle("eval_use_gather_object", Flag, "the evaluation keeps sums only"),
    idle("include_for_metrics", Many, "the evaluation computes the loss only"),
    idle("include_tokens_per_second", Flag, "the step line shows tokens a second always"),
    idle("include_num_input_tokens_seen", Flag, "the step line shows tokens a second always"),
    idle("debug", Many, "the first loss that is not finite stops the run"),
    idle("save_only_model", Flag, "a checkpoint holds the optimizer's state, so that a run can go on from it"),
    idle("restore_callback_states_from_checkpoint", Flag, "there are no callbacks"),
    idle("dataloader_prefetch_factor", One, "rows are tokenized before the first step"),
    idle("dataloader_persistent_workers", Flag, "rows are tokenized before the first step"),
    idle("hub_*", One, "nothing is uploaded"),
    idle("push_to_hub_*", One, "nothing is uploaded"),
    idle("project", One, "output_dir names the run"),
    idle("trackio_space_id", One, "every run writes trainer_log.jsonl"),
    idle("ray_scope", One, "there is no search of hyperparameters"),
    idle("_n_gpu", One, "MPI says how many ranks there are"),
    // hiyouga/LLaMA-Factory
    refused("lora_*", One, NEVER, "of LoRA there are lora_rank, lora_alpha, lora_dropout, lora_target, use_rslora and use_dora"),
    refused("stage", One, &["sft"], "glmddp fine-tunes on answers"),
    refused("template", One, &["chatglm2"], "rows are put into ChatGLM2's own template"),
    refused("dataset", Many, NEVER, "`train_file` names the file of rows"),
    refused("eval_dataset", Many, NEVER, "`validation_file` names the file of held-out rows"),
    refused("val_size", One, &["0"], "`validation_file` names the file of held-out rows"),
    refused("cutoff_len", One, NEVER, "max_source_length and max_target_length say where rows are cut"),
    refused("max_samples", One, NEVER, "its name is max_train_samples"),
    refused("adapter_name_or_path", One, NEVER, "`glmddp checkpoint import` makes an adapter the start of a run"),
    refused("additional_target", Many, NEVER, "what is trained beside the base is the method's own parameters"),
    refused("rope_scaling", One, NEVER, "config.json says how positions are scaled"),
    refused("pure_bf16", Flag, NEVER, "torch_dtype = bfloat16 trains rounded weights, with f32 masters"),
    refused("train_on_prompt", Flag, NEVER, "the loss is over the answer"),
    only("mask_history", Flag, ON, "the loss is over the last answer"),
    refused("neftune_noise_alpha", One, &["0"], "no noise is added to embeddings"),
    idle("dataset_dir", One, "`train_file` names the file of rows"),
    idle("flash_attn", One, "attention never holds the whole table of scores"),
    idle("low_cpu_mem_usage", Flag, "weights are mapped into memory, not copied"),
    idle("upcast_layernorm", Flag, "sums are f32 in any case"),
    idle("neat_packing", Flag, "rows are always packed, and do not see each other"),
    idle("packing", Flag, "rows are always packed, and do not see each other"),
    idle("plot_loss", Flag, "trainer_log.jsonl has the losses"),
];

/// Defaults of the Trainer that are not off, in transformers 4.30 to 4.57: a dump of its arguments has them all.
const DEFAULTS: &[(&str, &[&str])] = &[
    ("log_level", &["passive"]),
    ("log_level_replica", &["warning", "passive"]),
    ("log_on_each_node", ON),
    ("logging_nan_inf_filter", ON),
    ("save_safetensors", ON),
    ("fp16_opt_level", &["O1"]),
    ("half_precision_backend", &["auto"]),
    ("fp16_backend", &["auto"]),
    ("local_rank", &["-1", "0"]),
    ("_n_gpu", &["-1", "0", "1"]),
    ("dataloader_num_workers", &["0"]),
    ("dataloader_pin_memory", ON),
    ("remove_unused_columns", ON),
    ("length_column_name", &["length"]),
    ("skip_memory_metrics", ON),
    ("hub_strategy", &["every_save"]),
    ("hub_token", &["<HUB_TOKEN>"]),
    ("push_to_hub_token", &["<PUSH_TO_HUB_TOKEN>"]),
    ("ray_scope", &["last"]),
    ("ddp_timeout", &["1800"]),
    ("eval_do_concat_batches", ON),
    ("average_tokens_across_devices", ON),
    ("project", &["huggingface"]),
    ("trackio_space_id", &["trackio"]),
    // THUDM/ChatGLM2-6B ptuning/arguments.py
    ("use_fast_tokenizer", ON),
    ("model_revision", &["main"]),
    ("ignore_pad_token_for_loss", ON),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KeyTable;

    /// Such an entry would never be reached: keys of ours are looked up first.
    #[test]
    fn foreign_arguments_are_no_keys_of_ours() {
        let keys = KeyTable::new();
        let ours: Vec<&str> = keys.names().filter(|name| FOREIGN_ARGUMENTS.iter().any(|a| a.name == *name)).collect();
        assert_eq!(ours, [""; 0]);
    }

    #[test]
    fn defaults_are_of_idle_arguments() {
        for (name, _) in DEFAULTS {
            assert_eq!(find(name).map(|argument| argument.verdict), Some(Verdict::Idle), "{name}");
        }
    }

    /// Such an entry would never be reached.
    #[test]
    fn families_stand_behind_their_members() {
        for (i, family) in FOREIGN_ARGUMENTS.iter().enumerate() {
            let Some(prefix) = family.name.strip_suffix('*') else { continue };
            let behind = FOREIGN_ARGUMENTS[i + 1..].iter().find(|argument| argument.name.starts_with(prefix));
            assert!(behind.is_none(), "{} stands before {behind:?}", family.name);
        }
    }
}
