//! What two checkpoints differ in.

use std::collections::BTreeSet;
use std::fmt;

use candle_core::{DType, Tensor};
use serde::Serialize;
use serde_json::Value;

use super::manifest::TensorEntry;
use super::{Checkpoint, CheckpointError, Disk};

/// A value that is one in the first and another in the second; none: not there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Change {
    /// `a.b`: key b of the object at key a.
    pub key: String,
    pub from: Option<Value>,
    pub to: Option<Value>,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |value: &Option<Value>| value.as_ref().map_or("not there".to_owned(), Value::to_string);
        write!(f, "{}: {} -> {}", self.key, text(&self.from), text(&self.to))
    }
}

/// Where two JSON values differ, in the order of the keys.
pub fn changes(from: &Value, to: &Value) -> Vec<Change> {
    let mut found = Vec::new();
    collect(String::new(), Some(from), Some(to), &mut found);
    found
}

fn collect(key: String, from: Option<&Value>, to: Option<&Value>, found: &mut Vec<Change>) {
    match (from, to) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            for name in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                let inner = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                collect(inner, a.get(name), b.get(name), found);
            }
        }
        (from, to) if from != to => found.push(Change { key, from: from.cloned(), to: to.cloned() }),
        _ => {}
    }
}

/// How a tensor of the first differs from that of the second.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    Equal,
    /// Largest absolute difference of two elements, and the L2 norm of the difference over that of the first.
    Values {
        max_abs: f64,
        relative_norm: f64,
    },
    /// Type and shape of each.
    Shape {
        from: String,
        to: String,
    },
    OnlyInFirst,
    OnlyInSecond,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Step, rows, world size and held-out loss.
    pub progress: Vec<Change>,
    pub identity: Vec<Change>,
    pub plan: Vec<Change>,
    /// All tensors, by name.
    pub tensors: Vec<(String, Measure)>,
}

/// Compares two checkpoints. Tensors that are dealt to ranks alike and have the same hashes are equal; the others are read.
///
/// # Errors
/// When one that has to be read is damaged, or holds a dtype that cannot be computed with.
pub fn difference(disk: &dyn Disk, first: &Checkpoint, second: &Checkpoint) -> Result<Difference, CheckpointError> {
    let (a, b) = (&first.manifest, &second.manifest);
    let progress = |checkpoint: &Checkpoint| {
        let header = &checkpoint.manifest.header;
        serde_json::json!({
            "step": header.step,
            "consumed_rows": header.consumed_rows,
            "world_size": header.world_size,
            "eval_loss": header.eval_loss,
        })
    };
    let identity = |checkpoint: &Checkpoint| serde_json::to_value(&checkpoint.manifest.header.identity).unwrap_or_default();
    let names: BTreeSet<&String> = a.tensors.keys().chain(b.tensors.keys()).collect();
    let is_read = |name: &String| match (a.tensors.get(name), b.tensors.get(name)) {
        (Some(a), Some(b)) => a.shape == b.shape && a.dtype == b.dtype && !same_hashes(a, b),
        _ => false,
    };
    let (of_first, of_second) =
        if names.iter().any(|name| is_read(name)) { (first.tensors(disk)?, second.tensors(disk)?) } else { Default::default() };
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let measure = match (a.tensors.get(name), b.tensors.get(name)) {
            (Some(_), None) => Measure::OnlyInFirst,
            (None, _) => Measure::OnlyInSecond,
            (Some(a), Some(b)) if a.shape != b.shape || a.dtype != b.dtype => {
                let text = |entry: &TensorEntry| format!("{:?} {:?}", entry.dtype, entry.shape);
                Measure::Shape { from: text(a), to: text(b) }
            }
            _ => match (of_first.get(name), of_second.get(name)) {
                (Some(from), Some(to)) if is_read(name) => values(from, to)?,
                _ => Measure::Equal,
            },
        };
        tensors.push((name.clone(), measure));
    }
    Ok(Difference {
        progress: changes(&progress(first), &progress(second)),
        identity: changes(&identity(first), &identity(second)),
        plan: changes(&a.header.plan, &b.header.plan),
        tensors,
    })
}

fn same_hashes(a: &TensorEntry, b: &TensorEntry) -> bool {
    let parts = |entry: &TensorEntry| entry.pieces.iter().map(|p| (p.start, p.end, p.sha256.clone())).collect::<Vec<_>>();
    parts(a) == parts(b)
}

fn values(from: &Tensor, to: &Tensor) -> candle_core::Result<Measure> {
    let numbers = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (mut max_abs, mut of_difference, mut of_first, mut is_equal) = (0f64, 0f64, 0f64, true);
    for (a, b) in numbers(from)?.into_iter().zip(numbers(to)?) {
        is_equal &= a.to_bits() == b.to_bits();
        let (a, difference) = (f64::from(a), f64::from(a) - f64::from(b));
        max_abs = if max_abs.is_nan() || difference.is_nan() { f64::NAN } else { max_abs.max(difference.abs()) };
        of_difference += difference * difference;
        of_first += a * a;
    }
    Ok(if is_equal { Measure::Equal } else { Measure::Values { max_abs, relative_norm: (of_difference / of_first).sqrt() } })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{header, save_parts, save_step};
    use super::super::{RealDisk, open};
    use super::*;

    #[test]
    fn checkpoints_of_two_steps_differ_by_the_step_in_every_element() {
        let dir = tempfile::tempdir().unwrap();
        let one = open(&RealDisk, &save_step(&RealDisk, dir.path(), 1).unwrap()).unwrap();
        let mut other = header(3);
        other.identity.sizes.insert("pre_seq_len".to_owned(), 8.into());
        other.plan = serde_json::json!({"learning_rate": 0.5});
        let other = open(&RealDisk, &save_parts(&RealDisk, dir.path(), &other, &[0..18, 18..18]).unwrap()).unwrap();
        let found = difference(&RealDisk, &one, &other).unwrap();
        let texts = |changes: &[Change]| changes.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&found.progress), ["consumed_rows: 16 -> 48", "step: 1 -> 3"]);
        assert_eq!(texts(&found.identity), ["sizes.pre_seq_len: 7 -> 8"]);
        assert_eq!(texts(&found.plan), ["learning_rate: 0.02 -> 0.5"]);
        for (name, measure) in &found.tensors {
            match measure {
                Measure::Equal => assert!(name.ends_with(".n"), "{name} has no elements"),
                Measure::Values { max_abs, .. } => assert!((max_abs - 2.0).abs() < 1e-6, "{name}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn same_state_dealt_to_other_ranks_is_equal() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let one = open(&RealDisk, &save_step(&RealDisk, a.path(), 1).unwrap()).unwrap();
        let other = open(&RealDisk, &save_parts(&RealDisk, b.path(), &header(1), &[0..4, 4..18]).unwrap()).unwrap();
        let found = difference(&RealDisk, &one, &other).unwrap();
        assert!(found.tensors.iter().all(|(_, measure)| *measure == Measure::Equal), "{found:?}");
    }
}
