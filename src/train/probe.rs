//! A probe: what model and method gave on a few fixed tokens when a checkpoint was saved, and whether they give it again.

use candle_core::DType;

use super::backprop;
use crate::checkpoint::{Probe, ProbeRow};
use crate::data::{Dataset, MicroBatch};
use crate::model::ChatGlm2;
use crate::peft::PeftMethod;

/// Rows of a probe, the first of the training rows. With [`MAX_TOKENS`] the cost of a save is the forward pass of 126 tokens on one rank.
const NUM_ROWS: usize = 2;
const MAX_TOKENS: usize = 64;
const FLOAT32: &str = "float32";
/// Logits of each row: at its last place, of its first ids.
const NUM_LOGITS: usize = 8;
/// How far a loss or a logit may be off in f32, of its size or of 1 where it is smaller. The same program on the same kind of processor gives the
/// same bits. Another vector width, or a GPU, sums in another order: relative 1e-6 a layer. A wrong base, prefix or scale moves losses by more.
const TOLERANCE: f64 = 1e-3;
/// The same where values are rounded to bfloat16, to 2^-8 of themselves, in each layer, then as now: another GPU may choose other algorithms.
const TOLERANCE_OF_BF16: f64 = 2e-2;
/// The same where they are so then or now alone. A logit is off by a part of the largest.
const TOLERANCE_ACROSS: f64 = 5e-2;

/// The tokens of a run's probe: the first two rows, cut at 64 tokens. None where no row has two tokens.
pub fn rows(data: &Dataset) -> Vec<ProbeRow> {
    let rows = (0..data.num_samples().min(NUM_ROWS)).map(|i| data.sample(i));
    let cut = rows.map(|row| row.ids[..row.ids.len().min(MAX_TOKENS)].to_vec()).filter(|ids| ids.len() > 1);
    cut.map(|ids| ProbeRow { targets: (1..ids.len() as u32).collect(), ids }).collect()
}

/// What `model` with `method` gives on `rows`, without dropout; none where there are no rows, or a value is not finite.
///
/// # Errors
/// When an id or a place is out of range.
pub fn compute(model: &ChatGlm2, method: &dyn PeftMethod, rows: &[ProbeRow]) -> candle_core::Result<Option<Probe>> {
    let mut batch = MicroBatch { row_bounds: vec![0], ..MicroBatch::default() };
    let mut last = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let start = batch.ids.len() as u32;
        let Some((_, inputs)) = row.ids.split_last() else { continue };
        batch.ids.extend_from_slice(inputs);
        batch.positions.extend(0..inputs.len() as u32);
        batch.row_bounds.push(batch.ids.len());
        for &target in &row.targets {
            let Some(&id) = row.ids.get(target as usize).filter(|_| target > 0) else {
                candle_core::bail!("target {target} of probe row {i} is not among its {} tokens", row.ids.len());
            };
            batch.targets.push((start + target - 1, id));
        }
        batch.stream_positions.push(i as u64);
        batch.sample_indices.push(i);
        last.push(batch.ids.len() as u32 - 1);
    }
    if batch.targets.is_empty() {
        return Ok(None);
    }
    let (nll_sum, logits) = backprop::forward_with_logits(model, method, &batch, &last)?;
    let loss = nll_sum / batch.targets.len() as f64;
    let mut some = Vec::new();
    for (row, logits) in rows.iter().zip(logits) {
        for &id in row.ids.iter().take(NUM_LOGITS) {
            some.push(f64::from(logits.get(id as usize).copied().unwrap_or(f32::NAN)));
        }
    }
    let is_finite = loss.is_finite() && some.iter().all(|logit| logit.is_finite());
    let (device, compute_dtype) = (device_of(model).to_owned(), dtype_of(model).to_owned());
    Ok(is_finite.then(|| Probe { rows: rows.to_vec(), loss, logits: some, device, compute_dtype }))
}

fn device_of(model: &ChatGlm2) -> &'static str {
    if model.device().is_cpu() { "cpu" } else { "cuda" }
}

fn dtype_of(model: &ChatGlm2) -> &'static str {
    match model.dtype() {
        DType::F32 => FLOAT32,
        DType::BF16 => "bfloat16",
        _ => "float16",
    }
}

/// Holds what `model` and `method` give now against `probe` -> the first value that is another: its name, then, now.
///
/// # Errors
/// As [`compute`].
pub fn replay(model: &ChatGlm2, method: &dyn PeftMethod, probe: &Probe) -> candle_core::Result<Option<(String, f64, f64)>> {
    let now = compute(model, method, &probe.rows)?;
    let (device, dtype) = (device_of(model), dtype_of(model));
    let tolerance = match (probe.compute_dtype == dtype, dtype == FLOAT32) {
        (true, true) => TOLERANCE,
        (true, false) if probe.device == device => TOLERANCE_OF_BF16,
        _ => TOLERANCE_ACROSS,
    };
    let largest = if tolerance == TOLERANCE { 0.0 } else { probe.logits.iter().fold(0.0f64, |largest, logit| largest.max(logit.abs())) };
    let is_other = |then: f64, now: f64| now.is_nan() || (then - now).abs() > tolerance * then.abs().max(1.0).max(largest);
    let (loss, logits) = now.map_or((f64::NAN, Vec::new()), |now| (now.loss, now.logits));
    if loss.is_nan() || (probe.loss - loss).abs() > tolerance * probe.loss.abs().max(1.0) {
        return Ok(Some(("loss".to_owned(), probe.loss, loss)));
    }
    if probe.logits.len() != logits.len() {
        return Ok(Some(("number of logits".to_owned(), probe.logits.len() as f64, logits.len() as f64)));
    }
    let pairs = probe.logits.iter().zip(logits).enumerate();
    Ok(pairs.map(|(i, (then, now))| (format!("logit {i}"), *then, now)).find(|(_, then, now)| is_other(*then, *now)))
}
