//! Adapters and their fusion beyond the goldens' numbers: exact zeros, files written and read back, the regularization's slope, counted
//! operations, and what a user can get wrong.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use glmddp::bench::flops;
use glmddp::bench::setup::BenchSetup;
use glmddp::model::config::ModelConfig;
use glmddp::model::{ChatGlm2, Recompute};
use glmddp::peft::adapter::{self, Adapter, AdapterKind};
use glmddp::peft::adapter_fusion::AdapterFusion;
use glmddp::peft::keys::MethodKeys;
use glmddp::peft::{ExportContext, FinetuningType, MethodPlan, PeftMethod};
use glmddp::train::backprop::forward_backward;

use crate::cli_support::glmddp_in;
use crate::golden::{Case, cases};
use crate::golden_model::model;
use crate::golden_subjects::{bottleneck, golden_fusion};
use crate::golden_train::micro_batch;

fn export(method: &dyn PeftMethod, dir: &Path, config: &ModelConfig) {
    let about = serde_json::json!({ "base_fingerprint": "f" });
    for (name, bytes) in method.export(&ExportContext { model_dir: Path::new("model"), config, dtype: None, about: &about }).unwrap() {
        std::fs::create_dir_all(dir.join(&name).parent().unwrap()).unwrap();
        std::fs::write(dir.join(name), bytes).unwrap();
    }
}

/// Writes a fresh Pfeiffer adapter.
fn fresh(name: &str, dir: &Path, config: &ModelConfig) {
    let keys = MethodKeys { adapter_name: Some(name.to_owned()), ..MethodKeys::default() };
    export(&Adapter::new(adapter::Settings::resolve(&keys).unwrap(), config, 1).unwrap(), dir, config);
}

fn assert_same(one: &dyn PeftMethod, other: &dyn PeftMethod) {
    assert_eq!(one.sizes(), other.sizes());
    assert_eq!(one.params().layout(), other.params().layout());
    let bits = |method: &dyn PeftMethod| method.params().flat().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(one) == bits(other), "other values");
}

fn first_with(file: &str) -> (Case, ChatGlm2) {
    let case = cases().into_iter().find(|case| case.tensors(file).is_some()).expect("a case with this file");
    let model = model(&case);
    (case, model)
}

#[test]
fn adapters_with_a_zero_output_matrix_give_their_input_matrix_exactly_no_gradient() {
    for file in ["adapter_houlsby_fresh", "adapter_pfeiffer_fresh"] {
        let (case, model) = first_with(file);
        let (inputs, method) = (case.tensors("inputs").unwrap(), bottleneck(&model, &case.tensors(file).unwrap(), "a"));
        let batch = micro_batch(&inputs["tr_ids"].get(0).unwrap(), &inputs["tr_labels"].get(0).unwrap());
        let grads = forward_backward(&model, &method, &batch, Recompute::None).unwrap().site_grad;
        for (name, grad) in method.params().layout().views(&grads).unwrap() {
            let largest = grad.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert_eq!(largest == 0.0, name.contains("adapter_down"), "{file}: {name}: {largest}");
        }
    }
}

#[test]
fn adapters_and_fusion_written_and_read_back_are_the_same() {
    let (case, model) = first_with("adapter_fusion");
    for file in ["adapter_houlsby_random", "adapter_pfeiffer_random"] {
        let (dir, method) = (tempfile::tempdir().unwrap(), bottleneck(&model, &case.tensors(file).unwrap(), "a"));
        export(&method, dir.path(), &model.config);
        assert_same(&Adapter::read(dir.path(), &model.config).unwrap(), &method);
    }
    let dir = tempfile::tempdir().unwrap();
    let method = golden_fusion(&model, &case.tensors("adapter_fusion").unwrap(), 0.0);
    export(&method, dir.path(), &model.config);
    assert_same(&AdapterFusion::read(dir.path(), &model.config).unwrap(), &method);
    assert_same(
        &Adapter::read(&dir.path().join("b"), &model.config).unwrap(),
        &bottleneck(&model, &case.tensors("adapter_fusion").unwrap(), "b"),
    );
}

#[test]
fn fusion_regularization_is_the_librarys_and_its_gradient_the_slope() {
    for case in cases() {
        let Some(golden) = case.tensors("adapter_fusion") else { continue };
        let model = model(&case);
        let mut method = golden_fusion(&model, &golden, 0.01);
        let (ours, theirs) = (method.regularization().unwrap(), f64::from(golden["regularization"].to_scalar::<f32>().unwrap()));
        assert!((ours / theirs - 1.0).abs() < 1e-5, "{ours}, golden {theirs}");
        let flat = method.params().flat().copy().unwrap();
        let grad = method.param_grad(&flat.zeros_like().unwrap()).unwrap();
        let norm_squared = f64::from(grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        let mut at = |step: f64| {
            let moved = (&flat + (&grad * step).unwrap()).unwrap();
            let tensors = method.params().layout().views(&moved).unwrap();
            method.params_mut().load(&tensors).unwrap();
            method.regularization().unwrap()
        };
        let slope = (at(1.0) - at(-1.0)) / 2.0;
        assert!(norm_squared > 0.0 && (slope / norm_squared - 1.0).abs() < 1e-3, "slope {slope}, norm {norm_squared}");
    }
}

/// Sizes at which what the kernels round up to is little.
fn bench(method: MethodPlan, recompute: Recompute) -> BenchSetup {
    let size = |n| NonZeroUsize::new(n).unwrap();
    let (rows, slots) = (size(2), size(1));
    BenchSetup {
        layers: 4,
        hidden: 512,
        ffn: 1368,
        heads: 8,
        groups: 2,
        kv: 64,
        vocab: 1024,
        method,
        rows,
        slots,
        recompute,
        tokenizer: None,
        train_file: None,
        seq: 128,
    }
}

#[test]
fn adapters_and_fusion_compute_no_more_products_than_their_ideal() {
    let dir = tempfile::tempdir().unwrap();
    let mut plans = Vec::new();
    for kind in [AdapterKind::Houlsby, AdapterKind::Pfeiffer] {
        let keys = MethodKeys { adapter_config: Some(kind), ..MethodKeys::default() };
        plans.push(MethodPlan::resolve(FinetuningType::Adapter, &keys).unwrap());
    }
    let config = ModelConfig { num_layers: 4, hidden_size: 512, ..first_with("adapter_fusion").1.config };
    let folders: Vec<PathBuf> = ["x", "y"].iter().map(|name| dir.path().join(name)).collect();
    folders.iter().zip(["x", "y"]).for_each(|(folder, name)| fresh(name, folder, &config));
    let listed = format!("{},{}", folders[0].display(), folders[1].display());
    let keys = MethodKeys { fusion_adapters: Some(listed), ..MethodKeys::default() };
    plans.push(MethodPlan::resolve(FinetuningType::AdapterFusion, &keys).unwrap());
    for plan in plans {
        for recompute in [Recompute::None, Recompute::Block] {
            let count = flops::count(&bench(plan.clone(), recompute)).unwrap();
            println!("{:?} {recompute:?}: counted / ideal = {:.4}", plan.kind(), count.ratio());
            // Houlsby's ideal has the attention of the lowest layer in it, whose gradient is not computed.
            assert!((0.97..1.02).contains(&count.ratio()), "{plan:?} {recompute:?}: {count:?}");
        }
    }
}

/// A folder with models of 2 and 3 layers, rows, adapters of one step each, and one for a wider model.
fn trained() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = |output: &str, more: &[&str]| {
        let ran = glmddp_in(dir.path(), &[&["init-model", "--preset=tiny", "--output_dir", output][..], more].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    };
    model("model", &["--num_layers=2"]);
    model("deeper", &["--num_layers=3"]);
    assert_eq!(glmddp_in(dir.path(), &["demo-data", "--output_dir=data", "--rows=20", "--dev_rows=4"]).code, 0);
    for (output, model, more) in [
        ("one", "model", ["--adapter_name=one", "--adapter_config=pfeiffer"]),
        ("two", "model", ["--adapter_name=two", "--adapter_config=pfeiffer"]),
        ("houlsby", "model", ["--adapter_name=three", "--adapter_config=houlsby"]),
        ("deep", "deeper", ["--adapter_name=two", "--adapter_config=pfeiffer"]),
    ] {
        let ran = train(dir.path(), model, output, &[&["--finetuning_type=adapter"][..], &more].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let config = ModelConfig::load(&dir.path().join("model")).unwrap();
    fresh("two", &dir.path().join("wide/adapter"), &ModelConfig { hidden_size: 2 * config.hidden_size, ..config });
    dir
}

fn train(dir: &Path, model: &str, output: &str, args: &[&str]) -> crate::cli_support::Ran {
    let (model, output) = (format!("--model_name_or_path={model}"), format!("--output_dir={output}"));
    let fixed = ["train", &model, &output, "--train_file=data/train.jsonl", "--max_steps=1", "--max_source_length=32"];
    let more = ["--max_target_length=16", "--per_device_train_batch_size=2", "--global_batch_size=2", "--threads=1", "--quiet"];
    glmddp_in(dir, &[&fixed[..], &more, args].concat())
}

#[test]
fn fusion_of_what_cannot_be_joined_is_refused_with_both_values() {
    let dir = trained();
    let refused = |adapters: &str| {
        let ran = train(dir.path(), "model", "out", &["--finetuning_type=adapter_fusion", "--fusion_adapters", adapters]);
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{adapters}: {}", ran.stderr);
        // The two bases' fingerprints change with the weights that init-model draws.
        let hashes = regex::Regex::new("[0-9a-f]{64}").unwrap();
        // Warnings of rows that are cut short go before it.
        let error = ran.stderr.find("error: ").map_or(ran.stderr.as_str(), |at| &ran.stderr[at..]);
        hashes.replace_all(error, "SHA256").into_owned()
    };
    insta::assert_snapshot!("fusion_of_one_adapter", refused("one/adapter"));
    insta::assert_snapshot!("fusion_with_a_missing_folder", refused("one/adapter,no/such"));
    insta::assert_snapshot!("fusion_with_a_houlsby_adapter", refused("one/adapter,houlsby/adapter"));
    insta::assert_snapshot!("fusion_of_adapters_of_one_name", refused("one/adapter,one/adapter"));
    insta::assert_snapshot!("fusion_of_adapters_of_two_bases", refused("one/adapter,deep/adapter"));
    // Without what this program adds, as the library saves it, the sizes tell.
    for folder in ["deep", "wide"] {
        std::fs::remove_file(dir.path().join(folder).join("adapter/glmddp.json")).unwrap();
    }
    insta::assert_snapshot!("fusion_with_an_adapter_of_more_layers", refused("one/adapter,deep/adapter"));
    insta::assert_snapshot!("fusion_with_an_adapter_of_another_width", refused("one/adapter,wide/adapter"));
    let config = dir.path().join("two/adapter/adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap().replace("\"scaling\": 1.0", "\"scaling\": 4.0");
    std::fs::write(config, text).unwrap();
    insta::assert_snapshot!("fusion_with_a_scaled_adapter", refused("one/adapter,two/adapter"));
}

#[test]
fn adapter_with_a_name_or_factor_that_cannot_be_used_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |arg: &str| train(dir.path(), "model", "out", &["--finetuning_type=adapter", arg]).stderr;
    insta::assert_snapshot!("adapter_name_with_a_dot", refused("--adapter_name=a.b"));
    insta::assert_snapshot!("reduction_factor_of_0", refused("--reduction_factor=0"));
}
