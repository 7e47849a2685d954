//! What a resumed run tells of where it goes on, and of what is otherwise than when the checkpoint was saved.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::state::Progress;
use crate::checkpoint::{self, Change};
use crate::config::Plan;

/// Keys that differ in any resume, or that stand elsewhere in the report.
const NOT_TOLD: [&str; 4] = ["run.resume", "run.overwrite_output_dir", "batch.world_size", "batch.slots_per_step"];
/// What a run computes does not depend on these, nor on what begins with [`OUTSIDE_PREFIX`] without being in [`COMPUTED`].
const OUTSIDE: [&str; 9] = [
    "batch.eval_rows_per_slot",
    "data.cache_dir",
    "data.max_eval_samples",
    "data.overwrite_cache",
    "data.train_file",
    "data.validation_file",
    "model.model_name_or_path",
    "model.recompute",
    "optim.shard_optimizer",
];
const OUTSIDE_PREFIX: &str = "run.";
const COMPUTED: [&str; 1] = ["run.duration"];

/// What an allowed difference does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// From here on the run computes something else than it would have.
    OtherResult,
    /// Parameters come out the same.
    SameResult,
}

impl Effect {
    fn of(key: &str) -> Self {
        if is_in(&OUTSIDE, key) || (key.starts_with(OUTSIDE_PREFIX) && !is_in(&COMPUTED, key)) {
            Self::SameResult
        } else {
            Self::OtherResult
        }
    }
}

/// Whether `key` is one of `keys` or below it.
fn is_in(keys: &[&str], key: &str) -> bool {
    keys.iter().any(|above| key.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// How a step's rows are dealt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Split {
    pub world_size: u64,
    /// Micro-batches of a step over all ranks.
    pub slots_per_step: u64,
    pub rows_per_slot: u64,
}

impl Split {
    /// None where `plan` is not one.
    fn of(world_size: usize, plan: &Value) -> Option<Self> {
        let number = |key: &str| plan.get("batch")?.get(key)?.as_u64();
        Some(Self { world_size: world_size as u64, slots_per_step: number("slots_per_step")?, rows_per_slot: number("rows_per_slot")? })
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { world_size, slots_per_step, rows_per_slot } = self;
        write!(f, "{world_size} x {} micro-batches of {rows_per_slot} rows a step", slots_per_step / world_size.max(&1))
    }
}

/// A checkpoint that could not be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PassedOver {
    pub path: PathBuf,
    pub reason: String,
}

/// A difference of the plan. One that is not allowed (base, tokenizer, method, sizes, seed, rows) has ended the run before.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AllowedChange {
    #[serde(flatten)]
    pub change: Change,
    pub effect: Effect,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ResumeReport {
    pub path: PathBuf,
    pub step: u64,
    pub consumed_rows: u64,
    /// Of the checkpoint, where its plan says.
    pub split_then: Option<Split>,
    pub split_now: Option<Split>,
    pub passed_over: Vec<PassedOver>,
    pub changes: Vec<AllowedChange>,
    /// Whether the checkpoint has a probe, which was replayed.
    pub probe: bool,
}

/// A checkpoint that a run goes on from.
#[derive(Clone, Debug)]
pub struct Resumed {
    pub path: PathBuf,
    pub progress: Progress,
    pub header: checkpoint::Header,
    pub passed_over: Vec<PassedOver>,
}

impl ResumeReport {
    /// Of a run that goes on as `plan` says.
    pub fn new(resumed: &Resumed, plan: &Plan) -> Self {
        let now = serde_json::to_value(plan).unwrap_or_default();
        let header = &resumed.header;
        let all = checkpoint::changes(&with_device(&header.plan), &now);
        let changes = all.into_iter().filter(|change| !is_in(&NOT_TOLD, &change.key));
        Self {
            path: resumed.path.clone(),
            step: resumed.progress.step,
            consumed_rows: resumed.progress.consumed_rows,
            split_then: Split::of(header.world_size, &header.plan),
            split_now: Split::of(plan.batch.world_size.get(), &now),
            passed_over: resumed.passed_over.clone(),
            changes: changes.map(|change| AllowedChange { effect: Effect::of(&change.key), change }).collect(),
            probe: header.probe.is_some(),
        }
    }
}

/// The plan of a checkpoint; those of earlier versions were computed on a CPU and do not say so.
fn with_device(plan: &Value) -> Value {
    let mut plan = plan.clone();
    if let Some(model) = plan.get_mut("model").and_then(Value::as_object_mut) {
        for (key, value) in [("device", "cpu"), ("compute_dtype", "float32")] {
            model.entry(key).or_insert_with(|| value.into());
        }
    }
    plan
}

impl fmt::Display for ResumeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, step, consumed_rows, .. } = self;
        write!(f, "goes on from {}: step {step}, row {consumed_rows} of the training stream", path.display())?;
        for PassedOver { path, reason } in &self.passed_over {
            write!(f, "\n  passed over: {}: {reason}", path.display())?;
        }
        match (self.split_then, self.split_now) {
            (Some(then), Some(now)) if then == now => write!(f, "\n  ranks as then: {now}")?,
            (Some(then), Some(now)) => write!(f, "\n  ranks then {then}; now {now}")?,
            _ => {}
        }
        for AllowedChange { change, effect } in &self.changes {
            let effect = match effect {
                Effect::OtherResult => "from here on it changes the result",
                Effect::SameResult => "it changes no result",
            };
            write!(f, "\n  {change} (allowed: {effect})")?;
        }
        write!(f, "\n  {}", if self.probe { "the probe gave what it gave then" } else { "the checkpoint has no probe" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RunConfig, Sources};

    #[test]
    fn report_names_ranks_passed_over_checkpoints_and_every_difference() {
        let plan = |world_size: usize, change: &dyn Fn(&mut RunConfig)| {
            let mut config = RunConfig::default();
            config.model.model_name_or_path = Some("model".into());
            config.data.train_file = Some("rows.json".into());
            config.run.output_dir = Some("out".into());
            config.run.max_steps = Some(9);
            config.batch.global_batch_size = Some(4);
            config.batch.per_device_train_batch_size = Some(2);
            change(&mut config);
            config.resolve(world_size, &Sources::default()).unwrap()
        };
        let then = plan(2, &|_| {});
        let identity = checkpoint::Identity {
            method: "any".to_owned(),
            sizes: Default::default(),
            base_fingerprint: "aa".to_owned(),
            tokenizer_sha256: "bb".to_owned(),
            template: "t".to_owned(),
        };
        let header = checkpoint::Header {
            step: 4,
            consumed_rows: 16,
            world_size: 2,
            eval_loss: None,
            identity,
            plan: serde_json::to_value(&then).unwrap(),
            probe: None,
        };
        let passed_over = vec![PassedOver { path: "out/checkpoint-5".into(), reason: "it is torn".to_owned() }];
        let resumed = Resumed { path: "out/checkpoint-4".into(), progress: Progress { step: 4, consumed_rows: 16 }, header, passed_over };
        let now = plan(1, &|config| {
            config.optim.learning_rate = Some(0.5);
            config.run.max_steps = Some(20);
            config.run.save_steps = Some(7);
            config.batch.per_device_train_batch_size = Some(1);
        });
        let report = ResumeReport::new(&resumed, &now);
        insta::assert_snapshot!("resume_report", report);
        let same = ResumeReport::new(&Resumed { passed_over: Vec::new(), ..resumed }, &then);
        assert_eq!(same.changes, []);
        insta::assert_snapshot!("resume_report_of_the_same_plan", same);
    }
}
