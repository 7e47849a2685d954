//! `compare.json`: what was compared and what came of it, and whether a comparison may go on from it.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::CompareError;
use crate::config::Plan;

/// The report's name in the comparison's output folder.
pub const REPORT_FILE: &str = "compare.json";
/// Raised when an older program could misread the report.
const FORMAT_VERSION: u32 = 1;

/// A comparison so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub format_version: u32,
    pub shared: Shared,
    /// Mean loss of the base on the held-out rows, in nats per target token; none before it was computed.
    pub base_held_out_loss: Option<f64>,
    pub entries: Vec<Entry>,
}

/// What all methods see alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shared {
    /// sha256 of the base's weights.
    pub base_fingerprint: String,
    pub tokenizer_sha256: String,
    /// Device and type of values; reports of earlier versions are of a CPU in float32.
    #[serde(default = "on_a_cpu")]
    pub computed_on: String,
    /// Parameters of the base.
    pub base_parameters: u64,
    pub train_rows: u64,
    pub train_tokens: u64,
    pub held_out_rows: u64,
    pub held_out_tokens: u64,
    /// The first so many held-out rows are those that drift is measured on.
    pub drift_rows: u64,
    pub steps: u64,
    pub rows_per_step: u64,
    /// Tokens of the rows of all steps: the budget of each method.
    pub budget_tokens: u64,
}

fn on_a_cpu() -> String {
    "cpu, float32".to_owned()
}

/// One method's run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub label: String,
    /// What decides the run's result, see [`identity`].
    pub plan: Value,
    /// None while it runs, or where it was killed.
    pub result: Option<RunResult>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    Trained(Figures),
    /// A value was not finite: the same would happen again.
    Stopped {
        reason: String,
    },
}

/// What a run came to. Absent numbers were not finite or could not be had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    pub trainable_parameters: u64,
    /// Greatest resident size of the first rank's process during the training steps, the base's weights included.
    pub peak_rss_bytes: Option<u64>,
    /// False where the system did not let the peak be counted anew for this run, so that it may be that of an earlier one.
    pub peak_is_of_this_run: bool,
    /// All ranks together, median over the steps that are not a process's first.
    pub tokens_per_second: Option<f64>,
    /// Mean over the last steps, see [`super::figures::LAST_STEPS`].
    pub train_loss: Option<f64>,
    /// After the last step.
    pub held_out_loss: Option<f64>,
    /// Mean over target positions of KL(base || tuned), in nats.
    pub drift_kl: Option<f64>,
    /// Of the exported weights.
    pub weight_bytes: u64,
    pub steps: u64,
    /// Of all training steps, without evaluation and saving.
    pub seconds: f64,
    pub world_size: usize,
}

/// A leaf in which two values differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub key: String,
    pub there: String,
    pub here: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is {} there and {} here", self.key, self.there, self.here)
    }
}

impl Report {
    pub fn new(shared: Shared) -> Self {
        Self { format_version: FORMAT_VERSION, shared, base_held_out_loss: None, entries: Vec::new() }
    }

    /// A report that stood at `path`.
    ///
    /// # Errors
    /// When it is no report, or of a newer format.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self, CompareError> {
        let unreadable = |reason| CompareError::Unreadable { path: path.to_owned(), reason };
        let report: Self = crate::json::read(text).map_err(|e| unreadable(e.to_string()))?;
        if report.format_version != FORMAT_VERSION {
            return Err(unreadable(format!("its format is version {}, expected {FORMAT_VERSION}", report.format_version)));
        }
        Ok(report)
    }

    /// Whether a comparison with these inputs may go on from this report.
    ///
    /// # Errors
    /// When it was made with other rows, another base, or another number of steps.
    pub fn check_shared(&self, path: &Path, shared: &Shared) -> Result<(), CompareError> {
        refuse_differences(path, "the comparison", &json!(self.shared), &json!(shared))
    }

    /// Whether a method of these settings may go on from this report.
    ///
    /// # Errors
    /// When the report has a run of the same label with other settings.
    pub fn check_entry(&self, path: &Path, label: &str, plan: &Value) -> Result<(), CompareError> {
        match self.entry(label) {
            Some(entry) => refuse_differences(path, &format!("`{label}`"), &entry.plan, plan),
            None => Ok(()),
        }
    }

    pub fn entry(&self, label: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.label == label)
    }

    /// Puts an entry in its place, or behind the others.
    pub fn put(&mut self, entry: Entry) {
        match self.entries.iter_mut().find(|e| e.label == entry.label) {
            Some(old) => *old = entry,
            None => self.entries.push(entry),
        }
    }

    /// Runs that were trained to their end, in the order of the report.
    pub fn trained(&self) -> impl Iterator<Item = (&str, &Figures)> {
        self.entries.iter().filter_map(|e| match &e.result {
            Some(RunResult::Trained(figures)) => Some((e.label.as_str(), figures)),
            _ => None,
        })
    }
}

/// What of a plan decides its run's losses and its costs: where the result goes, how often it logs and saves, and the number of ranks do not.
pub fn identity(plan: &Plan) -> Value {
    let Plan { model, data, batch, method, optim, run } = plan;
    let mut data = json!(data);
    if let Some(data) = data.as_object_mut() {
        data.retain(|key, _| !matches!(key.as_str(), "cache_dir" | "overwrite_cache"));
    }
    let batch = json!({
        "rows_per_slot": batch.rows_per_slot,
        "slots_per_step": batch.slots_per_step,
        "eval_rows_per_slot": batch.eval_rows_per_slot,
    });
    let model = json!({ "recompute": model.recompute, "rope_table": model.rope_table });
    json!({ "model": model, "data": data, "batch": batch, "method": method, "optim": optim, "run": { "seed": run.seed } })
}

fn refuse_differences(path: &Path, what: &str, there: &Value, here: &Value) -> Result<(), CompareError> {
    let mut differences = Vec::new();
    collect_differences("", there, here, &mut differences);
    if differences.is_empty() {
        return Ok(());
    }
    Err(CompareError::Differs { path: path.to_owned(), what: what.to_owned(), differences })
}

fn collect_differences(key: &str, there: &Value, here: &Value, found: &mut Vec<Difference>) {
    if let (Value::Object(a), Value::Object(b)) = (there, here) {
        let only_here = b.keys().filter(|k| !a.contains_key(*k));
        for name in a.keys().chain(only_here) {
            let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            collect_differences(&inner, a.get(name).unwrap_or(&Value::Null), b.get(name).unwrap_or(&Value::Null), found);
        }
    } else if there != here {
        let text = |v: &Value| if v.is_null() { "not given".to_owned() } else { v.to_string() };
        found.push(Difference { key: key.to_owned(), there: text(there), here: text(here) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_the_leaves_with_both_values() {
        let there = json!({ "optim": { "learning_rate": 0.02, "warmup": { "steps": 0 } }, "only": 1 });
        let here = json!({ "optim": { "learning_rate": 0.01, "warmup": { "steps": 0 } }, "new": "x" });
        let Err(error) = refuse_differences(Path::new("compare.json"), "`a`", &there, &here) else { panic!("they differ") };
        insta::assert_snapshot!(error, @r#"`a` in compare.json was made otherwise: `optim.learning_rate` is 0.02 there and 0.01 here; `only` is 1 there and not given here; `new` is not given there and "x" here"#);
        assert!(refuse_differences(Path::new("compare.json"), "`a`", &there, &there).is_ok());
    }

    #[test]
    fn report_of_another_format_is_refused() {
        let path = Path::new("compare.json");
        assert!(Report::parse(path, b"{}").unwrap_err().to_string().starts_with("compare.json is not the report of a comparison: missing"));
    }
}
