//! `glmddp evaluate`: the held-out loss of a base, with an adapter or alone.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::tuned_args::TunedArgs;
use super::{base_warnings, ranks, report};
use crate::config::values::named;
use crate::data::load::{self, LoadRequest};
use crate::data::prompt::Truncation;
use crate::data::record::{Columns, OnBadRow, PROMPT_COLUMN, RESPONSE_COLUMN};
use crate::data::tokenize::Limits;
use crate::dist::ProcessGroup;
use crate::telemetry::thousands;
use crate::train::adapters::{Ranks, Tokenizer};
use crate::train::evaluate::evaluate;
use crate::train::together::together;

/// Compute the loss on held-out rows, of a base alone or with an adapter; under mpirun, of all ranks together
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct EvaluateArgs {
    /// Held-out rows: JSON lines, a JSON array, or CSV
    #[arg(long, value_name = "FILE")]
    pub validation_file: PathBuf,
    /// Column with the question
    #[arg(long, value_name = "NAME", default_value = PROMPT_COLUMN)]
    pub prompt_column: String,
    /// Column with more of the question, appended on a new line where it is not empty (alpaca's `input`)
    #[arg(long, value_name = "NAME")]
    pub input_column: Option<String>,
    /// Column with the answer
    #[arg(long, value_name = "NAME", default_value = RESPONSE_COLUMN)]
    pub response_column: String,
    /// Column with the earlier rounds, a list of [question, answer]; a row without it has none
    #[arg(long, value_name = "NAME")]
    pub history_column: Option<String>,
    /// Tokens of the prompt, `[gMASK] sop` included
    #[arg(long, value_name = "TOKENS", default_value = "64")]
    pub max_source_length: NonZeroUsize,
    /// Tokens of the answer; eos comes on top
    #[arg(long, value_name = "TOKENS", default_value = "128")]
    pub max_target_length: NonZeroUsize,
    /// Where a prompt that is too long is cut [default: keep_answer_mark]
    #[arg(long, value_name = "HOW", value_parser = named::<Truncation>(&["keep_answer_mark", "published"]))]
    pub truncation: Option<Truncation>,
    /// What a row that cannot be read does [default: stop]
    #[arg(long, value_name = "WHAT", value_parser = named::<OnBadRow>(&["stop", "skip"]))]
    pub on_bad_row: Option<OnBadRow>,
    /// Use the first so many rows only
    #[arg(long, value_name = "ROWS")]
    pub max_eval_samples: Option<NonZeroUsize>,
    /// Rows of a micro-batch
    #[arg(long, value_name = "ROWS", default_value = "4")]
    pub per_device_eval_batch_size: NonZeroUsize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub tuned: TunedArgs,
}

pub fn run(args: &EvaluateArgs) -> anyhow::Result<ExitCode> {
    ranks::run(|tensors| on_rank(args, tensors.group()))
}

fn on_rank(args: &EvaluateArgs, group: &dyn ProcessGroup) -> anyhow::Result<()> {
    let columns = Columns {
        prompt: args.prompt_column.clone(),
        input: args.input_column.clone(),
        response: args.response_column.clone(),
        history: args.history_column.clone(),
    };
    together(group, || Ok(columns.expect_distinct()?))?;
    base_warnings::of_template(&args.tuned.model_name_or_path, group)?;
    let tuned = args.tuned.load(group)?;
    let request = LoadRequest {
        file: args.validation_file.clone(),
        columns,
        limits: Limits {
            max_source_length: args.max_source_length.get(),
            max_target_length: args.max_target_length.get(),
            truncation: args.truncation.unwrap_or(Truncation::KeepAnswerMark),
        },
        on_bad_row: args.on_bad_row.unwrap_or(OnBadRow::Stop),
        max_samples: args.max_eval_samples.map(NonZeroUsize::get),
        cache: None,
    };
    let (data, _) = together(group, || Ok(load::load(&request, &Tokenizer(&tuned.tokenizer), &Ranks(group))?))?;
    let found = evaluate(&tuned.model, tuned.method.as_deref(), group, &data, args.per_device_eval_batch_size)?;
    if group.rank() != 0 {
        return Ok(());
    }
    report::warn(&data.column_use.report(&request.columns, data.file()));
    let text = if args.json {
        let json = json!({
            "eval_loss": found.loss,
            "eval_rows": found.num_rows,
            "eval_target_tokens": found.num_targets,
            "rows_left_out": data.bad_rows.total,
            "prompts_cut": data.num_cut_prompts,
            "answers_cut": data.num_cut_answers,
        });
        format!("{json}\n")
    } else {
        format!(
            "held-out loss {:.4} | {} rows, {} tokens in the loss; {} rows left out, {} prompts and {} answers cut\n",
            found.loss,
            thousands(found.num_rows),
            thousands(found.num_targets),
            data.bad_rows.total,
            data.num_cut_prompts,
            data.num_cut_answers
        )
    };
    report::print(&text)?;
    Ok(())
}
