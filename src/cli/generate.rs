//! `glmddp generate`: what a model answers, with an adapter or alone.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::tuned_args::TunedArgs;
use super::{base_warnings, report};
use crate::config::values::named;
use crate::data::column_use::ColumnUse;
use crate::data::prompt::Truncation;
use crate::data::record::{Columns, OnBadRow, PROMPT_COLUMN, RESPONSE_COLUMN, Row};
use crate::data::rows::Rows;
use crate::data::tokenize::{Limits, SampleMaker};
use crate::data::{BadRows, DataError, Example, RowOrigin};
use crate::dist::Solo;
use crate::model::generate::greedy;
use crate::train::TrainError;
use crate::train::adapters::Tokenizer;
use crate::train::tuned::Tuned;

/// Answer a prompt or the rows of a file, greedily: at each place the likeliest token
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct GenerateArgs {
    /// The question; it is put into the model's template as in training
    #[arg(long, value_name = "TEXT", required_unless_present = "file", conflicts_with = "file")]
    pub prompt: Option<String>,
    /// Rows with questions: JSON lines, a JSON array, or CSV
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Column with the question
    #[arg(long, value_name = "NAME", default_value = PROMPT_COLUMN)]
    pub prompt_column: String,
    /// Column with more of the question, appended on a new line where it is not empty (alpaca's `input`)
    #[arg(long, value_name = "NAME", requires = "file")]
    pub input_column: Option<String>,
    /// Column with the answer that is expected, to be printed beside the model's
    #[arg(long, value_name = "NAME", requires = "file")]
    pub response_column: Option<String>,
    /// Column with the earlier rounds, a list of [question, answer]; a row without it has none
    #[arg(long, value_name = "NAME", requires = "file")]
    pub history_column: Option<String>,
    /// What a row that cannot be read does [default: stop]
    #[arg(long, value_name = "WHAT", requires = "file", value_parser = named::<OnBadRow>(&["stop", "skip"]))]
    pub on_bad_row: Option<OnBadRow>,
    /// Answer the first so many rows only
    #[arg(long, value_name = "ROWS", requires = "file")]
    pub rows: Option<NonZeroUsize>,
    /// Cut prompts to so many tokens, `[gMASK] sop` included, inside the user's text [default: no cut]
    #[arg(long, value_name = "TOKENS")]
    pub max_source_length: Option<NonZeroUsize>,
    /// End an answer after so many tokens
    #[arg(long, value_name = "TOKENS", default_value = "128")]
    pub max_new_tokens: NonZeroUsize,
    /// Print JSON, one line an answer
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub tuned: TunedArgs,
}

pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    // Faults of the rows are found before the model is loaded.
    let examples = examples(args)?;
    base_warnings::of_template(&args.tuned.model_name_or_path, &Solo)?;
    let tuned = args.tuned.load(&Solo)?;
    for example in &examples {
        let row = || match (&args.file, &example.origin) {
            (Some(_), RowOrigin { file, row }) => format!("while answering {}:{row}", file.display()),
            (None, _) => "while answering the prompt".to_owned(),
        };
        let answer = answer(args, &tuned, example).with_context(row)?;
        report::print(&if args.json { as_json(args, example, &answer) } else { as_text(args, example, &answer) })?;
    }
    Ok(())
}

/// What is to be answered, in order.
fn examples(args: &GenerateArgs) -> Result<Vec<Example>, DataError> {
    let Some(file) = &args.file else {
        let origin = RowOrigin { file: Path::new("--prompt").into(), row: 1 };
        let prompt = args.prompt.clone().unwrap_or_default();
        return Ok(vec![Example { prompt, response: String::new(), history: Vec::new(), origin }]);
    };
    let (prompt, input, history) = (args.prompt_column.clone(), args.input_column.clone(), args.history_column.clone());
    let mut columns = Columns { prompt, input, response: args.response_column.clone().unwrap_or_default(), history };
    columns.expect_distinct()?;
    if args.response_column.is_none() {
        // A row needs an answer's column to be read: the question's stands in and is not looked at.
        columns.response.clone_from(&columns.prompt);
    }
    let mut rows = Rows::open(file, &columns)?;
    let wanted = args.rows.map_or(usize::MAX, NonZeroUsize::get);
    let (mut examples, mut column_use, mut bad_rows) = (Vec::new(), ColumnUse::default(), BadRows::default());
    while examples.len() < wanted
        && let Some(row) = rows.next()
    {
        match row {
            Ok(Row { example, beside }) => {
                examples.push(example);
                column_use.push(&beside);
            }
            Err(DataError::BadRow(error)) if args.on_bad_row == Some(OnBadRow::Skip) => bad_rows.push(*error),
            Err(error) => return Err(error),
        }
    }
    if examples.is_empty() {
        return Err(rows.without_good(bad_rows.total, bad_rows));
    }
    column_use.check(&columns, file)?;
    if args.response_column.is_none() {
        // The answers of a file of training rows, which nobody asked to see.
        column_use.forget(RESPONSE_COLUMN);
    }
    let mut warnings = column_use.report(&columns, file);
    if bad_rows.total > 0 {
        warnings.push(format!("left out: {bad_rows}"));
    }
    report::warn(&warnings);
    Ok(examples)
}

struct Answer {
    text: String,
    num_tokens: usize,
    /// It came to its own end.
    is_whole: bool,
}

fn answer(args: &GenerateArgs, tuned: &Tuned, example: &Example) -> Result<Answer, TrainError> {
    let limits = Limits {
        max_source_length: args.max_source_length.map_or(usize::MAX, NonZeroUsize::get),
        max_target_length: args.max_new_tokens.get(),
        truncation: Truncation::KeepAnswerMark,
    };
    let tokenizer = Tokenizer(&tuned.tokenizer);
    let (prompt, _) = SampleMaker::new(&tokenizer, limits)?
        .prompt(&example.prompt, &example.history)
        .map_err(|message| DataError::Template { message })?;
    let eos = tuned.tokenizer.eos();
    let max = args.max_new_tokens.get();
    let mut ids = tuned.with_hooks(prompt.len(), |hooks| greedy(&tuned.model, hooks, &prompt, max, Some(eos)))?.ids;
    let is_whole = ids.pop_if(|id| *id == eos).is_some();
    Ok(Answer { text: tuned.tokenizer.decode(&ids), num_tokens: ids.len(), is_whole })
}

fn as_json(args: &GenerateArgs, example: &Example, answer: &Answer) -> String {
    let mut json = json!({
        "prompt": example.prompt,
        "answer": answer.text,
        "answer_tokens": answer.num_tokens,
        "stopped": if answer.is_whole { "eos" } else { "max_new_tokens" },
    });
    if args.file.is_some() {
        json["row"] = example.origin.row.into();
    }
    if args.response_column.is_some() {
        json["expected"] = example.response.as_str().into();
    }
    format!("{json}\n")
}

/// The answer alone to a prompt; of a row also where it is from, the question, and what was expected.
fn as_text(args: &GenerateArgs, example: &Example, answer: &Answer) -> String {
    if args.file.is_none() {
        return format!("{}\n", answer.text);
    }
    let expected = if args.response_column.is_some() { format!("expected: {}\n", example.response) } else { String::new() };
    let RowOrigin { file, row } = &example.origin;
    format!("{}:{row}\nprompt:   {}\n{expected}answer:   {}\n\n", file.display(), example.prompt, answer.text)
}
