//! `glmddp kernels`: the kernels of a GPU timed, and the bytes that they move.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Deserialize;

use super::{kernels_check, report};
use crate::bench::gpu_times::{self, Ceilings, Line, Machine, Timed};
use crate::bench::kernels::{Shape, Work};
use crate::bench::traffic::{self, Traffic};
use crate::json;
use crate::kernels::cuda;
use crate::paths;

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
    Check(kernels_check::CheckArgs),
    Bench(BenchArgs),
    Report(ReportArgs),
    Traffic(TrafficArgs),
}

/// Time every kernel at the shapes of ChatGLM2-6B
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct BenchArgs {
    /// Which GPU, of those that this process sees
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Small shapes, to rehearse where no GPU is: the times say nothing
    #[arg(long)]
    pub small: bool,
    /// Print a line of JSON as soon as each time is known
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
        Command::Check(args) => kernels_check::run(args),
        Command::Bench(args) => bench(args).map(|()| ExitCode::SUCCESS),
        Command::Report(args) => table(args).map(|()| ExitCode::SUCCESS),
        Command::Traffic(TrafficArgs {}) => {
            report::print(&traffic_text(&traffic::step(&Shape::CHATGLM2_6B, NUM_LAYERS)))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let gpu = cuda::open(args.gpu)?;
    let (shape, machine) = if args.small { (Shape::SMALL, Machine::SMALL) } else { (Shape::CHATGLM2_6B, Machine::GPU) };
    let mut lines = Vec::new();
    gpu_times::run(&*gpu, &shape, &machine, |line| -> anyhow::Result<()> {
        if args.json {
            report::print(&format!("{}\n", serde_json::to_string(&line)?))?;
        }
        lines.push(line);
        Ok(())
    })?;
    if !args.json {
        report::print(&text(&lines, None))?;
    }
    Ok(())
}

/// What `scripts/kernels_torch.py` prints.
#[derive(Deserialize)]
struct TorchTimes {
    about: BTreeMap<String, serde_json::Value>,
    median_ms: BTreeMap<String, f64>,
    /// Names of times that may hold waiting for the host.
    #[serde(default)]
    host_late: Vec<String>,
    failed: BTreeMap<String, String>,
}

fn table(args: &ReportArgs) -> anyhow::Result<()> {
    let torch: Option<TorchTimes> = match &args.torch {
        Some(path) => Some(json::read(read(path)?.as_bytes()).with_context(|| reading(path))?),
        None => None,
    };
    let mut lines = Vec::new();
    for (i, line) in read(&args.bench)?.lines().enumerate() {
        // The ceilings come first, then a time a line.
        let parsed = if i == 0 { json::read(line.as_bytes()).map(Line::Ceilings) } else { json::read(line.as_bytes()).map(Line::Timed) };
        lines
            .push(parsed.with_context(|| {
                format!("{}, line {}: expected what `glmddp kernels bench --json` prints", reading(&args.bench), i + 1)
            })?);
    }
    report::print(&text(&lines, torch.as_ref()))?;
    Ok(())
}

fn reading(path: &Path) -> String {
    format!("while reading {}", path.display())
}

fn read(path: &Path) -> anyhow::Result<String> {
    paths::expect_file(path)?;
    std::fs::read_to_string(path).with_context(|| reading(path))
}

/// A Markdown table of what was measured, which may have ended early.
fn text(lines: &[Line], torch: Option<&TorchTimes>) -> String {
    let ceilings = lines.iter().find_map(|line| if let Line::Ceilings(ceilings) = line { Some(ceilings) } else { None });
    let Some(Ceilings { gpu, product_library, is_rehearsal, copy_gb_s, product_tflop_s }) = ceilings else {
        return "Nothing was measured.\n".to_owned();
    };
    let mut text = if *is_rehearsal { "REHEARSAL at a small shape: the times say nothing.\n\n".to_owned() } else { String::new() };
    let _ = write!(
        text,
        "{gpu}; {product_library}. Measured there: a copy of 1 GiB {copy_gb_s:.0} GB/s (read and written), a product of 8192 x 8192 bf16 {product_tflop_s:.0} TFLOP/s.\n\n\
         | kernel | median, ms | speed | of what was measured | PyTorch, ms | PyTorch / glmddp |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
    );
    for kernel in lines.iter().filter_map(|line| if let Line::Timed(timed) = line { Some(timed) } else { None }) {
        let Timed { name, median_ms, work, host_was_late } = kernel;
        let late = if *host_was_late { " (host late)" } else { "" };
        let (unit, of) = match work {
            Work::Bytes(_) => ("GB/s", copy_gb_s),
            Work::Flops(_) => ("TFLOP/s", product_tflop_s),
        };
        let torch_ms = torch.and_then(|torch| torch.median_ms.get(name));
        let torch_late = if torch.is_some_and(|torch| torch.host_late.contains(name)) { " (host late)" } else { "" };
        let (theirs, ratio) =
            torch_ms.map_or(("-".to_owned(), "-".to_owned()), |ms| (format!("{ms:.4}{torch_late}"), format!("{:.2}", ms / median_ms)));
        let speed = kernel.speed();
        let _ = writeln!(text, "| {name}{late} | {median_ms:.4} | {speed:.0} {unit} | {:.0} % | {theirs} | {ratio} |", 100.0 * speed / of);
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
