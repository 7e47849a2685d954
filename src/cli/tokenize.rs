//! `glmddp tokenize`: rows as the model sees them, and what of them is in the loss.

use clap::Args;

use super::run_args::RunArgs;
use super::{base_warnings, report};
use crate::data::tokenize::render;
use crate::data::{Alone, load};
use crate::dist::Solo;
use crate::tokenizer::GlmTokenizer;
use crate::train::adapters::Tokenizer;
use crate::train::base::load_request;

/// Show training rows as tokens: ids, text, and what is in the loss
#[derive(Clone, Debug, Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Line of the file (or element of its array) to show
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Tokenize")]
    pub row: usize,
    /// Rows to show from there on
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Tokenize")]
    pub count: usize,
}

pub fn run(args: &TokenizeArgs) -> anyhow::Result<()> {
    let plan = args.run.load()?.resolve(1)?;
    base_warnings::of_template(&plan.model.model_name_or_path, &Solo)?;
    let tokenizer = GlmTokenizer::from_file(&plan.model.model_name_or_path.join("tokenizer.model"))?;
    let (data, _) = load::load(&load_request(&plan, &plan.data.train_file, plan.data.max_train_samples), &Tokenizer(&tokenizer), &Alone)?;
    report::warn(&data.column_use.report(&plan.data.columns(), data.file()));
    let shown: Vec<usize> = (0..data.num_samples()).filter(|&i| data.origin(i).row >= args.row).take(args.count).collect();
    let mut text = String::new();
    for i in &shown {
        text.push_str(&format!("{}:{}\n", data.file().display(), data.origin(*i).row));
        text.push_str(&render(data.sample(*i), |ids| ids.iter().map(|&id| tokenizer.piece(id).unwrap_or("?")).collect()));
    }
    let lengths = data.length_stats().map_or(String::new(), |l| {
        format!("; tokens a row: {} to {}, mean {:.1}, median {}, 95 % below {}", l.min, l.max, l.mean, l.median, l.p95)
    });
    text.push_str(&format!(
        "{} rows, {} left out{lengths}; {} of {} tokens in the loss; {} prompts and {} answers cut\n",
        data.num_samples(),
        data.bad_rows.total,
        data.num_targets(),
        data.num_tokens(),
        data.num_cut_prompts,
        data.num_cut_answers,
    ));
    report::print(&text)?;
    Ok(())
}
