//! `glmddp doctor`: what this machine has, what is missing, what for, and how to get it.

mod accelerator;
mod host;
mod launcher;

use clap::Args;
use serde::Serialize;

use super::report;
use super::text::columns;

/// Look at this machine: MPI, cores, memory, disk, CUDA
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Good,
    /// Works, though slower or smaller than it could, or is there and does not fit.
    Poor,
    Missing,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    what: String,
    status: Status,
    found: String,
    /// What a missing thing is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    needed_for: Option<String>,
    /// A command, or a step, that brings it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn good(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self { what: what.into(), status: Status::Good, found: found.into(), needed_for: None, remedy: None }
    }

    fn poor(what: impl Into<String>, found: impl Into<String>, needed_for: impl Into<String>, remedy: impl Into<String>) -> Self {
        let (needed_for, remedy) = (Some(needed_for.into()), Some(remedy.into()));
        Self { what: what.into(), status: Status::Poor, found: found.into(), needed_for, remedy }
    }

    fn missing(what: impl Into<String>, needed_for: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Missing, ..Self::poor(what, "not found", needed_for, remedy) }
    }
}

pub fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let findings = [launcher::findings(), host::findings(), accelerator::findings()].concat();
    let text = if args.json { format!("{}\n", serde_json::to_string_pretty(&findings)?) } else { table(&findings) };
    report::print(&text)?;
    Ok(())
}

fn table(findings: &[Finding]) -> String {
    let row = |f: &Finding| {
        let mark = match f.status {
            Status::Good => "ok",
            Status::Poor => "poor",
            Status::Missing => "missing",
        };
        let mut text = format!("{mark:8}{}", f.found);
        for (label, line) in [("for", &f.needed_for), ("get it", &f.remedy)] {
            if let Some(line) = line {
                text += &format!("\n{:8}{label}: {line}", "");
            }
        }
        (f.what.clone(), text)
    };
    columns(&findings.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_with_a_missing_thing_says_what_for_and_how() {
        let findings = [Finding::good("cores", "8"), Finding::missing("mpirun", "more ranks", "apt-get install openmpi-bin")];
        let expected = "cores   ok      8\nmpirun  missing not found\n                for: more ranks\n                get it: apt-get install openmpi-bin\n";
        assert_eq!(table(&findings), expected);
    }
}
