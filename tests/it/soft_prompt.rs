//! Soft tokens beyond the goldens of `golden_methods.rs`: their start, their encoders' gradients, decoding, and PEFT's folders.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use glmddp::kernels::attention::Rows;
use glmddp::model::chatglm2::{Keep, Tokens};
use glmddp::model::hooks::{BaseWeight, Hooks};
use glmddp::model::shape::ModelShape;
use glmddp::model::{ChatGlm2, Recompute, generate, loss};
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::p_tuning::{EncoderKind, PTuning};
use glmddp::peft::prompt_encoder::{PromptEncoder, Shape};
use glmddp::peft::prompt_tuning::{PromptInit, PromptTuning};
use glmddp::peft::{ExportContext, FinetuningType, MethodError, MethodPlan, PeftMethod, create};
use glmddp::train::backprop::{SlotPass, forward_backward};
use serde_json::{Value, json};

use crate::golden::cases;
use crate::golden_batch::eval_hooks;
use crate::golden_methods::not_there;
use crate::golden_model::model;
use crate::golden_subjects::prompt_encoder;
use crate::golden_train::micro_batch;

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(t: &Tensor) -> Vec<u32> {
    values(t).into_iter().map(f32::to_bits).collect()
}

fn fresh(model: &ChatGlm2, kind: FinetuningType, keys: &MethodKeys, seed: u64) -> Box<dyn PeftMethod> {
    create(&MethodPlan::resolve(kind, keys).unwrap(), model, seed).unwrap()
}

fn write(dir: &Path, method: &dyn PeftMethod, model: &ChatGlm2, base: &Path) {
    let about = json!({"method": method.name()});
    for (name, bytes) in method.export(&ExportContext { model_dir: base, config: &model.config, dtype: None, about: &about }).unwrap() {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn golden_soft_prompts_as_peft_saves_them_are_read_back_and_written_again() {
    for case in cases() {
        let model = model(&case);
        for file in ["prompt_tuning", "p_tuning_lstm", "p_tuning_mlp"] {
            let (dir, golden) = (case.dir.join(format!("peft_{file}")), case.compare(file));
            let (true, Some(mut c)) = (dir.exists(), golden) else {
                not_there(&case, &format!("peft_{file}"));
                continue;
            };
            let read = PromptTuning::read_peft(&dir, &model).unwrap();
            let table = read.table().unwrap();
            let method: Box<dyn PeftMethod> = if file == "prompt_tuning" {
                assert!(bits(&table) == bits(&c.golden["prompt_embeddings"]), "{}", dir.display());
                Box::new(PromptTuning::read_peft(&dir, &model).unwrap())
            } else {
                c.check("output", &table); // PEFT's encoder rounds otherwise in the last bits
                let encoder = prompt_encoder(&model, &c.golden);
                c.check("output", encoder.table());
                c.finish();
                Box::new(encoder)
            };
            assert_eq!(method.sizes()["num_virtual_tokens"], read.sizes()["num_virtual_tokens"]);
            let again = tempfile::tempdir().unwrap();
            write(again.path(), &*method, &model, &case.dir.join("hf"));
            let reread = PromptTuning::read_peft(again.path(), &model).unwrap().table().unwrap();
            assert!(bits(&reread) == bits(&eval_hooks(&*method).soft_tokens().unwrap().unwrap()), "{file}: written and read again");
            let mut expected = read_json(&dir.join("adapter_config.json"));
            let mut ours = read_json(&again.path().join("adapter_config.json"));
            for config in [&mut expected, &mut ours] {
                let keys = config.as_object_mut().unwrap();
                keys.remove("peft_version");
                keys.insert("base_model_name_or_path".to_owned(), Value::Null);
            }
            assert_eq!(ours, expected, "{}", dir.display());
            println!("golden {:<12} peft_{file:<19} read, written with the same keys and read again", case.name());
        }
    }
}

#[test]
fn soft_tokens_in_greedy_decoding_with_a_cache_equal_a_pass_over_all_tokens() {
    for case in cases() {
        let model = model(&case);
        let keys = MethodKeys { num_virtual_tokens: Some(5), prompt_init: Some(PromptInit::Random), ..MethodKeys::default() };
        let encoder = MethodKeys { num_virtual_tokens: Some(5), ..MethodKeys::default() };
        for method in [fresh(&model, FinetuningType::PromptTuning, &keys, 3), fresh(&model, FinetuningType::PTuning, &encoder, 3)] {
            let hooks = eval_hooks(&*method);
            let prompt = [5u32, 17, 4, 200, 33];
            let decoded = generate::greedy(&model, &*hooks, &prompt, 12, None).unwrap();
            let mut all = prompt.to_vec();
            for (step, (&id, &margin)) in decoded.ids.iter().zip(&decoded.margins).enumerate() {
                let logits = last_logits(&model, &*hooks, &all);
                let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                let second = (0..logits.len()).filter(|&i| i != best).map(|i| logits[i]).fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(id as usize, best, "{} {} token {step}", case.name(), method.name());
                assert!((margin - (logits[best] - second)).abs() < 1e-3, "{} token {step}: margin {margin}", case.name());
                all.push(id);
            }
            let without = generate::greedy(&model, &glmddp::model::hooks::NoHooks, &prompt, 12, None).unwrap();
            assert_ne!(decoded.margins, without.margins, "the soft tokens are seen");
        }
    }
}

fn last_logits(model: &ChatGlm2, hooks: &dyn Hooks, ids: &[u32]) -> Vec<f32> {
    let (positions, bounds) = ((0..ids.len() as u32).collect::<Vec<_>>(), [0, ids.len()]);
    let tokens = Tokens { ids, positions: &positions, rows: Rows { bounds: &bounds, keep: None, tables: None } };
    let (hidden, _) = model.forward(tokens, hooks, Keep::Nothing).unwrap();
    values(&loss::logits(model, &hidden.narrow(0, ids.len() - 1, 1).unwrap().contiguous().unwrap()).unwrap())
}

#[test]
fn soft_tokens_of_packed_rows_give_the_rows_own_losses_and_the_sum_of_their_gradients() {
    let case = cases().remove(0);
    let (model, inputs) = (model(&case), case.tensors("inputs").unwrap());
    let (ids, labels) = (inputs["tr_ids"].get(0).unwrap(), inputs["tr_labels"].get(0).unwrap());
    let part = |start, len| micro_batch(&ids.narrow(0, start, len).unwrap(), &labels.narrow(0, start, len).unwrap());
    let method = fresh(&model, FinetuningType::PromptTuning, &MethodKeys::default(), 1);
    for recompute in [Recompute::None, Recompute::Block] {
        let pass = |batch| forward_backward(&model, &*method, &batch, recompute).unwrap();
        let (both, first, second) = (pass(part(0, 2)), pass(part(0, 1)), pass(part(1, 1)));
        let nll = |pass: &SlotPass| pass.read_nll().unwrap();
        assert_eq!(nll(&both), [nll(&first), nll(&second)].concat());
        assert!(bits(&both.site_grad) == bits(&(first.site_grad + second.site_grad).unwrap()), "{recompute:?}");
    }
}

#[test]
fn prompt_tuning_from_the_vocabulary_starts_as_rows_of_the_word_embedding() {
    let case = cases().remove(0);
    let model = model(&case);
    let table = |init, seed| {
        let keys = MethodKeys { num_virtual_tokens: Some(9), prompt_init: init, ..MethodKeys::default() };
        fresh(&model, FinetuningType::PromptTuning, &keys, seed).params().get("prompt_embeddings").unwrap()
    };
    let embedding = model.weight(BaseWeight::Embedding).unwrap().to_vec2::<f32>().unwrap();
    let rows = table(None, 1).to_vec2::<f32>().unwrap();
    let ids: Vec<_> = rows.iter().map(|row| embedding.iter().position(|e| e == row).expect("a row of the word embedding")).collect();
    assert!(ids.windows(2).any(|w| w[0] != w[1]), "{ids:?}");
    assert_eq!(bits(&table(None, 1)), bits(&table(Some(PromptInit::Vocab), 1)));
    assert_ne!(bits(&table(None, 1)), bits(&table(None, 2)));
    let random = values(&table(Some(PromptInit::Random), 1));
    let variance = random.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / random.len() as f64;
    assert!((0.8..1.2).contains(&variance), "{variance}");
}

const SHAPES: [Shape; 2] = [
    Shape { kind: EncoderKind::Mlp, virtual_tokens: 4, hidden_size: 6, width: 5 },
    Shape { kind: EncoderKind::Lstm, virtual_tokens: 4, hidden_size: 6, width: 3 },
];

#[test]
fn prompt_encoder_starts_within_the_bounds_of_torch() {
    for shape in SHAPES.map(|shape| Shape { hidden_size: 48, width: 16, ..shape }) {
        let encoder = PromptEncoder::new(shape, 4).unwrap();
        for (name, tensor) in encoder.params().tensors().unwrap() {
            let largest = values(&tensor).into_iter().fold(0f32, |m, x| m.max(x.abs()));
            let inputs = match (name.as_str(), shape.kind) {
                ("embedding.weight", _) => {
                    assert!(largest > 2.0, "N(0, 1)");
                    continue;
                }
                ("mlp_head.0.weight" | "mlp_head.0.bias", EncoderKind::Mlp) => 48,
                (name, EncoderKind::Lstm) if name.starts_with("mlp_head") => 32,
                _ => 16,
            };
            let bound = 1.0 / (inputs as f32).sqrt();
            assert!(largest <= bound && largest > 0.8 * bound, "{name}: {largest}, bound {bound}");
        }
        assert_eq!(shape.num_parameters(), encoder.params().layout().num_elements());
    }
}

#[test]
fn prompt_encoder_gradient_equals_finite_differences() {
    for shape in SHAPES {
        let mut encoder = PromptEncoder::new(shape, 9).unwrap();
        let n = encoder.params().layout().num_elements();
        let g: Vec<f32> = (0..shape.virtual_tokens * shape.hidden_size).map(|i| (1.7 * i as f32).sin()).collect();
        let gradient = values(&encoder.param_grad(&Tensor::new(g.clone(), &Device::Cpu).unwrap()).unwrap());
        let start = values(encoder.params().flat());
        let mut at = |moved: Vec<f32>| {
            let views = encoder.params().layout().views(&Tensor::new(moved, &Device::Cpu).unwrap()).unwrap();
            encoder.params_mut().load(&views).unwrap();
            encoder.refresh().unwrap();
            values(encoder.output()).iter().zip(&g).map(|(&x, &g)| f64::from(x) * f64::from(g)).sum::<f64>()
        };
        let (step, mut numeric) = (1e-3f32, Vec::with_capacity(n));
        for i in 0..n {
            let mut side = |by: f32| {
                let mut moved = start.clone();
                moved[i] += by;
                at(moved)
            };
            numeric.push((side(step) - side(-step)) / (2.0 * f64::from(step)));
        }
        let largest = gradient.iter().fold(0f64, |m, &g| m.max(f64::from(g.abs())));
        for (i, (numeric, &ours)) in numeric.iter().zip(&gradient).enumerate() {
            assert!((numeric - f64::from(ours)).abs() < 2e-3 * largest, "{:?} element {i}: {numeric} against {ours}", shape.kind);
        }
        assert!(
            encoder.params().layout().iter().all(|(_, entry)| gradient[entry.offset..][..entry.num_elements()].iter().any(|&g| g != 0.0))
        );
    }
}

#[test]
fn prompt_encoder_with_a_tensor_of_another_shape_is_refused() {
    let [mlp, lstm] = SHAPES;
    let tensors = PromptEncoder::new(mlp, 0).unwrap().params().tensors().unwrap();
    let text = |shape, tensors: &BTreeMap<String, Tensor>| {
        let text = PTuning::from_tensors(shape, tensors).err().unwrap().to_string();
        text.lines().next().unwrap().to_owned() // candle appends a backtrace
    };
    let lines = [text(Shape { width: 6, ..mlp }, &tensors), text(Shape { virtual_tokens: 3, ..mlp }, &tensors), text(lstm, &tensors)];
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn prompt_adapter_of_another_size_or_kind_is_refused_with_both_values() {
    let case = cases().remove(0);
    let model = model(&case);
    let dir = tempfile::tempdir().unwrap();
    let keys = MethodKeys { num_virtual_tokens: Some(3), ..MethodKeys::default() };
    let method = fresh(&model, FinetuningType::PromptTuning, &keys, 0);
    let mut lines = Vec::new();
    for (key, value) in [
        ("num_virtual_tokens", json!(4)),
        ("num_virtual_tokens", json!(0)),
        ("token_dim", json!(4096)),
        ("num_layers", json!(28)),
        ("task_type", json!("SEQ_CLS")),
        ("num_transformer_submodules", json!(2)),
        ("peft_type", json!("LORA")),
    ] {
        write(dir.path(), &*method, &model, Path::new("base"));
        let path = dir.path().join("adapter_config.json");
        let mut config = read_json(&path);
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let error: MethodError = PromptTuning::read_peft(dir.path(), &model).err().unwrap();
        let (hidden, layers) = (model.config.hidden_size, model.config.num_layers);
        let text = error.to_string().replace(&dir.path().display().to_string(), "ADAPTER");
        let text = text.replace(&format!(", {hidden}]"), ", HIDDEN]").replace(&format!("expected {hidden},"), "expected HIDDEN,");
        lines.push(text.replace(&format!("expected {layers}, the number"), "expected LAYERS, the number"));
    }
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn soft_prompt_export_says_what_others_cannot_do_with_it() {
    let case = cases().remove(0);
    let model = model(&case);
    let dir = tempfile::tempdir().unwrap();
    for kind in [FinetuningType::PromptTuning, FinetuningType::PTuning] {
        write(dir.path(), &*fresh(&model, kind, &MethodKeys::default(), 0), &model, Path::new("base"));
        insta::assert_snapshot!(
            format!("soft_prompt_about_{}", kind.name()),
            std::fs::read_to_string(dir.path().join("glmddp.json")).unwrap()
        );
    }
}

#[test]
fn soft_prompt_costs_are_those_of_the_method_made() {
    let case = cases().remove(0);
    let model = model(&case);
    let shape = ModelShape::from(&model.config);
    let lstm = MethodKeys {
        encoder_reparameterization_type: Some(EncoderKind::Lstm),
        encoder_hidden_size: Some(12),
        num_virtual_tokens: Some(7),
        ..MethodKeys::default()
    };
    let default = MethodKeys::default();
    for (kind, keys) in [(FinetuningType::PromptTuning, &default), (FinetuningType::PTuning, &default), (FinetuningType::PTuning, &lstm)] {
        let plan = MethodPlan::resolve(kind, keys).unwrap();
        let (costs, method) = (plan.settings().costs(&shape).unwrap(), create(&plan, &model, 0).unwrap());
        assert_eq!(costs.trainable_parameters, method.params().layout().num_elements() as u64);
        assert_eq!(costs.site_elements, method.site_len() as u64);
        assert_eq!(costs.site_elements, costs.soft_tokens * shape.hidden);
    }
}

#[test]
fn soft_prompt_keys_resolve_to_the_same_settings_again() {
    for kind in [FinetuningType::PromptTuning, FinetuningType::PTuning] {
        let plan = MethodPlan::resolve(kind, &MethodKeys::default()).unwrap();
        assert_eq!(MethodPlan::resolve(kind, &plan.settings().keys()).unwrap(), plan);
        let none = MethodKeys { num_virtual_tokens: Some(0), ..MethodKeys::default() };
        let error = MethodPlan::resolve(kind, &none).unwrap_err();
        assert_eq!((error.key, error.found.as_str(), error.expected), ("num_virtual_tokens", "0", "1 or more"));
    }
}
