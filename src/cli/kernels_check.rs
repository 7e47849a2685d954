//! `glmddp kernels check`: the kernels of a GPU held against the CPU's code.

use std::process::ExitCode;

use clap::Args;
use clap::builder::PossibleValuesParser;
use serde_json::json;

use super::report;
use crate::kernels::check::{self, Case, CheckError, Memo};
use crate::kernels::cuda;
use crate::kernels::gpu::Gpu;
use crate::kernels::launch::{Buffer, LaunchError, download, upload};

/// Hold every kernel against the CPU's code at many sizes, and its results against those of its other runs
///
/// A line a case, written as it starts and as it ends: what is printed last names the case that hangs.
#[derive(Clone, Debug, Args)]
#[command(rename_all = "snake_case")]
pub struct CheckArgs {
    /// Which GPU, of those that this process sees
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Runs of each case; all must give the same bits
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub repeat: u32,
    /// Only the cases of this file of kernels
    #[arg(long, value_parser = PossibleValuesParser::new(check::FILES))]
    pub file: Option<String>,
    /// Only cases whose name contains this; may be given several times
    #[arg(long)]
    pub only: Vec<String>,
    /// Only the first of every N cases of a file: a quick look
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub every: u16,
    /// Print the names of the files and end; needs no GPU
    #[arg(long)]
    pub list: bool,
    /// Print a line of JSON a file instead
    #[arg(long)]
    pub json: bool,
}

/// What came of a file's cases.
#[derive(Default)]
struct Outcome {
    num_run: usize,
    failures: Vec<String>,
    /// Behind a fault after which the GPU answers no more.
    num_not_run: usize,
}

pub fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    if args.list {
        report::print(&format!("{}\n", check::FILES.join("\n")))?;
        return Ok(ExitCode::SUCCESS);
    }
    let is_named = |case: &Case| args.only.is_empty() || args.only.iter().any(|part| case.name.contains(part));
    let wanted = |case: &Case| args.file.as_ref().is_none_or(|file| file == case.file) && is_named(case);
    let mut cases: Vec<Case> = check::cases().into_iter().chain(check::products::cases()).filter(wanted).collect();
    cases.sort_by_key(|case| check::FILES.iter().position(|file| *file == case.file));
    let gpu = cuda::open(args.gpu)?;
    let about = format!("{}; {} runs of each case", gpu.describe(), args.repeat);
    if !args.json {
        report::print(&format!("{about}\n"))?;
    }
    let mut is_good = !cases.is_empty();
    for of_file in cases.chunk_by(|a, b| a.file == b.file) {
        let cases: Vec<&Case> = of_file.iter().step_by(args.every.into()).collect();
        let Outcome { num_run, failures, num_not_run } = run_file(&*gpu, &cases, args)?;
        let (file, num_good) = (of_file[0].file, num_run - failures.len());
        is_good &= num_good == cases.len();
        report::print(&if args.json {
            let outcome = json!({ "gpu": gpu.describe(), "repeat": args.repeat, "file": file, "cases": cases.len(),
                "failures": failures, "not_run": num_not_run });
            format!("{outcome}\n")
        } else {
            format!("{file:<16} {num_good:>4} of {:>4} cases equal the CPU's code\n", cases.len())
        })?;
        if num_not_run > 0 {
            break;
        }
    }
    if cases.is_empty() {
        report::warn(&[format!(
            "no case of {} has a name with `{}`",
            args.file.as_deref().unwrap_or("any file"),
            args.only.join("` or `")
        )]);
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn run_file(gpu: &dyn Gpu, cases: &[&Case], args: &CheckArgs) -> anyhow::Result<Outcome> {
    let say = |text: &str| if args.json { Ok(()) } else { report::print(text) };
    let mut outcome = Outcome::default();
    for case in cases {
        say(&format!("{} {} ... ", case.file, case.name))?;
        let problem = run_case(gpu, case, args.repeat);
        outcome.num_run += 1;
        let Some(problem) = problem else {
            say("ok\n")?;
            continue;
        };
        say(&format!("FAILED: {problem}\n"))?;
        outcome.failures.push(format!("{}: {problem}", case.name));
        if let Err(error) = answers(gpu) {
            outcome.num_not_run = cases.len() - outcome.num_run;
            say(&format!("NOT RUN: {} more cases of {}: the GPU does not answer after this ({error})\n", outcome.num_not_run, case.file))?;
            break;
        }
    }
    Ok(outcome)
}

/// What is wrong with a case, in the first run that shows it.
fn run_case(gpu: &dyn Gpu, case: &Case, repeat: u32) -> Option<String> {
    let (mut first, memo) = (None, Memo::default());
    for run in 1..=repeat {
        let result = case.run(gpu, &memo, check::CARD_SLACK);
        gpu.free_all();
        match (result, &first) {
            (Ok(hash), None) => first = Some(hash),
            (Ok(hash), Some(first)) if hash == *first => {}
            (Ok(_), Some(_)) => return Some(format!("run {run}: other bits than in the first run")),
            (Err(error), _) => return Some(format!("run {run}: {}", describe(&error))),
        }
    }
    None
}

fn describe(error: &CheckError) -> String {
    let hint = if let CheckError::Launch(error) = error { error.hint() } else { None };
    hint.map_or_else(|| error.to_string(), |hint| format!("{error} (hint: {hint})"))
}

/// An error if the GPU no longer runs anything for this process, as after a fault in a kernel.
fn answers(gpu: &dyn Gpu) -> Result<(), LaunchError> {
    let word = [0x5au8; 4];
    let address = upload(gpu, "a word", &word)?;
    download::<u8>(gpu, Buffer { address, bytes: word.len() })?;
    gpu.free_all();
    Ok(())
}
