//! What goldens do not hold of a tuning method: dropout's gradient, and that a row's randomness is its own.

use candle_core::Tensor;
use glmddp::data::MicroBatch;
use glmddp::model::{ChatGlm2, Recompute};
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::{FinetuningType, MethodPlan, PeftMethod, create};
use glmddp::rng::{KeyedRng, Stream};
use glmddp::train::backprop::forward_backward;

use crate::golden::cases;
use crate::golden_model::model;
use crate::golden_train::micro_batch;

/// Updates of all linear layers with dropout, A and B random.
fn lora(model: &ChatGlm2) -> Box<dyn PeftMethod> {
    let keys = MethodKeys {
        lora_rank: Some(4),
        lora_alpha: Some(8.0),
        lora_dropout: Some(0.3),
        lora_target: Some("all".to_owned()),
        ..MethodKeys::default()
    };
    let mut method = create(&MethodPlan::resolve(FinetuningType::Lora, &keys).unwrap(), model, 7).unwrap();
    let n = method.params().layout().num_elements();
    let values = KeyedRng::new(1, Stream::ParameterInit, 2).normal(n).into_iter().map(|x| 0.1 * x).collect();
    set(&mut *method, values);
    method
}

fn set(method: &mut dyn PeftMethod, values: Vec<f32>) {
    let flat = Tensor::new(values, &candle_core::Device::Cpu).unwrap();
    let tensors = method.params().layout().views(&flat).unwrap();
    method.params_mut().load(&tensors).unwrap();
}

fn two_rows() -> (ChatGlm2, [MicroBatch; 3]) {
    let case = cases().remove(0);
    let inputs = case.tensors("inputs").unwrap();
    let (ids, labels) = (inputs["tr_ids"].get(0).unwrap(), inputs["tr_labels"].get(0).unwrap());
    let part = |start, len| {
        let mut batch = micro_batch(&ids.narrow(0, start, len).unwrap(), &labels.narrow(0, start, len).unwrap());
        batch.stream_positions = (start as u64..(start + len) as u64).map(|row| 40 + row).collect();
        batch
    };
    (model(&case), [part(0, 2), part(0, 1), part(1, 1)])
}

/// Central differences of the loss along the gradient.
fn assert_slope(model: &ChatGlm2, method: &mut dyn PeftMethod, batch: &MicroBatch) {
    let gradient: Vec<f32> = forward_backward(model, &*method, batch, Recompute::None).unwrap().site_grad.to_vec1().unwrap();
    let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    let start = method.params().flat().to_vec1::<f32>().unwrap();
    let mut loss_at = |step: f64| {
        let moved = start.iter().zip(&gradient).map(|(&x, &g)| (f64::from(x) + step * f64::from(g) / norm) as f32).collect();
        set(&mut *method, moved);
        forward_backward(model, &*method, batch, Recompute::None).unwrap().read_nll().unwrap().into_iter().map(f64::from).sum::<f64>()
    };
    let step = 0.05 / norm;
    let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
    assert!((slope / norm - 1.0).abs() < 0.01, "slope {slope}, norm of the gradient {norm}");
}

#[test]
fn low_rank_gradient_under_dropout_is_the_slope_of_the_loss() {
    let (model, [batch, ..]) = two_rows();
    assert_slope(&model, &mut *lora(&model), &batch);
}

#[test]
fn factors_of_one_change_no_bit_and_their_gradient_is_the_slope_of_the_loss() {
    let (model, [batch, ..]) = two_rows();
    for feedforward in ["dense_4h_to_h", "query_key_value,dense,dense_h_to_4h,dense_4h_to_h"] {
        let keys = MethodKeys {
            ia3_target: Some("query_key_value,dense,dense_h_to_4h,dense_4h_to_h".to_owned()),
            ia3_feedforward: Some(feedforward.to_owned()),
            ..MethodKeys::default()
        };
        let mut method = create(&MethodPlan::resolve(FinetuningType::Ia3, &keys).unwrap(), &model, 7).unwrap();
        let base = glmddp::train::backprop::forward(&model, None, &batch).unwrap();
        assert_eq!(glmddp::train::backprop::forward(&model, Some(&*method), &batch).unwrap(), base);
        let n = method.params().layout().num_elements();
        let values = KeyedRng::new(1, Stream::ParameterInit, 2).normal(n).into_iter().map(|x| 1.0 + 0.1 * x).collect();
        set(&mut *method, values);
        let kept = forward_backward(&model, &*method, &batch, Recompute::None).unwrap().site_grad.to_vec1::<f32>().unwrap();
        assert_eq!(kept, forward_backward(&model, &*method, &batch, Recompute::Block).unwrap().site_grad.to_vec1::<f32>().unwrap());
        assert_slope(&model, &mut *method, &batch);
        // Folded into the weights, the loss is the same up to rounding.
        let tuned = glmddp::train::backprop::forward(&model, Some(&*method), &batch).unwrap();
        let mut merged = model.clone();
        merged.replace_weights(&method.merged_base_weights(&model).unwrap().unwrap()).unwrap();
        let folded = glmddp::train::backprop::forward(&merged, None, &batch).unwrap();
        assert!((folded / tuned - 1.0).abs() < 1e-5, "{folded} {tuned}");
    }
}

#[test]
fn low_rank_dropout_of_a_row_does_not_depend_on_what_it_is_packed_with() {
    let (model, [both, first, second]) = two_rows();
    let method = lora(&model);
    let nll = |batch| forward_backward(&model, &*method, batch, Recompute::None).unwrap().read_nll().unwrap();
    assert_eq!(nll(&both), [nll(&first), nll(&second)].concat());
    let mut elsewhere = first.clone();
    elsewhere.stream_positions[0] += 1;
    assert_ne!(nll(&first), nll(&elsewhere), "another place in the stream, another mask");
}
