//! Whole training steps against the golden cases: ten on one rank, and five on two ranks with two micro-batches each.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use glmddp::config::plan::LossMean;
use glmddp::data::collate::collate;
use glmddp::data::{Dataset, MicroBatch, Sample};
use glmddp::dist::{Collectives, Reduction, Solo, local};
use glmddp::model::{ChatGlm2, ModelConfig, Recompute};
use glmddp::optim::{AdamWConfig, Schedule, SchedulerType};
use glmddp::peft::PeftMethod;
use glmddp::telemetry::PhaseTimer;
use glmddp::train::optimizer::Optimizer;
use glmddp::train::requests::Wish;
use glmddp::train::step::{StepSettings, Trainer, gradient_sum};

use crate::golden::{ALLOWED, Case, Comparison, cases};
use crate::golden_model::model;
use crate::golden_subjects::{exact_zero, thudm_prefix};

const ADAMW: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
/// Relative noise of losses and gradient norms where training is not chaotic (golden README: 1e-5 is ample, ten times this).
const SHARP: f64 = 1e-6;

/// Rows `[.., S]` of ids and labels as one micro-batch: padding cut off, as the data pipeline makes it.
pub fn micro_batch(ids: &Tensor, labels: &Tensor) -> MicroBatch {
    let len = ids.dims()[ids.rank() - 1];
    let flat = |t: &Tensor| t.to_dtype(DType::I64).unwrap().flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let (ids, labels) = (flat(ids), flat(labels));
    let mut data = Dataset::new("golden".as_ref());
    for (row, (ids, labels)) in ids.chunks(len).zip(labels.chunks(len)).enumerate() {
        let end = labels.iter().rposition(|&l| l != -100).unwrap() + 1;
        let sample =
            Sample { ids: ids[..end].iter().map(|&i| i as u32).collect(), is_target: labels[..end].iter().map(|&l| l != -100).collect() };
        data.push(sample.as_ref(), row + 1);
    }
    let rows: Vec<_> = (0..data.num_samples()).map(|i| (i as u64, i)).collect();
    collate(&rows, &data)
}

/// What a run came to, as the golden files have it.
#[derive(Default)]
struct Run {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    /// `after1.*`, `after5.*`, `after10.*`
    params: BTreeMap<String, Tensor>,
}

struct Recipe<'a> {
    steps: usize,
    num_slots: usize,
    loss_mean: LossMean,
    recompute: Recompute,
    /// (step, slot) -> its rows.
    slot: &'a (dyn Fn(usize, usize) -> MicroBatch + Sync),
    /// The method at its start, its learning rate, and its parameters' names in the golden files.
    method: &'a (dyn Fn() -> Box<dyn PeftMethod> + Sync),
    lr: f64,
    golden_name: fn(&str) -> String,
}

fn train(tensors: &dyn Collectives, model: &ChatGlm2, recipe: &Recipe) -> Run {
    let mut method = (recipe.method)();
    let mut model = model.clone();
    model.replace_weights(&method.trained_base_weights().unwrap()).unwrap();
    let model = &model;
    let mut optimizer = Optimizer::replicated(ADAMW, method.params().layout().num_elements(), model.device()).unwrap();
    let schedule = Schedule { kind: SchedulerType::Linear, base_lr: recipe.lr, warmup_steps: 0, total_steps: recipe.steps as u64 };
    let sum = gradient_sum(tensors, Reduction::SlotTree, recipe.num_slots, &*method, &optimizer).unwrap();
    let settings = StepSettings { recompute: recipe.recompute, loss_mean: recipe.loss_mean, max_grad_norm: Some(1.0) };
    let group = tensors.group();
    let share = recipe.num_slots / group.world_size();
    let mut run = Run::default();
    for step in 0..recipe.steps {
        let mine = group.rank() * share..(group.rank() + 1) * share;
        let slots: Vec<_> = mine.map(|slot| (slot, (recipe.slot)(step, slot))).collect();
        let (method, optimizer, sum) = (&mut *method, &mut optimizer, &sum);
        let mut trainer = Trainer { model, method, optimizer, sum, settings, wish: &Wish::default };
        let outcome = trainer.step(&slots, schedule.lr(step as u64), &PhaseTimer::default()).unwrap();
        run.losses.push(outcome.loss);
        run.grad_norms.push(outcome.grad_norm);
        for (name, tensor) in method.params().tensors().unwrap() {
            run.params.insert(format!("after{}.{}", step + 1, (recipe.golden_name)(&name)), tensor.copy().unwrap());
        }
    }
    run
}

fn check(case: &Case, file: &str, config: &ModelConfig, run: &Run, check_losses: bool) {
    let mut c: Comparison = case.compare(file).unwrap();
    let json = case.json(file).unwrap();
    // A chaotic run (its parameters are noisy in the reference itself) has noisy losses too, but not before its first update.
    let noise = c.relative_noise().max(SHARP);
    let stray = 2.0 * json["lr"].as_array().unwrap().iter().map(|lr| lr.as_f64().unwrap()).sum::<f64>();
    let series = |key: &str| -> Vec<f64> { serde_json::from_value(json[key].clone()).unwrap() };
    for (what, ours, golden) in [("loss", &run.losses, series("loss")), ("grad_norm", &run.grad_norms, series("grad_norm"))] {
        assert_eq!(ours.len(), golden.len(), "{file} {what}");
        if what == "loss" && !check_losses {
            continue;
        }
        for (step, (ours, golden)) in ours.iter().zip(golden).enumerate() {
            c.check_number(&format!("{what}[{step}]"), *ours, golden, ALLOWED * if step == 0 { SHARP } else { noise });
        }
    }
    let names: Vec<String> = c.golden.keys().cloned().collect();
    for name in names {
        let zero = exact_zero(config, if file.contains("full") || file.contains("freeze") { &name } else { "" });
        c.check_except(&name, &run.params[&name], stray, &zero);
    }
    c.finish();
}

/// Runs of one micro-batch a step.
pub struct Steps<'a> {
    pub steps: usize,
    pub slot: &'a (dyn Fn(usize, usize) -> MicroBatch + Sync),
    pub method: &'a (dyn Fn() -> Box<dyn PeftMethod> + Sync),
    pub lr: f64,
    pub golden_name: fn(&str) -> String,
}

pub fn check_steps(case: &Case, file: &str, model: &ChatGlm2, of: &Steps) {
    let &Steps { steps, slot, method, lr, golden_name } = of;
    let recipe = |recompute| Recipe { steps, num_slots: 1, loss_mean: LossMean::Token, recompute, slot, method, lr, golden_name };
    let run = train(&Solo, model, &recipe(Recompute::None));
    check(case, file, &model.config, &run, true);
    let again = train(&Solo, model, &recipe(Recompute::Block));
    assert_eq!(run.losses, again.losses, "recompute changes no bit");
}

#[test]
fn golden_data_parallel_means_on_one_and_two_ranks() {
    for case in cases() {
        let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
        let initial = case.tensors("ptuning").unwrap();
        let at = |name: &str, step: usize, slot: usize| inputs[name].get(step).unwrap().get(slot / 2).unwrap().get(slot % 2).unwrap();
        let slot = |step: usize, slot: usize| micro_batch(&at("dp_ids", step, slot), &at("dp_labels", step, slot));
        for (file, loss_mean) in [("train_dp_mean_of_means", LossMean::MicroBatch), ("train_dp_token_mean", LossMean::Token)] {
            let method = || -> Box<dyn PeftMethod> { Box::new(thudm_prefix(&model, &initial)) };
            let recompute = Recompute::None;
            let recipe =
                Recipe { steps: 5, num_slots: 4, loss_mean, recompute, slot: &slot, method: &method, lr: 2e-2, golden_name: str::to_owned };
            let solo = train(&Solo, &model, &recipe);
            // The golden loss is the plain mean of the micro-batches' in both files.
            check(&case, file, &model.config, &solo, loss_mean == LossMean::MicroBatch);
            for world_size in [2, 4] {
                let runs = local::run(world_size, |group| {
                    Ok::<_, glmddp::dist::DistError>({
                        let run = train(group, &model, &recipe);
                        let bits: Vec<Vec<u32>> = run
                            .params
                            .values()
                            .map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect())
                            .collect();
                        (run.losses, run.grad_norms, bits)
                    })
                });
                let expected: Vec<Vec<u32>> = solo
                    .params
                    .values()
                    .map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect())
                    .collect();
                for run in runs {
                    let (losses, norms, bits) = run.unwrap();
                    assert_eq!((losses, norms), (solo.losses.clone(), solo.grad_norms.clone()), "{world_size} ranks");
                    assert!(bits == expected, "{world_size} ranks give the same parameters, bit for bit");
                }
            }
        }
    }
}
