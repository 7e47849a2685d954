//! Arguments of THUDM's scripts and the Hugging Face Trainer that are not keys of ours.
//!
//! Scripts that people have should run as they are: what has no meaning here is accepted with a line that says why. What would give
//! other results than asked for is refused.

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
    /// Accepted with a warning that gives the reason.
    Idle,
    /// Accepted if it asks for one of these, which happens anyway; refused otherwise.
    RefusedUnless(&'static [&'static str]),
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
    /// Whether `value` may be passed over; a bare flag has the value `true`.
    pub fn accepts(&self, value: &str) -> bool {
        match self.verdict {
            Verdict::Idle => true,
            Verdict::RefusedUnless(harmless) => harmless.iter().any(|h| h.eq_ignore_ascii_case(value)),
        }
    }
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

use Arity::{Flag, Many, One};

const OFF: &[&str] = &["false"];
const ON: &[&str] = &["true"];
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
    refused("source_prefix", One, &[""], "nothing is put before the prompt"),
    refused("val_max_target_length", One, NEVER, "held-out answers are cut at max_target_length"),
    // transformers Seq2SeqTrainingArguments
    idle("do_train", Flag, "the sub-command says so"),
    idle("do_eval", Flag, "validation_file turns evaluation on"),
    refused("do_predict", Flag, OFF, "`glmddp generate` answers the rows of a file"),
    refused("fp16", Flag, OFF, "CPU runs compute in f32"),
    refused("bf16", Flag, OFF, "CPU runs compute in f32; torch_dtype = bfloat16 trains rounded weights with f32 masters"),
    refused("fp16_full_eval", Flag, OFF, "CPU runs compute in f32"),
    refused("bf16_full_eval", Flag, OFF, "CPU runs compute in f32"),
    idle("fp16_opt_level", One, "it goes with fp16"),
    idle("half_precision_backend", One, "it goes with fp16"),
    idle("tf32", Flag, "it goes with CUDA"),
    refused("optim", One, &["adamw_torch", "adamw_hf", "adamw_torch_fused"], "the optimizer is AdamW"),
    refused("adafactor", Flag, OFF, "the optimizer is AdamW"),
    refused("label_smoothing_factor", One, &["0", "0.0"], "the loss is plain cross-entropy"),
    refused("group_by_length", Flag, OFF, "rows come in shuffled order"),
    refused("data_seed", One, NEVER, "`seed` covers the order of the rows too"),
    refused("ignore_data_skip", Flag, OFF, "a resumed run goes on with the row after the last one"),
    refused("load_best_model_at_end", Flag, OFF, "the last adapter is exported; save_best keeps the best checkpoint, which has its own"),
    refused("metric_for_best_model", One, NEVER, "the last adapter is kept"),
    refused("greater_is_better", One, NEVER, "the last adapter is kept"),
    refused("early_stopping*", One, NEVER, "a run ends at its last step"),
    refused("deepspeed", One, NEVER, "glmddp is data-parallel by itself; start it with mpirun"),
    refused("fsdp*", Many, NEVER, "glmddp is data-parallel by itself; start it with mpirun"),
    refused("per_gpu_train_batch_size", One, NEVER, "its name is per_device_train_batch_size"),
    refused("per_gpu_eval_batch_size", One, NEVER, "its name is per_device_eval_batch_size"),
    refused("evaluation_strategy", One, &["steps", "no"], "eval_steps says when to evaluate"),
    refused("eval_strategy", One, &["steps", "no"], "eval_steps says when to evaluate"),
    refused("save_strategy", One, &["steps"], "save_steps says when to save"),
    refused("logging_strategy", One, &["steps"], "logging_steps says when to log"),
    refused("push_to_hub", Flag, OFF, "nothing is uploaded"),
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
    idle("no_cuda", Flag, "the device follows from the build"),
    idle("use_cpu", Flag, "the device follows from the build"),
    idle("torch_compile*", One, "there is no PyTorch"),
    idle("skip_memory_metrics", Flag, "the step line shows memory always"),
    // hiyouga/LLaMA-Factory
    refused("lora_*", One, NEVER, "of LoRA there are lora_rank, lora_alpha, lora_dropout, lora_target, use_rslora and use_dora"),
    refused("train_on_prompt", Flag, OFF, "the loss is over the answer"),
    refused("mask_history", Flag, ON, "the loss is over the last answer"),
    refused("neftune_noise_alpha", One, &["0", "0.0"], "no noise is added to embeddings"),
    idle("packing", Flag, "rows are always packed, and do not see each other"),
    idle("plot_loss", Flag, "trainer_log.jsonl has the losses"),
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
}
