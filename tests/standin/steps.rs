//! Training steps on the GPU that is not there: the same bits in each run, with recompute, and however their slots are dealt to ranks.

use candle_core::{DType, Tensor};
use glmddp::config::plan::LossMean;
use glmddp::data::MicroBatch;
use glmddp::digest::sha256_hex;
use glmddp::dist::{Collectives, ProcessGroup, Reduction, local};
use glmddp::kernels::cuda;
use glmddp::model::{ChatGlm2, Recompute};
use glmddp::optim::AdamWConfig;
use glmddp::peft::PeftMethod;
use glmddp::telemetry::PhaseTimer;
use glmddp::train::TrainError;
use glmddp::train::optimizer::Optimizer;
use glmddp::train::requests::Wish;
use glmddp::train::step::{StepSettings, Trainer, gradient_sum};

use crate::libraries::{in_two_orders, inside, is_inside, plain, this_test};
use crate::passes::{methods, model, rows};

const NUM_SLOTS: usize = 5;
const NUM_STEPS: usize = 2;
/// Below what the gradients have.
const MAX_NORM: f64 = 0.01;

/// Row lengths of the slots of a step.
const LENGTHS: [&[u32]; NUM_SLOTS] = [&[5, 40], &[33], &[17, 3, 9], &[64], &[2, 30]];

#[derive(Clone, Copy, Debug)]
struct Setup {
    dtype: DType,
    recompute: Recompute,
    is_sharded: bool,
}

impl Setup {
    const PLAIN: Self = Self { dtype: DType::BF16, recompute: Recompute::None, is_sharded: false };
}

/// What steps come to: losses, norms and parameters, as bits.
fn train(tensors: &dyn Collectives, which: usize, setup: Setup) -> Result<String, TrainError> {
    let device = cuda::tensor_device(0)?;
    let model = model(setup.dtype, &device);
    let (_, mut method) = methods(&model).swap_remove(which);
    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
    let num_elements = method.params().layout().num_elements();
    let mut optimizer = if setup.is_sharded {
        Optimizer::sharded(config, num_elements, &device, tensors)?
    } else {
        Optimizer::replicated(config, num_elements, &device)?
    };
    let sum = gradient_sum(tensors, Reduction::SlotTree, NUM_SLOTS, &*method, &optimizer)?;
    let settings = StepSettings { recompute: setup.recompute, loss_mean: LossMean::Token, max_grad_norm: Some(MAX_NORM) };
    let group = tensors.group();
    let (rank, world_size) = (group.rank(), group.world_size());
    let mut bytes = Vec::new();
    for step in 0..NUM_STEPS {
        let slots: Vec<_> =
            (rank * NUM_SLOTS / world_size..(rank + 1) * NUM_SLOTS / world_size).map(|slot| (slot, slot_of(&model, step, slot))).collect();
        let mut trainer =
            Trainer { model: &model, method: &mut *method, optimizer: &mut optimizer, sum: &sum, settings, wish: &Wish::default };
        let outcome = trainer.step(&slots, 1e-2, &PhaseTimer::default())?;
        assert!(outcome.grad_norm > MAX_NORM, "nothing is clipped: {}", outcome.grad_norm);
        bytes.extend(outcome.loss.to_le_bytes().into_iter().chain(outcome.grad_norm.to_le_bytes()));
    }
    Ok(sha256_hex([bytes, values(&*method)?].concat()))
}

fn values(method: &dyn PeftMethod) -> candle_core::Result<Vec<u8>> {
    Ok(method.params().flat().to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect())
}

fn slot_of(model: &ChatGlm2, step: usize, slot: usize) -> MicroBatch {
    rows(model, LENGTHS[slot], (step * NUM_SLOTS + slot) as u64)
}

/// The bits of a run, the same on all ranks.
fn bits(world_size: usize, which: usize, setup: Setup) -> String {
    let all: Vec<String> = local::run(world_size, |tensors| train(tensors, which, setup)).into_iter().map(Result::unwrap).collect();
    assert!(all.iter().all(|bits| *bits == all[0]), "{all:?}");
    all[0].clone()
}

#[test]
fn steps_have_the_same_bits_on_1_to_3_ranks_with_recompute_and_with_a_sharded_optimizer() {
    inside(this_test!(), plain(), || {
        let recompute = Setup { recompute: Recompute::Block, ..Setup::PLAIN };
        let sharded = Setup { is_sharded: true, ..Setup::PLAIN };
        // Of ranks alone, of recompute and of shards, each with each method; the combinations with the first.
        let cases: [&[(usize, Setup)]; 3] = [
            &[(1, recompute), (2, Setup::PLAIN), (2, sharded), (3, Setup::PLAIN), (3, sharded)],
            &[(1, recompute), (3, sharded)],
            &[(2, recompute), (3, sharded)],
        ];
        for (which, cases) in cases.into_iter().enumerate() {
            let alone = bits(1, which, Setup::PLAIN);
            for &(world_size, setup) in cases {
                assert_eq!(alone, bits(world_size, which, setup), "method {which} on {world_size} ranks, {setup:?}");
            }
            assert_ne!(alone, bits(1, which, Setup { dtype: DType::F32, ..Setup::PLAIN }));
        }
    });
}

/// In any order that the driver may choose, with every access checked.
#[test]
fn steps_have_the_same_bits_in_each_order() {
    let test = this_test!();
    if is_inside() {
        for which in 0..3 {
            println!("\n> {}", bits(2, which, Setup::PLAIN));
        }
        return;
    }
    let [first, second] = in_two_orders(test);
    assert_eq!((first.len(), &first), (3, &second));
}

#[test]
fn step_of_a_loss_that_is_not_finite_names_its_slot_and_changes_nothing() {
    inside(this_test!(), plain(), || {
        for world_size in [1, 2] {
            let outcomes = local::run(world_size, |tensors| {
                let device = cuda::tensor_device(0)?;
                let model = model(DType::F32, &device);
                for (name, mut method) in methods(&model) {
                    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
                    let mut optimizer = Optimizer::replicated(config, method.params().layout().num_elements(), &device)?;
                    let sum = gradient_sum(tensors, Reduction::SlotTree, NUM_SLOTS, &*method, &optimizer)?;
                    let settings = StepSettings { recompute: Recompute::None, loss_mean: LossMean::Token, max_grad_norm: Some(1.0) };
                    let (rank, world_size) = (tensors.rank(), tensors.world_size());
                    let own = rank * NUM_SLOTS / world_size..(rank + 1) * NUM_SLOTS / world_size;
                    let slots: Vec<_> = own.map(|slot| (slot, slot_of(&model, 0, slot))).collect();
                    let flat = method.params().flat().clone();
                    let bad = flat.to_vec1::<f32>()?.into_iter().enumerate().map(|(i, x)| if i == 7 { f32::INFINITY } else { x });
                    method.params_mut().load_flat(&Tensor::from_iter(bad, &candle_core::Device::Cpu)?)?;
                    method.refresh()?;
                    let before = values(&*method)?;
                    let mut trainer = Trainer {
                        model: &model,
                        method: &mut *method,
                        optimizer: &mut optimizer,
                        sum: &sum,
                        settings,
                        wish: &Wish::default,
                    };
                    let error = trainer.step(&slots, 1e-2, &PhaseTimer::default()).unwrap_err();
                    let TrainError::NotFinite { slots, .. } = &error else { panic!("{name}: {error}") };
                    // A projection's tanh is finite still, and its gradient is not.
                    assert_eq!(*slots, if name == "projected prefix" { vec![] } else { vec![0, 1, 2, 3, 4] }, "{name}: {error}");
                    assert_eq!(values(&*method)?, before, "{name}");
                    let moments = optimizer.state(optimizer.shard())?;
                    for (kind, moment) in moments {
                        assert!(moment.to_vec1::<f32>()?.iter().all(|&x| x == 0.0), "{name}: {kind}");
                    }
                }
                Ok::<_, TrainError>(())
            });
            outcomes.into_iter().for_each(|outcome| outcome.unwrap());
        }
    });
}
