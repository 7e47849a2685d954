//! The program trains on the GPU that is not there.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use serde_json::Value;

use crate::libraries::{plain, run, text};
use crate::support::state_sums;

const GLMDDP: &str = env!("CARGO_BIN_EXE_glmddp");

/// What all tests here train on: a base that has learnt to write adverts, and rows of another kind.
fn folder() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("standin-train");
        if dir.exists() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        std::fs::create_dir(&dir).unwrap();
        let dir = dir.as_path();
        said(dir, "init-model --preset small --num_layers 2 --output_dir random", &[]);
        said(dir, "demo-data --kind advert --output_dir adverts", &[]);
        said(dir, "demo-data --kind answer --output_dir answers", &[]);
        let full = "train --device cpu --model_name_or_path random --train_file adverts/train.jsonl --output_dir base --finetuning_type full \
                    --max_source_length 24 --max_target_length 24 --global_batch_size 16 --per_device_train_batch_size 16 --max_steps 120 \
                    --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_steps 10 --save_steps 0";
        said(dir, full, &[]);
        dir.to_owned()
    })
}

fn glmddp(dir: &Path, line: &str, variables: &[(&str, &str)]) -> Output {
    let mut args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    // A folder or file that is made in `dir`.
    for arg in &mut args {
        if dir.join(&*arg).exists() || arg.contains("out/") || ["random", "adverts", "answers", "base"].contains(&arg.as_str()) {
            *arg = dir.join(&*arg).display().to_string();
        }
    }
    run(plain(), GLMDDP, &args.iter().map(String::as_str).collect::<Vec<_>>(), variables)
}

/// What a command says that ends well.
fn said(dir: &Path, line: &str, variables: &[(&str, &str)]) -> String {
    let output = glmddp(dir, line, variables);
    assert!(output.status.success(), "{line}:\n{}", text(&output));
    text(&output)
}

const ROWS: &str = "--model_name_or_path base/adapter --train_file answers/train.jsonl --max_source_length 24 --max_target_length 24 \
                    --global_batch_size 4 --save_steps 0";

/// What the log of a run has of its steps under `key`.
fn numbers(dir: &Path, output_dir: &str, key: &str) -> Vec<f64> {
    let log = std::fs::read_to_string(dir.join(output_dir).join("trainer_log.jsonl")).unwrap();
    let records = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter_map(|record| record.get(key).and_then(Value::as_f64)).collect()
}

/// Losses in f32 on the CPU and in bf16 on the GPU, as means of ten steps.
fn both(method: &str, on_gpu: &str) -> [Vec<f64>; 2] {
    let dir = folder();
    let name = format!("{method}{on_gpu}").replace(|c: char| !c.is_alphanumeric(), "_");
    let of = |device: &str, method: &str| {
        let out = format!("out/{name}-{device}");
        said(dir, &format!("train {ROWS} --per_device_train_batch_size 4 --device {device} --output_dir {out} {method}"), &[]);
        numbers(dir, &out, "loss").chunks(10).map(|ten| ten.iter().sum::<f64>() / 10.0).collect::<Vec<_>>()
    };
    [of("cpu", method), of("cuda", &format!("{method} {on_gpu}"))]
}

/// By how much the second differs at most, relative.
fn difference([expected, found]: &[Vec<f64>; 2]) -> f64 {
    assert!(!expected.is_empty() && expected.len() == found.len());
    assert!(expected.iter().chain(found).all(|loss| loss.is_finite()));
    expected.iter().zip(found).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max)
}

#[test]
fn prefix_in_bf16_learns_as_in_f32() {
    let means = both("--pre_seq_len 32 --learning_rate 5e-2 --max_steps 40 --lr_scheduler_type cosine --warmup_steps 5", "");
    println!("mean losses of ten steps: {means:?}");
    let [_, found] = &means;
    assert!(2.0 * found[3] < found[0], "{means:?}");
    assert!(difference(&means) < 5e-3, "{means:?}");
}

#[test]
fn lora_in_bf16_learns_as_in_f32_and_a_dropped_scale_would_show() {
    let method = "--finetuning_type lora --lora_rank 8 --lora_alpha 16 --lora_target all --learning_rate 1e-3 --max_steps 10";
    let means = both(method, "");
    assert!(difference(&means) < 5e-3, "{means:?}");
    // As if the scale of lora_alpha / lora_rank were left out.
    let dropped = both(method, "--lora_alpha 8");
    assert!(difference(&dropped) > 2e-2, "{dropped:?}");
}

/// The lines that the driver counted, a line a wait, from the first step on.
fn steps(dir: &Path, method: &str, counts: &str) -> Vec<Value> {
    let folder = dir.join(counts);
    std::fs::create_dir_all(&folder).unwrap();
    // One row, again and again: all steps have the same sizes.
    let row = r#"{"content": "类型#裤*颜色#黑色", "summary": "黑色的裤子很好看"}"#;
    std::fs::write(dir.join("alike.jsonl"), format!("{row}\n").repeat(6)).unwrap();
    let line = format!(
        "train --model_name_or_path random --train_file alike.jsonl --save_steps 0 \
         --global_batch_size 6 --per_device_train_batch_size 3 --device cuda --max_steps 4 --output_dir out/{counts} {method}"
    );
    said(dir, &line, &[("GLMDDP_STANDIN_COUNTS", folder.to_str().unwrap())]);
    let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let lines = std::fs::read_to_string(file).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_step = |line: &Value| line["launches"].get("adamw_step_f32").is_some();
    assert_eq!(lines.iter().filter(|line| is_step(line)).count(), 4, "a step waits once, at its end");
    let first = lines.iter().position(is_step).unwrap();
    assert!(lines[first..first + 4].iter().all(is_step), "nothing waits between steps");
    lines[first..first + 4].to_vec()
}

/// As a person reads it.
fn described(step: &Value) -> String {
    let pairs = |key: &str| {
        let pairs = step[key].as_object().unwrap().iter().map(|(name, number)| format!("{name} {number}"));
        pairs.collect::<Vec<_>>().join(", ")
    };
    let keys = ["launches", "products", "up_pinned", "up_pageable", "down_pinned", "down_pageable", "on_device", "fills", "allocations"];
    let lines = keys.iter().map(|key| format!("{key}: {}\n", pairs(key)));
    lines.collect::<String>() + &format!("frees: {}", step["frees"])
}

/// Whoever adds a launch, a copy, an allocation or a wait to a step changes these.
#[test]
fn steady_step_of_each_method_is_counted() {
    let dir = folder();
    for (name, method) in [
        ("prefix", "--pre_seq_len 16"),
        ("projected_prefix", "--pre_seq_len 16 --prefix_projection"),
        ("lora", "--finetuning_type lora --lora_rank 8 --lora_dropout 0.1"),
        ("recompute", "--pre_seq_len 16 --recompute block"),
    ] {
        let steps = steps(dir, method, &format!("counts-{name}"));
        for step in &steps[2..] {
            assert_eq!(step, &steps[1], "{name}: a step is as the one before, in its peak too");
        }
        let number = |value: &Value| value.as_u64().unwrap();
        assert!(number(&steps[1]["peak"]) <= number(&steps[0]["peak"]), "{name}: memory grows behind the first step");
        assert_eq!(number(&steps[1]["allocations"]["number"]), number(&steps[1]["frees"]), "{name}");
        // The losses, two words a slot that say where a gradient is not finite, and two of the norm.
        let num_targets = numbers(dir, &format!("out/counts-{name}"), "target_tokens")[1];
        assert_eq!(steps[1]["down_pageable"]["bytes"], 4.0 * (num_targets + 2.0 * 2.0 + 2.0), "{name}");
        insta::assert_snapshot!(format!("counts_of_{name}"), described(&steps[1]));
    }
}

#[test]
fn run_that_stops_goes_on_to_the_same_bits() {
    let dir = folder();
    for (name, method) in [("prefix", "--pre_seq_len 8"), ("lora", "--finetuning_type lora --lora_rank 4 --lora_dropout 0.1")] {
        let line = |out: &str, more: &str| {
            format!(
                "train {ROWS} --per_device_train_batch_size 2 --lr_scheduler_type constant --output_dir out/{name}-{out} {method} {more}"
            )
        };
        let whole = said(dir, &line("whole", "--max_steps 4"), &[]);
        assert!(whole.contains("on GPU 0 (stand-in, compute capability 9.0) in bfloat16"), "{whole}");
        said(dir, &line("parts", "--max_steps 2"), &[]);
        let resumed = said(dir, &line("parts", "--max_steps 4 --resume_from_checkpoint latest"), &[]);
        assert!(resumed.contains("the probe gave what it gave then"), "{resumed}");
        let sums = |out: &str| state_sums(&dir.join(format!("out/{name}-{out}/checkpoint-4")));
        assert_eq!(sums("whole"), sums("parts"));
        // On a CPU it goes on too, and the report says what is otherwise.
        let on_cpu = said(dir, &line("parts", "--max_steps 5 --resume_from_checkpoint latest --device cpu"), &[]);
        for change in ["model.device: \"cuda\" -> \"cpu\"", "model.compute_dtype: \"bfloat16\" -> \"float32\""] {
            assert!(on_cpu.contains(&format!("{change} (allowed: from here on it changes the result)")), "{on_cpu}");
        }
        let adapter = format!("out/{name}-whole/adapter");
        let evaluated = |device: &str| {
            let line = format!(
                "evaluate --model_name_or_path base/adapter --adapter {adapter} --validation_file answers/dev.jsonl --max_eval_samples 4 \
                 --max_source_length 24 --max_target_length 24 --json --device {device}"
            );
            let said = said(dir, &line, &[]);
            let json = said.lines().find_map(|line| serde_json::from_str::<Value>(line).ok());
            json.and_then(|json| json["eval_loss"].as_f64()).unwrap_or_else(|| panic!("{said}"))
        };
        let (on_cpu, on_gpu) = (evaluated("cpu"), evaluated("cuda"));
        assert!((on_cpu - on_gpu).abs() < 5e-3 * on_cpu, "{on_cpu} {on_gpu}");
        let answer = |device: &str, dtype: &str| {
            let line = format!(
                "generate --model_name_or_path base/adapter --adapter {adapter} --prompt 类型#裤*颜色#黑色 --max_new_tokens 6 --device {device} \
                 --compute_dtype {dtype}"
            );
            let output = glmddp(dir, &line, &[]);
            assert!(output.status.success(), "{}", text(&output));
            String::from_utf8(output.stdout).unwrap()
        };
        let on_cpu = answer("cpu", "float32");
        assert!(!on_cpu.trim().is_empty());
        assert_eq!(on_cpu, answer("cuda", "float32"));
    }
}

/// What a command says that ends badly.
fn refused(line: &str, variables: &[(&str, &str)]) -> String {
    let output = glmddp(folder(), line, variables);
    assert!(!output.status.success(), "{}", text(&output));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // What comes before the error differs.
    said.find("error: ").map_or(said.clone(), |at| said[at..].to_owned())
}

#[test]
fn devices_that_cannot_be_used_are_refused_by_name() {
    let train = |more: &str| format!("train {ROWS} --max_steps 1 --output_dir out/refused --overwrite_output_dir {more}");
    let said = [
        refused(&train("--device cuda:5"), &[]),
        refused(&train("--device cuda --finetuning_type adapter"), &[]),
        refused(&train("--device cuda --finetuning_type lora --use_dora"), &[]),
        refused(&train("--device cpu --compute_dtype bfloat16"), &[]),
        refused(&train("--finetuning_type adapter --compute_dtype bfloat16"), &[]),
        refused(&train("--device cuda --finetuning_type prefix_tuning --encoder_hidden_size 33"), &[]),
        refused(&train("--device gpu"), &[]),
    ];
    insta::assert_snapshot!("devices_refused", said.join("\n"));
}

#[test]
fn device_auto_says_why_a_gpu_is_not_used() {
    let dir = folder();
    let train = |more: &str| format!("train {ROWS} --max_steps 1 --output_dir out/auto --overwrite_output_dir {more}");
    let said_of = |more: &str| said(dir, &train(more), &[]);
    let adapter = said_of("--finetuning_type adapter");
    let warning = "warning: there is a GPU, and it is not used: method adapter is computed on a CPU only, so far";
    assert!(adapter.contains(warning) && adapter.contains("(adapter), on the CPU in float32"), "{adapter}");
    let old = ("GLMDDP_STANDIN_DEVICES", "GeForce GTX 1080,6.1,8000000000");
    let on_old = said(dir, &train("--pre_seq_len 4"), &[old]);
    let warning = "warning: there is a GPU, and it is not used: GPU 0 (GeForce GTX 1080, compute capability 6.1) is too old";
    assert!(on_old.contains(warning) && on_old.contains("(ptuning_v2), on the CPU in float32"), "{on_old}");
    let prefix = said_of("--pre_seq_len 4");
    assert!(!prefix.contains("warning: there is a GPU") && prefix.contains("(ptuning_v2), on GPU 0"), "{prefix}");
}

/// The base's weights fit, and what a step needs does not.
#[test]
fn gpu_without_enough_memory_is_an_error_with_a_hint() {
    let line = format!("train {ROWS} --device cuda --max_steps 1 --output_dir out/small --overwrite_output_dir");
    let said = refused(&line, &[("GLMDDP_STANDIN_BYTES", "8000000")]);
    assert!(said.contains("CUDA_ERROR_OUT_OF_MEMORY") && said.contains("for training use `recompute = block`, or a smaller"), "{said}");
}
