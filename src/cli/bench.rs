//! `glmddp bench`: what a training step costs, counted and timed.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use super::bench_checkpoint::{self, CheckpointArgs};
use super::{environment, report};
use crate::bench::flops::{self, Flops};
use crate::bench::setup::{BenchSetup, describe};
use crate::bench::step::{self, StepTimes};
use crate::dist;
use crate::model::Recompute;
use crate::peft::keys::{MethodKeys, named};
use crate::peft::{FinetuningType, METHOD_NAMES, MethodPlan};
use crate::telemetry::thousands;

/// Measure a training step on a random model and real or demo rows, or checkpoints
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Clone, Debug, Subcommand)]
pub enum What {
    /// Count the operations of a step's matrix products against what the arithmetic needs
    Flops(FlopsArgs),
    /// Time steps; under mpirun, of all ranks together
    Step(StepArgs),
    /// Time 1 rank against several, each with the same work and threads
    Scaling(ScalingArgs),
    /// Time saving and loading of states, or compress a checkpoint in several ways
    Checkpoint(CheckpointArgs),
}

/// Sizes; the defaults are a model that fits a CPU, with ChatGLM2's vocabulary and proportions.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case", next_help_heading = "Sizes")]
pub struct SizeArgs {
    #[arg(long, default_value = "8")]
    pub layers: NonZeroUsize,
    #[arg(long, default_value = "512")]
    pub hidden: NonZeroUsize,
    #[arg(long, default_value = "1368")]
    pub ffn: NonZeroUsize,
    #[arg(long, default_value = "8")]
    pub heads: NonZeroUsize,
    #[arg(long, default_value = "2")]
    pub groups: NonZeroUsize,
    #[arg(long, default_value = "64")]
    pub kv: NonZeroUsize,
    #[arg(long, default_value = "65024")]
    pub vocab: NonZeroUsize,
    /// Tuning method, with its defaults but for dropout of LoRA: none
    #[arg(long, default_value = "ptuning_v2", value_parser = named::<FinetuningType>(METHOD_NAMES))]
    pub method: FinetuningType,
    /// Virtual tokens of a prefix
    #[arg(long, default_value = "128")]
    pub pre_seq_len: NonZeroUsize,
    /// LoRA of this rank on query_key_value, alpha 16
    #[arg(long, value_name = "RANK", conflicts_with = "method")]
    pub lora: Option<NonZeroUsize>,
    /// Rows of a micro-batch
    #[arg(long, default_value = "4")]
    pub rows: NonZeroUsize,
    /// Longest row (tokens): prompt 64, answer the rest
    #[arg(long, default_value = "192")]
    pub seq: NonZeroUsize,
    /// Run each block's forward again in the backward pass
    #[arg(long)]
    pub recompute: bool,
    /// tokenizer.model [default: a small one of our own]
    #[arg(long, value_name = "FILE", requires = "train_file")]
    pub tokenizer: Option<PathBuf>,
    /// Rows with the columns content and summary [default: demo rows]
    #[arg(long, value_name = "FILE", requires = "tokenizer")]
    pub train_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct FlopsArgs {
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct StepArgs {
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Micro-batches of a step, dealt to the ranks [default: one a rank]
    #[arg(long)]
    pub slots: Option<NonZeroUsize>,
    /// Steps to measure
    #[arg(long, default_value = "8")]
    pub steps: NonZeroUsize,
    /// Steps before that
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Threads of each rank [default: cores of the machine / ranks on it]
    #[arg(long)]
    pub threads: Option<NonZeroUsize>,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct ScalingArgs {
    #[command(flatten)]
    pub step: StepArgs,
    /// Number of ranks to compare with one
    #[arg(long, default_value = "2")]
    pub ranks: NonZeroUsize,
    /// Runs of each, in alternation
    #[arg(long, default_value = "5")]
    pub runs: NonZeroUsize,
    /// Micro-batches of a rank and step
    #[arg(long, default_value = "2")]
    pub slots_per_rank: NonZeroUsize,
    /// Command that starts ranks; `-n N` is added
    #[arg(long, default_value = "mpirun --bind-to none")]
    pub launcher: String,
}

impl SizeArgs {
    fn method(&self) -> anyhow::Result<MethodPlan> {
        let kind = if self.lora.is_some() { FinetuningType::Lora } else { self.method };
        let reads = |key: &str| kind.keys().contains(&key);
        let keys = MethodKeys {
            pre_seq_len: reads("pre_seq_len").then_some(self.pre_seq_len.get()),
            lora_rank: self.lora.map(NonZeroUsize::get),
            lora_alpha: self.lora.map(|_| 16.0),
            lora_dropout: reads("lora_dropout").then_some(0.0),
            ..MethodKeys::default()
        };
        MethodPlan::resolve(kind, &keys).map_err(|e| anyhow::anyhow!("`{}` is {}, expected {}", e.key, e.found, e.expected))
    }

    fn setup(&self, slots: NonZeroUsize) -> anyhow::Result<BenchSetup> {
        Ok(BenchSetup {
            layers: self.layers.get(),
            hidden: self.hidden.get(),
            ffn: self.ffn.get(),
            heads: self.heads.get(),
            groups: self.groups.get(),
            kv: self.kv.get(),
            vocab: self.vocab.get(),
            method: self.method()?,
            rows: self.rows,
            slots,
            recompute: if self.recompute { Recompute::Block } else { Recompute::None },
            tokenizer: self.tokenizer.clone(),
            train_file: self.train_file.clone(),
            seq: self.seq.get(),
        })
    }
}

pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.what {
        What::Flops(args) => count(args),
        What::Step(args) => time(args),
        What::Scaling(args) => scale(args),
        What::Checkpoint(args) => bench_checkpoint::run(args),
    }
}

fn count(args: &FlopsArgs) -> anyhow::Result<()> {
    let mut setup = args.sizes.setup(NonZeroUsize::MIN)?;
    let mut reports = Vec::new();
    for recompute in [Recompute::None, Recompute::Block] {
        setup.recompute = recompute;
        reports.push((recompute, flops::count(&setup)?));
    }
    let text = if args.json {
        let rows: Vec<_> =
            reports.iter().map(|(recompute, f)| serde_json::json!({ "recompute": recompute, "flops": f, "ratio": f.ratio() })).collect();
        format!("{}\n", serde_json::json!({ "sizes": describe(&setup), "runs": rows }))
    } else {
        reports.iter().map(|(recompute, f)| flops_lines(*recompute, f)).collect()
    };
    report::print(&text)?;
    Ok(())
}

fn flops_lines(recompute: Recompute, f: &Flops) -> String {
    let (name, n) = if recompute == Recompute::Block { ("block", "6N") } else { ("none", "4N") };
    format!(
        "recompute {name}: counted {} FLOPs for {} tokens, {} in the loss\n\
         {:>18} ideal {} ({n} + attention), counted / ideal {:.4}\n\
         {:>18} gradients of all weights are {} of a step that trains them\n",
        thousands(f.counted),
        f.tokens,
        f.target_tokens,
        "",
        thousands(f.ideal),
        f.ratio(),
        "",
        thousands(f.weight_gradients),
    )
}

fn time(args: &StepArgs) -> anyhow::Result<()> {
    let tensors = dist::connect(&environment::variable)?;
    let group = tensors.group();
    dist::install_panic_hook(group);
    let threads = dist::plan_threads(group, args.threads)?;
    dist::install_thread_pool(threads.count)?;
    let slots = args.slots.unwrap_or(NonZeroUsize::new(group.world_size()).unwrap_or(NonZeroUsize::MIN));
    let result = step::run(&args.sizes.setup(slots)?, &*tensors, args.warmup, args.steps.get());
    let times = match result {
        Ok(times) => times,
        Err(error) if group.world_size() > 1 => group.abort(&error.to_string()),
        Err(error) => return Err(error.into()),
    };
    if group.rank() == 0 {
        let text = if args.json { format!("{}\n", serde_json::to_string(&times)?) } else { times_line(&times) };
        report::print(&text)?;
    }
    tensors.finish();
    Ok(())
}

fn times_line(t: &StepTimes) -> String {
    format!(
        "{} rank(s) x {} thread(s): {:.1} ms a step (median; {:.1} to {:.1}), {:.1} real tokens/s\n\
         data {:.1} ms, forward+backward {:.1}, communication {:.1}, optimizer {:.1}; peak {} MiB a rank; loss {:.4} -> {:.4}\n",
        t.world_size,
        t.threads,
        t.ms_step_median,
        t.ms_step_min,
        t.ms_step_max,
        t.real_tokens_s,
        t.phases.data,
        t.phases.forward_backward,
        t.phases.comm,
        t.phases.optim,
        t.peak_rss_mib,
        t.first_loss,
        t.last_loss,
    )
}

/// Starts this program's `bench step` under the launcher, one rank and several in turn, and compares the medians.
fn scale(args: &ScalingArgs) -> anyhow::Result<()> {
    let mut runs: [Vec<StepTimes>; 2] = Default::default();
    for _ in 0..args.runs.get() {
        for (runs, ranks) in runs.iter_mut().zip([1, args.ranks.get()]) {
            runs.push(launch(args, ranks)?);
        }
    }
    let [one, many] = runs.map(median);
    let per_rank = args.ranks.get() as f64;
    let efficiency = many.real_tokens_s / (per_rank * one.real_tokens_s);
    let text = if args.step.json {
        format!("{}\n", serde_json::json!({ "one": one, "many": many, "ranks": args.ranks, "runs": args.runs, "efficiency": efficiency }))
    } else {
        format!(
            "{}{}efficiency {efficiency:.3} = {:.1} / ({per_rank} x {:.1}) real tokens/s; medians of {} runs each, in alternation\n",
            times_line(&one),
            times_line(&many),
            many.real_tokens_s,
            one.real_tokens_s,
            args.runs,
        )
    };
    report::print(&text)?;
    Ok(())
}

fn median(mut runs: Vec<StepTimes>) -> StepTimes {
    runs.sort_by(|a, b| a.real_tokens_s.total_cmp(&b.real_tokens_s));
    runs.swap_remove(runs.len() / 2)
}

fn launch(args: &ScalingArgs, ranks: usize) -> anyhow::Result<StepTimes> {
    let mut words = args.launcher.split_whitespace();
    let Some(program) = words.next() else { bail!("--launcher is empty: give a command such as mpirun") };
    let program_of_ranks = std::env::current_exe().context("while looking for this program")?;
    let (s, threads) = (&args.step, args.step.threads.unwrap_or(NonZeroUsize::MIN));
    let mut command = Command::new(program);
    command.args(words).args(["-n", &ranks.to_string()]).arg(program_of_ranks).args(["bench", "step", "--json"]);
    let z = &s.sizes;
    let numbers = [
        ("layers", z.layers.get()),
        ("hidden", z.hidden.get()),
        ("ffn", z.ffn.get()),
        ("heads", z.heads.get()),
        ("groups", z.groups.get()),
        ("kv", z.kv.get()),
        ("vocab", z.vocab.get()),
        ("pre_seq_len", z.pre_seq_len.get()),
        ("rows", z.rows.get()),
        ("seq", z.seq.get()),
        ("steps", s.steps.get()),
        ("warmup", s.warmup),
        ("threads", threads.get()),
        ("slots", ranks * args.slots_per_rank.get()),
    ];
    for (name, value) in numbers {
        command.arg(format!("--{name}={value}"));
    }
    match z.lora {
        Some(rank) => command.arg(format!("--lora={rank}")),
        None => command.arg(format!("--method={}", z.method.name())),
    };
    if z.recompute {
        command.arg("--recompute");
    }
    for (name, path) in [("tokenizer", &z.tokenizer), ("train_file", &z.train_file)] {
        if let Some(path) = path {
            command.arg(format!("--{name}")).arg(path);
        }
    }
    let out = command.output().with_context(|| format!("while starting `{program}`"))?;
    if !out.status.success() {
        bail!("`{program} -n {ranks}` failed ({}): {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    serde_json::from_slice(&out.stdout).with_context(|| format!("while reading what `{program} -n {ranks}` printed"))
}
