//! `glmddp kernels`: the kernels of a GPU held against the CPU's code, and timed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::json;

use super::report;
use crate::bench::kernels::{self, Report, Shape, Timed, Work};
use crate::bench::traffic::{self, Traffic};
use crate::kernels::check::{cases, products};
use crate::kernels::cuda;

/// Of ChatGLM2-6B.
const NUM_LAYERS: usize = 28;

#[derive(Clone, Debug, Args)]
pub struct KernelsArgs {
    #[command(subcommand)]
    pub command: Command,
}

/// Check and time the kernels of a GPU
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    Check(CheckArgs),
    Bench(BenchArgs),
    Report(ReportArgs),
    Traffic(TrafficArgs),
}

/// Hold every kernel against the CPU's code at many sizes, and its results against those of its other runs
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct CheckArgs {
    /// Which GPU, of those that this process sees
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Runs of each case; all must give the same bits
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// Cases whose file and name contain this alone
    #[arg(long, default_value = "")]
    pub only: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Time every kernel at the shapes of ChatGLM2-6B
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct BenchArgs {
    /// Which GPU, of those that this process sees
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A table of what `bench --json` gave, beside PyTorch's times
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct ReportArgs {
    /// What `glmddp kernels bench --json` printed
    pub bench: PathBuf,
    /// What `scripts/kernels_torch.py` printed
    #[arg(long)]
    pub torch: Option<PathBuf>,
}

/// Add up the bytes that the kernels of a step of ChatGLM2-6B move; needs no GPU
#[derive(Clone, Debug, Args)]
pub struct TrafficArgs {}

pub fn run(args: &KernelsArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Check(args) => check(args),
        Command::Bench(args) => bench(args).map(|()| ExitCode::SUCCESS),
        Command::Report(args) => table(args).map(|()| ExitCode::SUCCESS),
        Command::Traffic(TrafficArgs {}) => {
            report::print(&traffic_text(&traffic::step(&Shape::CHATGLM2_6B, NUM_LAYERS)))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let gpu = cuda::open(args.gpu)?;
    let mut by_file: BTreeMap<&str, (usize, Vec<String>)> = BTreeMap::new();
    let all = cases().into_iter().chain(products::cases());
    for case in all.filter(|case| format!("{} {}", case.file, case.name).contains(&args.only)) {
        let (num, failures) = by_file.entry(case.file).or_default();
        *num += 1;
        let mut first = None;
        for run in 1..=args.repeat {
            let result = case.run_on(&*gpu);
            gpu.free_all();
            let problem = match (result, &first) {
                (Err(error), _) => error.to_string(),
                (Ok(hash), None) => {
                    first = Some(hash);
                    continue;
                }
                (Ok(hash), Some(first)) if hash == *first => continue,
                (Ok(_), Some(_)) => "other bits than in the first run".to_owned(),
            };
            failures.push(format!("{}, run {run}: {problem}", case.name));
            break;
        }
    }
    let num_failed: usize = by_file.values().map(|(_, failures)| failures.len()).sum();
    let mut text = format!("{}; {} runs of each case\n", gpu.describe(), args.repeat);
    for (file, (num, failures)) in &by_file {
        let _ = writeln!(text, "{file:<16} {:>4} of {num:>4} cases equal the CPU's code", num - failures.len());
        failures.iter().for_each(|failure| text.push_str(&format!("    FAILED {failure}\n")));
    }
    if args.json {
        let files: BTreeMap<_, _> =
            by_file.iter().map(|(file, (num, failures))| (file, json!({ "cases": num, "failures": failures }))).collect();
        text = format!("{}\n", json!({ "gpu": gpu.describe(), "repeat": args.repeat, "files": files }));
    }
    report::print(&text)?;
    Ok(if num_failed == 0 && !by_file.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let gpu = cuda::open(args.gpu)?;
    let times = kernels::run(&*gpu, &Shape::CHATGLM2_6B)?;
    report::print(&if args.json { format!("{}\n", serde_json::to_string_pretty(&times)?) } else { text(&times, None) })?;
    Ok(())
}

/// What `scripts/kernels_torch.py` prints.
#[derive(Deserialize)]
struct TorchTimes {
    about: BTreeMap<String, serde_json::Value>,
    median_ms: BTreeMap<String, f64>,
    failed: BTreeMap<String, String>,
}

fn table(args: &ReportArgs) -> anyhow::Result<()> {
    fn read<T: for<'de> Deserialize<'de>>(path: &PathBuf) -> anyhow::Result<T> {
        let bytes = std::fs::read(path).with_context(|| format!("while reading {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("while reading {}", path.display()))
    }
    let torch = args.torch.as_ref().map(read::<TorchTimes>).transpose()?;
    report::print(&text(&read::<Report>(&args.bench)?, torch.as_ref()))?;
    Ok(())
}

/// A Markdown table.
fn text(times: &Report, torch: Option<&TorchTimes>) -> String {
    let Report { gpu, copy_gb_s, product_tflop_s, kernels } = times;
    let mut text = format!(
        "{gpu}. Measured there: a copy of 1 GiB {copy_gb_s:.0} GB/s (read and written), a product of 8192 x 8192 bf16 {product_tflop_s:.0} TFLOP/s.\n\n\
         | kernel | median, ms | speed | of what was measured | PyTorch, ms | PyTorch / glmddp |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
    );
    for kernel in kernels {
        let Timed { name, median_ms, work } = kernel;
        let (unit, of) = match work {
            Work::Bytes(_) => ("GB/s", copy_gb_s),
            Work::Flops(_) => ("TFLOP/s", product_tflop_s),
        };
        let torch_ms = torch.and_then(|torch| torch.median_ms.get(name));
        let (theirs, ratio) =
            torch_ms.map_or(("-".to_owned(), "-".to_owned()), |ms| (format!("{ms:.4}"), format!("{:.2}", ms / median_ms)));
        let speed = kernel.speed();
        let _ = writeln!(text, "| {name} | {median_ms:.4} | {speed:.0} {unit} | {:.0} % | {theirs} | {ratio} |", 100.0 * speed / of);
    }
    if let Some(torch) = torch {
        let about: Vec<String> =
            torch.about.iter().map(|(key, value)| format!("{key} {}", value.as_str().map_or(value.to_string(), str::to_owned))).collect();
        let _ = writeln!(text, "\nPyTorch: {}.", about.join(", "));
        torch.failed.iter().for_each(|(group, error)| text.push_str(&format!("PyTorch's {group} was not run: {error}\n")));
    }
    text
}

/// A Markdown table.
fn traffic_text(step: &[Traffic]) -> String {
    let mut text =
        String::from("| kernel | launches | least, bytes a token | asked for | asked / least |\n| --- | ---: | ---: | ---: | ---: |\n");
    for Traffic { name, times, least, asked } in step {
        let (asked, ratio) =
            asked.map_or(("-".to_owned(), "-".to_owned()), |asked| (format!("{asked:.0}"), format!("{:.2}", asked / least)));
        let _ = writeln!(text, "| {name} | {times} | {least:.0} | {asked} | {ratio} |");
    }
    let (least, asked) = traffic::total(step);
    let _ = writeln!(text, "| all launches | | {least:.0} | {asked:.0} | {:.3} |", asked / least);
    text
}
