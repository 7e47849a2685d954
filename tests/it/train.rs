//! `glmddp train` as a user starts it: the same bits at any number of ranks, through stops and kills; a killed rank ends the job.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use glmddp::digest::sha256_hex;

use crate::cli_support::glmddp_in;
use crate::not_run::{Missing, not_run};
use crate::support;

/// Rows of a step: 12 micro-batches of 2, which 1, 2, 3 and 4 ranks share evenly.
const BATCH: [&str; 4] = ["--per_device_train_batch_size", "2", "--global_batch_size", "24"];
const PREFIX: [&str; 4] = ["--finetuning_type", "ptuning_v2", "--pre_seq_len", "8"];
const PEFT_PREFIX: [&str; 4] = ["--finetuning_type", "prefix_tuning", "--pre_seq_len", "8"];
const SOFT_TOKENS: [&str; 4] = ["--finetuning_type", "prompt_tuning", "--num_virtual_tokens", "5"];
const MLP_ENCODER: [&str; 4] = ["--finetuning_type", "p_tuning", "--num_virtual_tokens", "5"];
#[rustfmt::skip]
const LSTM_ENCODER: [&str; 8] =
    ["--finetuning_type", "p_tuning", "--num_virtual_tokens", "5", "--encoder_reparameterization_type", "LSTM", "--encoder_hidden_size", "24"];
const LOW_RANK: [&str; 8] =
    ["--finetuning_type", "lora", "--lora_rank", "4", "--lora_target", "query_key_value,dense_4h_to_h", "--lora_dropout", "0.1"];
/// 61,696 parameters, nearly four chunks of the optimizer; [`PREFIX`] has less than one, so that most shards are empty.
const WIDE_LOW_RANK: [&str; 6] = ["--finetuning_type", "lora", "--lora_rank", "16", "--lora_target", "all"];
/// Each rank needs the whole gradient of the table to pull it through the MLP, and then a shard of the result.
const PROJECTED_PREFIX: [&str; 6] = ["--finetuning_type", "ptuning_v2", "--pre_seq_len", "8", "--prefix_projection", "true"];
const FULL: [&str; 2] = ["--finetuning_type", "full"];
/// Weights rounded to bfloat16, f32 masters.
const ROUNDED_FULL: [&str; 4] = ["--finetuning_type", "full", "--torch_dtype", "bfloat16"];
const ROUNDED_FREEZE: [&str; 6] =
    ["--finetuning_type", "freeze", "--freeze_trainable_modules", "mlp,word_embeddings", "--torch_dtype", "bfloat16"];
const FREEZE: [&str; 4] = ["--finetuning_type", "freeze", "--freeze_trainable_layers", "1"];
const SHARDED: [&str; 2] = ["--shard_optimizer", "true"];
const UNSHARDED: [&str; 2] = ["--shard_optimizer", "false"];
const HOULSBY: [&str; 6] = ["--finetuning_type", "adapter", "--adapter_config", "houlsby", "--reduction_factor", "8"];
const PFEIFFER: [&str; 6] = ["--finetuning_type", "adapter", "--adapter_config", "pfeiffer", "--adapter_name", "one"];
const PFEIFFER_TWO: [&str; 6] = ["--finetuning_type", "adapter", "--reduction_factor", "8", "--adapter_name", "two"];
const FUSION: [&str; 6] =
    ["--finetuning_type", "adapter_fusion", "--fusion_adapters", "first/adapter,second/adapter", "--fusion_regularization", "0.01"];
/// A job that fails must end within this time.
const END: Duration = Duration::from_secs(10);

/// A folder with a model of 4 layers and rows.
struct Setup {
    dir: tempfile::TempDir,
    train_file: PathBuf,
    method: &'static [&'static str],
}

/// Files with weights below `dir`, sorted.
fn weight_files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("an adapter was written").map(|entry| entry.expect("a file").path());
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|ext| ext == "safetensors" || ext == "bin");
    let mut files: Vec<_> =
        entries.flat_map(|path| if path.is_dir() { weight_files(&path) } else { vec![path] }).filter(is_weights).collect();
    files.sort();
    files
}

impl Setup {
    /// With a tokenizer and rows of our own making.
    fn new(method: &'static [&'static str]) -> Self {
        let dir = Self::model(&[]);
        assert_eq!(glmddp_in(dir.path(), &["demo-data", "--output_dir", "data", "--rows", "200"]).code, 0);
        let train_file = dir.path().join("data/train.jsonl");
        Self { dir, train_file, method }
    }

    /// With AdvertiseGen's rows and the published tokenizer, if they are there.
    fn real(method: &'static [&'static str]) -> Option<Self> {
        let tokenizer = support::shared("chatglm2/tokenizer.model")?.canonicalize().unwrap();
        let train_file = support::shared("data/advertisegen/train.jsonl")?.canonicalize().unwrap();
        let dir = Self::model(&["--tokenizer", tokenizer.to_str().unwrap()]);
        Some(Self { dir, train_file, method })
    }

    fn model(more: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let init = ["init-model", "--preset", "tiny", "--num_layers", "4", "--output_dir", "model"];
        let ran = glmddp_in(dir.path(), &[&init, more].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        dir
    }

    /// `train` on `ranks` ranks into `output`; none, said loudly, where there is no mpirun and more than one rank is asked for.
    fn command(&self, ranks: usize, output: &str, args: &[&str]) -> Option<Command> {
        let program = env!("CARGO_BIN_EXE_glmddp");
        let mut command = if ranks == 1 {
            Command::new(program)
        } else {
            if !cfg!(feature = "mpi") || Command::new("mpirun").arg("--version").output().is_err() {
                not_run(Missing::Mpi, "there is no mpirun, or this build has no feature `mpi`, and the test needs both");
                return None;
            }
            let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/mpirun.sh"));
            command.args(["-n", &ranks.to_string(), program]);
            command
        };
        command.args(["train", "--model_name_or_path", "model", "--output_dir", output, "--train_file"]).arg(&self.train_file);
        command.args(["--max_train_samples", "60", "--max_source_length", "32", "--max_target_length", "24", "--threads", "1"]);
        command.args(BATCH).args(self.method).args(args).current_dir(self.dir.path()).env_remove("RUST_LOG").env("RUST_BACKTRACE", "0");
        Some(command)
    }

    fn train(&self, ranks: usize, output: &str, args: &[&str]) -> Option<Output> {
        let out = self.command(ranks, output, args)?.output().expect("the launcher starts");
        assert!(out.status.success(), "{ranks} ranks {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Some(out)
    }

    /// Hashes of the final adapter, of the parameters and moments after `steps` steps, and of the loss column of the log.
    fn hashes(&self, output: &str, steps: usize) -> Hashes {
        let output = self.dir.path().join(output);
        let files = weight_files(&output.join("adapter"));
        assert!(!files.is_empty(), "no weights in {}/adapter", output.display());
        let adapter: Vec<u8> = files.iter().flat_map(|path| std::fs::read(path).expect("a readable file")).collect();
        let state = support::state_sums(&output.join(format!("checkpoint-{steps}")));
        let log = std::fs::read_to_string(output.join("trainer_log.jsonl")).expect("a log was written");
        let losses: String = log
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line of JSON"))
            .filter_map(|record| record.get("loss").map(|loss| format!("{} {loss}\n", record["current_steps"])))
            .collect();
        Hashes { adapter: sha256_hex(&adapter), state, losses: sha256_hex(losses.as_bytes()) }
    }
}

/// What must not depend on the number of ranks.
#[derive(Debug, PartialEq, Eq)]
struct Hashes {
    adapter: String,
    state: Vec<(String, String)>,
    losses: String,
}

#[test]
fn mpirun_train_of_a_prefix_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&PREFIX);
}

#[test]
fn mpirun_train_of_a_peft_prefix_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&PEFT_PREFIX);
}

#[test]
fn mpirun_train_of_a_prefix_on_real_rows_gives_the_same_bits() {
    let Some(setup) = Setup::real(&PREFIX) else { return };
    same_bits_of(&setup, &[]);
}

#[test]
fn mpirun_train_of_the_whole_base_on_real_rows_gives_the_same_bits() {
    let Some(setup) = Setup::real(&FULL) else { return };
    same_bits_of(&setup, &SHARDED);
}

#[test]
fn mpirun_train_of_soft_tokens_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&SOFT_TOKENS);
}

#[test]
fn mpirun_train_of_an_mlp_prompt_encoder_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&MLP_ENCODER);
}

#[test]
fn mpirun_train_of_an_lstm_prompt_encoder_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&LSTM_ENCODER);
}

#[test]
fn mpirun_train_of_low_rank_updates_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&LOW_RANK);
}

#[test]
fn mpirun_train_of_a_prefix_with_a_sharded_optimizer_gives_the_same_bits() {
    same_bits(&PREFIX, &SHARDED);
}

#[test]
fn mpirun_train_of_a_projected_prefix_with_a_sharded_optimizer_gives_the_same_bits() {
    same_bits(&PROJECTED_PREFIX, &SHARDED);
}

#[test]
fn mpirun_train_of_the_whole_base_with_a_sharded_optimizer_gives_the_same_bits() {
    same_bits(&FULL, &SHARDED);
}

#[test]
fn mpirun_train_of_the_whole_base_in_bfloat16_gives_the_same_bits() {
    same_bits(&ROUNDED_FULL, &SHARDED);
}

#[test]
fn mpirun_train_of_some_weights_in_bfloat16_gives_the_same_bits() {
    same_bits(&ROUNDED_FREEZE, &SHARDED);
}

/// What is exported is what was trained: evaluated as a base of its own, in bfloat16, it has the run's last held-out loss.
#[test]
fn train_in_bfloat16_exports_all_weights_in_it_and_they_have_the_runs_own_loss() {
    let setup = Setup::new(&ROUNDED_FREEZE);
    let rows = setup.train_file.display().to_string();
    setup.train(1, "out", &["--max_steps", "3", "--validation_file", &rows, "--max_eval_samples", "5"]);
    let log = std::fs::read_to_string(setup.dir.path().join("out/trainer_log.jsonl")).unwrap();
    let records = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let in_run = records.filter_map(|record| record["eval_loss"].as_f64()).next_back().expect("an evaluation");
    let evaluate = ["evaluate", "--model_name_or_path", "out/adapter", "--validation_file", &rows, "--max_eval_samples", "5"];
    let limits = ["--max_source_length", "32", "--max_target_length", "24", "--per_device_eval_batch_size", "2", "--json"];
    let ran = glmddp_in(setup.dir.path(), &[&evaluate[..], &limits].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["eval_loss"].as_f64(), Some(in_run));
    let config = std::fs::read_to_string(setup.dir.path().join("out/adapter/config.json")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&config).unwrap()["torch_dtype"], "bfloat16");
    for file in weight_files(&setup.dir.path().join("out/adapter")) {
        let tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
        assert!(tensors.values().all(|tensor| tensor.dtype() == candle_core::DType::BF16), "{}", file.display());
    }
}

#[test]
fn mpirun_train_of_some_layers_with_a_sharded_optimizer_gives_the_same_bits() {
    same_bits(&FREEZE, &SHARDED);
}

#[test]
fn mpirun_train_of_low_rank_updates_with_a_sharded_optimizer_gives_the_same_bits() {
    same_bits(&WIDE_LOW_RANK, &SHARDED);
}

#[test]
fn mpirun_train_of_houlsby_adapters_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&HOULSBY);
}

#[test]
fn mpirun_train_of_pfeiffer_adapters_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&PFEIFFER);
}

#[test]
fn mpirun_train_of_factors_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    same_bits_on_1_to_4_ranks_and_over_resumes(&["--finetuning_type", "ia3"]);
}

#[test]
fn mpirun_train_of_a_fusion_of_two_adapters_on_1_to_4_ranks_and_over_resumes_gives_the_same_bits() {
    let mut setup = Setup::new(&PFEIFFER);
    setup.train(1, "first", &["--max_steps", "2"]);
    setup.method = &PFEIFFER_TWO;
    setup.train(1, "second", &["--max_steps", "2", "--seed", "7"]);
    setup.method = &FUSION;
    same_bits_of(&setup, &[]);
}

fn same_bits_on_1_to_4_ranks_and_over_resumes(method: &'static [&'static str]) {
    same_bits(method, &[]);
}

/// A run on one rank, not sharded, and those with `more` arguments on 1 to 4 and over resumes give the same bits.
fn same_bits(method: &'static [&'static str], more: &[&'static str]) {
    same_bits_of(&Setup::new(method), more);
}

fn same_bits_of(setup: &Setup, more: &[&'static str]) {
    let plain = |steps: &'static str| vec!["--lr_scheduler_type", "constant", "--save_steps", "2", "--max_steps", steps];
    let with = |steps: &'static str| [&plain(steps)[..], more].concat();
    setup.train(1, "one", &[&plain("6")[..], &UNSHARDED].concat());
    let expected = setup.hashes("one", 6);
    for ranks in if more.is_empty() { 2..=4 } else { 1..=4 } {
        let output = format!("ranks-{ranks}");
        if setup.train(ranks, &output, &with("6")).is_none() {
            return;
        }
        assert_eq!(setup.hashes(&output, 6), expected, "{ranks} ranks");
    }
    // 60 rows and 24 a step: steps 2 and 4 end in the middle of an epoch.
    setup.train(4, "resumed", &with("2"));
    setup.train(2, "resumed", &[&with("4")[..], &["--resume_from_checkpoint", "latest"]].concat());
    setup.train(1, "resumed", &[&with("6")[..], &["--resume_from_checkpoint", "resumed/checkpoint-4"]].concat());
    assert_eq!(setup.hashes("resumed", 6), expected, "stopped on 4 ranks, on with 2, on with 1");
    println!("{} {}: equal on 1, 2, 3, 4 ranks and over 4 -> 2 -> 1", expected.adapter, expected.losses);
}

/// The order of two ranks' sums does not matter, so that with two even a plain all-reduce has one result.
#[test]
fn mpirun_train_with_all_reduce_and_a_sharded_optimizer_gives_the_same_bits_on_2_ranks() {
    let setup = Setup::new(&WIDE_LOW_RANK);
    let args = ["--max_steps", "2", "--reduction", "all_reduce"];
    if setup.train(2, "whole", &args).is_none() {
        return;
    }
    setup.train(2, "sharded", &[&args[..], &SHARDED].concat());
    assert_eq!(setup.hashes("sharded", 2), setup.hashes("whole", 2));
    setup.train(3, "on", &[&["--max_steps", "4", "--reduction", "all_reduce"][..], &SHARDED].concat());
}

#[test]
fn mpirun_train_with_recompute_gives_the_same_bits() {
    for method in [&PREFIX[..], &LOW_RANK, &HOULSBY, &PFEIFFER] {
        let setup = Setup::new(method);
        let steps = ["--max_steps", "2"];
        setup.train(1, "kept", &steps);
        setup.train(1, "recomputed", &[&steps[..], &["--recompute", "block"]].concat());
        assert_eq!(setup.hashes("kept", 2), setup.hashes("recomputed", 2));
    }
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

/// Process ids of the ranks of this job, by rank: children of the mpirun that is a child of the script.
fn ranks_of(job: &Child, num_ranks: usize) -> Option<Vec<u32>> {
    let mut ranks = vec![None; num_ranks];
    for entry in std::fs::read_dir("/proc").ok()? {
        let Ok(pid) = entry.ok()?.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(environ) = std::fs::read(format!("/proc/{pid}/environ")) else { continue };
        let environ = String::from_utf8_lossy(&environ).into_owned();
        let rank = environ.split('\0').find_map(|v| v.strip_prefix("OMPI_COMM_WORLD_RANK=")?.parse::<usize>().ok());
        if let (Some(rank), true) = (rank, parent_of(pid).and_then(parent_of) == Some(job.id())) {
            *ranks.get_mut(rank)? = Some(pid);
        }
    }
    ranks.into_iter().collect()
}

/// Waits until the log of `output` has `steps` lines.
fn wait_for_steps(setup: &Setup, output: &str, steps: usize, job: &mut Child) {
    let log = setup.dir.path().join(output).join("trainer_log.jsonl");
    let started = Instant::now();
    while std::fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < steps {
        assert!(started.elapsed() < Duration::from_secs(120), "no step in two minutes");
        assert!(job.try_wait().expect("our child").is_none(), "the job ended early");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn mpirun_train_with_a_rank_killed_ends_in_time_names_it_and_resumes_to_the_same_bits() {
    kill_and_resume(&PREFIX, &[]);
}

#[test]
fn mpirun_train_with_a_sharded_optimizer_and_a_rank_killed_resumes_to_the_same_bits() {
    kill_and_resume(&WIDE_LOW_RANK, &SHARDED);
}

/// A gradient is on its way while the rank is killed.
#[test]
fn mpirun_train_of_the_whole_base_with_a_rank_killed_resumes_to_the_same_bits() {
    kill_and_resume(&FULL, &SHARDED);
}

fn kill_and_resume(method: &'static [&'static str], more: &[&'static str]) {
    let setup = Setup::new(method);
    let plain = ["--max_steps", "12", "--save_steps", "2"];
    let args = [&plain[..], more].concat();
    let Some(mut command) = setup.command(2, "killed", &args) else { return };
    let mut job = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the launcher starts");
    wait_for_steps(&setup, "killed", 3, &mut job);
    while !setup.dir.path().join("killed/checkpoint-2").exists() {
        assert!(job.try_wait().expect("our child").is_none(), "the job ended early");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ranks = ranks_of(&job, 2).expect("both ranks are found");
    let killed = Instant::now();
    assert!(Command::new("kill").args(["-9", &ranks[1].to_string()]).status().expect("kill runs").success());
    let out = job.wait_with_output().expect("our child");
    let took = killed.elapsed();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(took < END, "took {took:?}");
    assert!(!out.status.success());
    assert!(stderr.contains("process rank 1 with PID") && stderr.contains("signal 9 (Killed)"), "{stderr}");
    println!("rank 1 of 2 was killed: the job ended after {:.2} s", took.as_secs_f64());

    setup.train(2, "killed", &[&args[..], &["--resume_from_checkpoint", "latest"]].concat());
    setup.train(1, "whole", &plain);
    assert_eq!(setup.hashes("killed", 12), setup.hashes("whole", 12), "the schedule is linear: the same step has the same learning rate");
}
