//! `glmddp init-model`: a ChatGLM2 with random weights, as the hub lays out its files.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::report;
use crate::data::demo::{self, DemoKind};
use crate::model::init::{self, InitOptions};
use crate::paths;
use crate::telemetry::{bytes as bytes_text, thousands};
use crate::tokenizer::{GlmTokenizer, TokenizerError, train_filled, train_small};

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
    /// A tokenizer.model to use; the vocabulary of tiny and small follows from it, that of 6b is 65024 [default: one trained on demo rows]
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

impl Preset {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl From<Preset> for init::Preset {
    fn from(preset: Preset) -> Self {
        match preset {
            Preset::Tiny => Self::Tiny,
            Preset::Small => Self::Small,
            Preset::SixB => Self::SixB,
        }
    }
}

/// Rows that the small tokenizer is trained on, and how many pieces it learns at most.
const CORPUS_ROWS: usize = 2000;
const PIECES: usize = 1000;
/// Pieces of the published tokenizer, so that the special ids of the `6b` preset are the published ones.
const PUBLISHED_PIECES: usize = 64_789;

pub fn run(args: &InitModelArgs) -> anyhow::Result<()> {
    if let Some(path) = &args.tokenizer {
        paths::expect_file(path)?;
    }
    let preset = init::Preset::from(args.preset);
    let (bytes, path) = match &args.tokenizer {
        Some(path) => (std::fs::read(path).with_context(|| format!("while reading {}", path.display()))?, path.as_path()),
        None => (own_tokenizer(preset), Path::new("tokenizer.model")),
    };
    let tokenizer = GlmTokenizer::from_bytes(&bytes, path)?;
    if let Some(rows) = preset.vocabulary() {
        let (ids, fitting) = (tokenizer.vocab_size(), GlmTokenizer::fitting_ids(rows));
        if !fitting.contains(&ids) {
            return Err(TokenizerError::OtherPreset { path: path.to_owned(), ids, preset: args.preset.name(), fitting }.into());
        }
    }
    let options = InitOptions { preset, num_layers: args.num_layers.map(|n| n.get()), seed: args.seed };
    let made = init::init_model(&args.output_dir, options, &bytes, tokenizer.vocab_size())?;
    let text = format!(
        "{}: {} layers, hidden {}, vocabulary {}; {} parameters, {} in {} safetensors file(s)\n",
        args.output_dir.display(),
        made.config.num_layers,
        made.config.hidden_size,
        made.config.padded_vocab_size,
        thousands(made.num_parameters),
        bytes_text(made.num_weight_bytes),
        made.num_shards,
    );
    report::print(&text)?;
    Ok(())
}

/// The `tokenizer.model` of a preset: learnt from demo rows, so that nothing foreign is shipped.
pub fn own_tokenizer(preset: init::Preset) -> Vec<u8> {
    let mut corpus = vec!["[Round 1]\n\n问：\n\n答：".to_owned()];
    corpus.extend(demo::demo_rows(DemoKind::Advert, CORPUS_ROWS, 0).into_iter().flat_map(|(content, summary)| [content, summary]));
    match preset.vocabulary() {
        None => train_small(&corpus, PIECES),
        Some(_) => train_filled(&corpus, PIECES, PUBLISHED_PIECES),
    }
}
