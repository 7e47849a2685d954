//! `glmddp init-model`: a ChatGLM2 with random weights, as the hub lays out its files.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::report;
use super::text::{bytes, thousands};
use crate::data::demo::{self, DemoKind};
use crate::model::init::{self, InitOptions};
use crate::tokenizer::{GlmTokenizer, train_small};

/// Make a ChatGLM2 with random weights: config.json, safetensors, tokenizer.model
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct InitModelArgs {
    /// Size of the model
    #[arg(long, value_enum)]
    pub preset: Preset,
    /// Folder to make
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Another number of layers than the preset's
    #[arg(long, value_name = "N")]
    pub num_layers: Option<std::num::NonZeroUsize>,
    /// A tokenizer.model to use [default: a small one trained on demo rows]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// 2 layers of width 64: for tests
    Tiny,
    /// 8 layers of width 256: trains on two CPU cores while one watches
    Small,
    /// The published model's shape in f16: 12.5 GB
    #[value(name = "6b")]
    SixB,
}

/// Rows that the small tokenizer is trained on, and how many pieces it gets.
const CORPUS_ROWS: usize = 2000;
const PIECES: usize = 1000;

pub fn run(args: &InitModelArgs) -> anyhow::Result<()> {
    let (tokenizer, path) = match &args.tokenizer {
        Some(path) => (std::fs::read(path).with_context(|| format!("while reading {}", path.display()))?, path.as_path()),
        None => (small_tokenizer(), Path::new("tokenizer.model")),
    };
    let num_pieces = GlmTokenizer::from_bytes(&tokenizer, path)?.num_pieces();
    let preset = match args.preset {
        Preset::Tiny => init::Preset::Tiny,
        Preset::Small => init::Preset::Small,
        Preset::SixB => init::Preset::SixB,
    };
    let options = InitOptions { preset, num_layers: args.num_layers.map(|n| n.get()), seed: args.seed };
    let made = init::init_model(&args.output_dir, options, &tokenizer, num_pieces)?;
    let text = format!(
        "{}: {} layers, hidden {}, vocabulary {}; {} parameters, {} in {} safetensors file(s)\n",
        args.output_dir.display(),
        made.config.num_layers,
        made.config.hidden_size,
        made.config.padded_vocab_size,
        thousands(made.num_parameters),
        bytes(made.num_weight_bytes),
        made.num_shards,
    );
    report::print(&text)?;
    Ok(())
}

/// A tokenizer of our own: nothing foreign is shipped.
fn small_tokenizer() -> Vec<u8> {
    let mut corpus = vec!["[Round 1]\n\n问：\n\n答：".to_owned()];
    corpus.extend(demo::demo_rows(DemoKind::Advert, CORPUS_ROWS, 0).into_iter().flat_map(|(content, summary)| [content, summary]));
    train_small(&corpus, PIECES)
}
