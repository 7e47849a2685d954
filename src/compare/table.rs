//! The comparison as a table: Markdown that is aligned for the terminal as well.

use super::figures::LAST_STEPS;
use super::{Figures, Report, RunResult};
use crate::telemetry::{bytes, hours, thousands};

/// The page's name in the comparison's output folder.
pub const FILE: &str = "compare.md";

const HEADER: [&str; 9] = ["method", "trainable", "memory", "tok/s", "train loss", "held-out loss", "drift (KL)", "on disk", "time"];

/// One line a method, the base first.
pub fn table(report: &Report) -> String {
    let mut rows: Vec<[String; 9]> = vec![HEADER.map(str::to_owned)];
    let mut base = std::array::from_fn(|_| absent());
    (base[0], base[1], base[5], base[6]) = ("(base)".to_owned(), "0".to_owned(), number(report.base_held_out_loss), "0".to_owned());
    rows.push(base);
    for entry in &report.entries {
        rows.push(match &entry.result {
            Some(RunResult::Trained(figures)) => cells(&entry.label, figures),
            Some(RunResult::Stopped { .. }) => note(&entry.label, "stopped"),
            None => note(&entry.label, "unfinished"),
        });
    }
    let widths: [usize; 9] = std::array::from_fn(|c| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0));
    let mut out = String::new();
    for (r, row) in rows.iter().enumerate() {
        for (c, (cell, width)) in row.iter().zip(widths).enumerate() {
            let aligned = if c == 0 { format!("| {cell:<width$} ") } else { format!("| {cell:>width$} ") };
            out.push_str(&aligned);
        }
        out.push_str("|\n");
        if r == 0 {
            for (c, width) in widths.into_iter().enumerate() {
                let line = "-".repeat(width);
                out.push_str(&if c == 0 { format!("| {line} ") } else { format!("|-{line}:") });
            }
            out.push_str("|\n");
        }
    }
    out
}

/// What the columns mean, and why runs stopped.
pub fn notes(report: &Report) -> String {
    let s = &report.shared;
    let mut lines = vec![
        format!(
            "Budget of each method: {} steps of {} rows, {} tokens; the rows of a step are the same for all.",
            thousands(s.steps),
            s.rows_per_step,
            thousands(s.budget_tokens)
        ),
        format!(
            "Losses in nats per target token: training, the mean of the last {LAST_STEPS} steps; held-out, {} rows after the last step.",
            s.held_out_rows
        ),
        format!("Drift: mean of KL(base || tuned) over the target tokens of the first {} held-out rows, in nats.", s.drift_rows),
        "Memory: peak resident size of the first rank while training, the base's weights included. Tokens a second: all ranks, median over \
         steps."
            .to_owned(),
        "On disk: the exported weights in one format. Time: all training steps, without evaluation and saving.".to_owned(),
    ];
    if report.trained().any(|(_, f)| !f.peak_is_of_this_run) {
        lines.push("≤: this system does not let the peak be counted anew, so it may be that of an earlier run.".to_owned());
    }
    for entry in &report.entries {
        if let Some(RunResult::Stopped { reason }) = &entry.result {
            lines.push(format!("{}: {}", entry.label, reason.replace('\n', " ")));
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// `compare.md`.
pub fn page(report: &Report) -> String {
    let s = &report.shared;
    let notes: String = notes(report).lines().map(|line| format!("- {line}\n")).collect();
    format!(
        "# Methods side by side\n\nBase: {} parameters, sha256 {}. Training rows: {} ({} tokens).\n\n{}\n{notes}\n![held-out loss, drift and speed]({})\n",
        thousands(s.base_parameters),
        s.base_fingerprint.get(..12).unwrap_or(&s.base_fingerprint),
        thousands(s.train_rows),
        thousands(s.train_tokens),
        table(report),
        super::picture::FILE,
    )
}

/// Where there is no number.
fn absent() -> String {
    "–".to_owned()
}

fn cells(label: &str, f: &Figures) -> [String; 9] {
    let memory = f.peak_rss_bytes.map_or_else(absent, |b| format!("{}{}", if f.peak_is_of_this_run { "" } else { "≤ " }, bytes(b)));
    [
        label.to_owned(),
        thousands(f.trainable_parameters),
        memory,
        f.tokens_per_second.map_or_else(absent, |t| thousands(t.round() as u64)),
        number(f.train_loss),
        number(f.held_out_loss),
        f.drift_kl.map_or_else(absent, small),
        bytes(f.weight_bytes),
        hours(std::time::Duration::from_secs_f64(f.seconds.clamp(0.0, 1e12))),
    ]
}

fn note(label: &str, text: &str) -> [String; 9] {
    let mut cells = std::array::from_fn(|_| absent());
    (cells[0], cells[1]) = (label.to_owned(), text.to_owned());
    cells
}

/// Four decimals, or three figures and a power of ten where these would show little.
pub(super) fn small(x: f64) -> String {
    if x == 0.0 || x >= 0.01 { format!("{x:.4}") } else { format!("{x:.2e}") }
}

fn number(x: Option<f64>) -> String {
    x.map_or_else(absent, |x| format!("{x:.4}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        assert_eq!([0.0, 0.25, 0.01, 4.8137e-6].map(small), ["0.0000", "0.2500", "0.0100", "4.81e-6"]);
        assert_eq!((number(None), number(Some(3.0))), ("–".to_owned(), "3.0000".to_owned()));
    }
}
