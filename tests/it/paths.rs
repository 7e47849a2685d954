//! Paths as users write them (`~`, `$NAME`), and names that are not there.

use std::path::Path;

use clap::CommandFactory;
use glmddp::cli::{Cli, argv};
use glmddp::config::is_path;

use crate::cli_support::{Ran, glmddp_in, glmddp_under, ok};

/// A folder with a tiny model in `tiny`, rows in `demo`, and an empty home in `home`.
fn setup() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), "init-model --preset tiny --output_dir tiny");
    ok(dir.path(), "demo-data --output_dir demo --rows 16 --dev_rows 4");
    std::fs::create_dir(dir.path().join("home")).unwrap();
    dir
}

/// Runs with `home` as the user's.
fn at_home(dir: &Path, args: &[&str]) -> Ran {
    glmddp_under(dir, &[("HOME", dir.join("home").to_str().unwrap())], args)
}

fn told(dir: &Path, ran: &Ran) -> String {
    assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{}", ran.stderr);
    ran.stderr.replace(&dir.display().to_string(), "DIR")
}

const TRAIN: [&str; 8] = [
    "train",
    "--model_name_or_path=tiny",
    "--train_file=demo/train.jsonl",
    "--max_steps=4",
    "--save_steps=2",
    "--pre_seq_len=4",
    "--global_batch_size=2",
    "--quiet",
];

#[test]
fn tilde_and_variables_in_run_files_and_options_name_the_home() {
    let dir = setup();
    let root = dir.path();
    let keys = |output_dir: &str| {
        [("model_name_or_path", "tiny"), ("train_file", "demo/train.jsonl"), ("output_dir", output_dir)]
            .map(|(key, value)| format!("{key} = '{value}'\n"))
            .concat()
            + "max_steps = 1\nglobal_batch_size = 2\npre_seq_len = 4\n"
    };
    std::fs::write(root.join("a.toml"), keys("~/a")).unwrap();
    std::fs::write(root.join("home/b.toml"), keys("$HOME/b")).unwrap();
    std::fs::write(
        root.join("c.json"),
        r#"{"model_name_or_path": "tiny", "train_file": "demo/train.jsonl", "output_dir": "${HOME}/c",
        "max_steps": 1, "global_batch_size": 2, "pre_seq_len": 4}"#,
    )
    .unwrap();
    for args in [
        &["train", "a.toml", "-q"][..],
        &["train", "--config=~/b.toml", "-q"],
        &["train", "c.json", "-q"],
        &[&TRAIN[..], &["--output_dir=~/d"]].concat(),
        &[&TRAIN[..], &["--output_dir", "~/e", "--dump_batches=~/batches.jsonl", "--cache_dir", "$HOME/cache"]].concat(),
        &["demo-data", "--output-dir=~/rows", "--rows=4", "--dev_rows=2"],
        &["init-model", "--preset=tiny", "--output_dir=~/model"],
        &["evaluate", "--model_name_or_path=~/model", "--validation_file=~/rows/dev.jsonl"],
        &["evaluate", "--model_name_or_path=tiny", "--validation_file=demo/dev.jsonl", "--adapter", "~/e/adapter"],
        &["checkpoint", "verify", "~/e"],
        &["checkpoint", "diff", "~/e/checkpoint-2", "$HOME/e/checkpoint-4"],
        &["checkpoint", "export", "~/e", "--output_dir=~/exported"],
        &["plan", "~/b.toml"],
        &["man", "--output_dir=~/man"],
    ] {
        let ran = at_home(root, args);
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    }
    for name in
        ["a/adapter", "b/adapter", "c/adapter", "d/adapter", "e/adapter", "batches.jsonl", "cache", "rows", "model", "exported", "man"]
    {
        assert!(root.join("home").join(name).exists(), "{name}");
    }
    let mut left: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["a.toml", "c.json", "demo", "home", "tiny"], "no folder called `~` or `$HOME`");
    let kept = std::fs::read_to_string(root.join("home/a/training_args.toml")).unwrap();
    assert!(kept.contains(&format!("output_dir = \"{}/home/a\"", root.display())), "{kept}");
}

/// A `$` that is part of a name: written as `$$`, and kept so that the file of a run is read back.
#[test]
fn dollar_that_is_part_of_a_name_is_written_twice_and_kept() {
    let dir = setup();
    let root = dir.path();
    std::fs::create_dir(root.join("price$HOME")).unwrap();
    std::fs::rename(root.join("demo/train.jsonl"), root.join("price$HOME/$x.jsonl")).unwrap();
    let args = ["train", "--model_name_or_path=tiny", "--train_file=price$$HOME/$$x.jsonl", "--max_steps=1", "--pre_seq_len=4", "-q"];
    let ran = at_home(root, &[&args[..], &["--output_dir=out$$"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let kept = std::fs::read_to_string(root.join("out$/training_args.toml")).unwrap();
    assert!(kept.contains("train_file = \"price$$HOME/$$x.jsonl\"") && kept.contains("output_dir = \"out$$\""), "{kept}");
    let again = at_home(root, &["train", "out$/training_args.toml", "--overwrite_output_dir", "-q"]);
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert_eq!(
        std::fs::read_to_string(root.join("out$/training_args.toml")).unwrap(),
        kept.replace("overwrite_output_dir = false", "overwrite_output_dir = true")
    );
    let text = told(root, &at_home(root, &["plan", "--train_file=$NOWHERE/x"]));
    assert!(text.ends_with("hint: write `$$` for a `$` that is part of a name\n"), "{text}");
}

/// Every key that is a path, in a file and on the command line, and every path of every other command.
#[test]
fn every_path_is_expanded_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut cli = Cli::command();
    cli.build();
    let plan = cli.find_subcommand("plan").unwrap();
    let keys: Vec<String> = plan
        .get_arguments()
        .filter(|arg| is_path(arg))
        .filter_map(|arg| Some(arg.get_long()?.to_owned()))
        .filter(|key| key != "config")
        .collect();
    assert!(
        keys.len() >= 9 && keys.iter().any(|key| key == "fusion_adapters") && keys.iter().any(|key| key == "resume_from_checkpoint"),
        "{keys:?}"
    );
    for key in keys {
        let (needs, value) =
            if key == "fusion_adapters" { ("\"finetuning_type\": \"adapter_fusion\", ", "a,~bob/x") } else { ("", "~bob/x") };
        std::fs::write(dir.path().join("c.json"), format!("{{{needs}\n\"{key}\": \"{value}\"}}")).unwrap();
        let text = told(dir.path(), &at_home(dir.path(), &["plan", "c.json"]));
        assert!(text.contains("`~bob` is another user's home") && text.contains("c.json:2, key `"), "{key}: {text}");
        let text = told(dir.path(), &at_home(dir.path(), &["plan", &format!("--{key}={value}")]));
        assert!(text.contains(&format!("error: `{key}` is `{value}`: `~bob` is")), "{key}: {text}");
    }
    let mut num_paths = 0;
    let mut commands: Vec<(Vec<String>, &clap::Command)> = vec![(Vec::new(), &cli)];
    while let Some((words, command)) = commands.pop() {
        commands.extend(
            command
                .get_subcommands()
                .filter(|sub| sub.get_name() != "help")
                .map(|sub| (words.iter().cloned().chain([sub.get_name().to_owned()]).collect(), sub)),
        );
        for arg in command.get_arguments().filter(|arg| is_path(arg)) {
            let given = arg.get_long().map_or("$NOWHERE/x".to_owned(), |long| format!("--{long}=$NOWHERE/x"));
            let words = ["glmddp".to_owned()].into_iter().chain(words.iter().cloned()).chain([given]).map(Into::into).collect();
            let error = argv::normalise(words, Cli::command(), &|_| None).unwrap_err();
            assert!(error.to_string().ends_with("the environment variable NOWHERE is not set"), "{error}");
            num_paths += 1;
        }
    }
    assert!(num_paths > 60, "{num_paths}");
}

#[test]
fn path_that_cannot_be_expanded_is_refused_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let mut texts = Vec::new();
    for text in [
        "model_name_or_path = 'm'\ntrain_file = '~bob/t'",
        "[data]\ntrain_file = '$NOWHERE/t'",
        "[run]\nresume_from_checkpoint = '${NOWHERE'",
    ] {
        std::fs::write(dir.path().join("c.toml"), text).unwrap();
        texts.push(told(dir.path(), &at_home(dir.path(), &["plan", "c.toml"])));
    }
    std::fs::write(dir.path().join("m.toml"), "[methods.both]\nfinetuning_type = 'adapter_fusion'\nfusion_adapters = 'a,~bob/b'").unwrap();
    texts.push(told(dir.path(), &at_home(dir.path(), &["compare", "m.toml"])));
    texts.push(told(dir.path(), &at_home(dir.path(), &["checkpoint", "verify", "~bob/out"])));
    texts.push(told(dir.path(), &glmddp_under(dir.path(), &[("HOME", "")], &["generate", "--prompt=a", "--model_name_or_path=~/m"])));
    insta::assert_snapshot!("paths_not_expanded", texts.join("\n"));
}

#[test]
fn checkpoint_to_resume_is_looked_for_in_output_dir_too() {
    let dir = setup();
    let root = dir.path();
    let train = |more: &[&str]| glmddp_in(root, &[&TRAIN[..], more].concat());
    assert_eq!(train(&["--output_dir=o"]).code, 0);
    for name in ["checkpoint-2", "o/checkpoint-2", "o", "./o/", "yes", "true", "latest"] {
        let ran = train(&["--output_dir=o", "--max_steps=6", &format!("--resume_from_checkpoint={name}")]);
        assert!(ran.code == 0 && ran.stdout.starts_with("done: 6 steps"), "{name}: {}", ran.stderr);
        std::fs::remove_dir_all(root.join("o/checkpoint-6")).unwrap();
    }
    let mut texts = Vec::new();
    for name in ["auto", "checkpoint-99", "o/checkpoint-99", "p/checkpoint-2", "demo", "demo/train.jsonl"] {
        let ran = train(&["--output_dir=o", "--max_steps=6", "--resume_from_checkpoint", name]);
        texts.push(format!("{name}\n{}", told(root, &ran)));
    }
    let ran = train(&["--output_dir=new", "--resume_from_checkpoint=checkpoint-2"]);
    texts.push(format!("checkpoint-2, of a new output_dir\n{}", told(root, &ran)));
    assert!(!root.join("new").exists(), "nothing was made");
    insta::assert_snapshot!("resume_from_what_is_not_there", texts.join("\n"));
    for off in ["no", "false", "", "none"] {
        let ran = train(&["--output_dir=o", &format!("--resume_from_checkpoint={off}")]);
        assert!(ran.stderr.contains("o holds another run"), "{off:?}: {}", ran.stderr);
    }
}

#[test]
fn name_that_is_not_there_is_told_from_a_damaged_one() {
    let dir = setup();
    let root = dir.path();
    let ran = glmddp_in(root, &[&TRAIN[..], &["--output_dir=out"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let held_out = "--validation_file=demo/dev.jsonl";
    let mut texts = Vec::new();
    for args in [
        &["evaluate", held_out, "--model_name_or_path=tinny"][..],
        &["evaluate", held_out, "--model_name_or_path=THUDM/chatglm2-6b"],
        &["evaluate", held_out, "--model_name_or_path=demo/dev.jsonl"],
        &["evaluate", held_out, "--model_name_or_path=tiny", "--adapter=out/adaptor"],
        &["evaluate", held_out, "--model_name_or_path=tiny", "--adapter=out"],
        &["generate", "--prompt=a", "--model_name_or_path=tiny", "--adapter=ouut/adapter"],
        &["checkpoint", "verify", "out/checkpoint-3"],
        &["checkpoint", "inspect", "outt"],
        &["checkpoint", "diff", "out", "out/checkpoint-8"],
        &["checkpoint", "export", "checkpoint-2", "--output_dir=new"],
        &["bench", "checkpoint", "--compress", "out/checkpoint-7"],
        &["train", "run.toml"],
        &["train", "demo"],
        &["init-model", "--preset=tiny", "--output_dir=new", "--tokenizer=tiny/tokenizer.modell"],
        &["kernels", "report", "times.jsonl"],
    ] {
        texts.push(format!("{}\n{}", args.join(" "), told(root, &glmddp_in(root, args))));
    }
    insta::assert_snapshot!("names_that_are_not_there", texts.join("\n"));
}
