//! `glmddp plan` says of each method what is its own.

use glmddp::config::values::FinetuningType;
use glmddp::config::{RunConfig, Sources};

use crate::cli_support::glmddp_in;

fn ok(dir: &std::path::Path, args: &str) -> String {
    let ran = glmddp_in(dir, &args.split_whitespace().collect::<Vec<_>>());
    assert_eq!(ran.code, 0, "{args}: {}", ran.stderr);
    ran.stdout
}

#[test]
fn plan_of_every_method_has_its_own_lines() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(dir, "init-model --preset tiny --num_layers 4 --output_dir model");
    ok(dir, "demo-data --output_dir data --rows 40 --dev_rows 1");
    let run = "--model_name_or_path model --train_file data/train.jsonl --max_steps 10";
    for name in ["one", "two"] {
        ok(
            dir,
            &format!(
                "train {run} --max_steps 1 --global_batch_size 1 --finetuning_type adapter --adapter_name {name} --output_dir {name} --quiet"
            ),
        );
    }
    let mut all = String::new();
    for method in FinetuningType::ALL {
        let name = method.name();
        let more = match name {
            "adapter_fusion" => "--fusion_adapters one/adapter,two/adapter",
            _ => "",
        };
        let text = ok(dir, &format!("plan {run} --output_dir out --finetuning_type {name} {more}"));
        all += &format!("== {name}\n{}\n", own_lines(&text));
    }
    for more in ["--finetuning_type full --recompute block", "--finetuning_type freeze --freeze_trainable_modules output_layer"] {
        all += &format!("== {more}\n{}\n", own_lines(&ok(dir, &format!("plan {run} --output_dir out {more}"))));
    }
    insta::assert_snapshot!("plan_of_every_method", all);
}

/// The lines that differ from method to method.
fn own_lines(text: &str) -> String {
    let shared = ["data", "batch", "length", "output", "tokens"];
    let mut is_own = true;
    let own = text.lines().filter(|line| {
        if !line.starts_with(' ') {
            is_own = !shared.iter().any(|label| line.starts_with(label));
        }
        is_own
    });
    own.map(|line| format!("{line}\n")).collect()
}

#[test]
fn help_has_the_default_learning_rate_of_every_method() {
    let help = glmddp_in(std::path::Path::new("."), &["train", "--help"]).stdout;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let listed = help.split_once("Peak learning rate [default: ").unwrap().1.split_once(']').unwrap().0;
    let mut config = RunConfig::default();
    config.model.model_name_or_path = Some("m".into());
    config.data.train_file = Some("t".into());
    config.run.output_dir = Some("o".into());
    let expected = FinetuningType::ALL.iter().map(|&kind| {
        config.method.finetuning_type = Some(kind);
        config.method.fusion_adapters = (kind.name() == "adapter_fusion").then(|| "a,b".to_owned());
        let rate = config.resolve(1, &Sources::default()).unwrap().optim.learning_rate;
        format!("{rate:e} for {}", kind.name())
    });
    let mut expected: Vec<String> = expected.collect();
    let mut listed: Vec<String> = listed.split(", ").map(str::to_owned).collect();
    expected.sort();
    listed.sort();
    assert_eq!(listed, expected);
}
