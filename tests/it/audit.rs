//! Ranks of a whole run that come to hold different states.

use std::path::Path;

use glmddp::checkpoint::RealDisk;
use glmddp::config::{Plan, RunConfig, Sources};
use glmddp::dist::{DistError, ProcessGroup, local};
use glmddp::telemetry::Console;
use glmddp::train::TrainError;
use glmddp::train::requests::Limits;
use glmddp::train::run;

use crate::cli_support::glmddp_in;

fn setup() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for args in [
        &["init-model", "--preset", "tiny", "--output_dir", "model"][..],
        &["demo-data", "--output_dir", "data", "--rows", "30", "--dev_rows", "4"],
    ] {
        let ran = glmddp_in(dir.path(), args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    dir
}

fn plan(dir: &Path, out: &str, audit_steps: usize) -> Plan {
    let mut config = RunConfig::default();
    config.model.model_name_or_path = Some(dir.join("model"));
    config.data.train_file = Some(dir.join("data/train.jsonl"));
    config.run.output_dir = Some(dir.join(out));
    config.run.max_steps = Some(4);
    config.run.save_steps = Some(2);
    config.run.audit_steps = Some(audit_steps);
    config.method.pre_seq_len = Some(4);
    config.batch.global_batch_size = Some(6);
    config.resolve(3, &Sources::default()).expect("the plan resolves")
}

/// What each rank of three says where rank 1 has another plan.
fn said(dir: &Path, out: &str, audit_steps: usize, change: impl Fn(&mut Plan) + Sync) -> Vec<String> {
    let outcomes = local::run(3, |group| {
        let mut plan = plan(dir, out, audit_steps);
        if group.rank() == 1 {
            change(&mut plan);
        }
        Ok::<_, DistError>(match run::run(&plan, group, &RealDisk, &Console::without_bar(), &Limits::default()) {
            Ok(summary) => format!("{} steps", summary.steps),
            Err(error @ TrainError::RanksDiverged { .. }) => {
                assert!(error.is_everyones() && !error.is_users());
                format!("{error}\n\nhint: {}", error.hint().unwrap_or_default())
            }
            Err(error) => panic!("{error}"),
        })
    });
    outcomes.into_iter().map(Result::unwrap).collect()
}

#[test]
fn rank_that_trains_otherwise_is_named_before_a_checkpoint_is_written() {
    let dir = setup();
    assert_eq!(said(dir.path(), "alike", 1, |_| ()), ["4 steps"; 3]);
    let other_rate = said(dir.path(), "rate", 1, |plan| plan.optim.learning_rate *= 1.001);
    assert!(other_rate.iter().all(|text| *text == other_rate[0]), "{other_rate:?}");
    insta::assert_snapshot!("rank_with_another_learning_rate", other_rate[0]);
    // With no audit but before checkpoints, the difference is seen after the second step; nothing is saved all the same.
    let seldom = said(dir.path(), "seldom", 100, |plan| plan.optim.adam_beta1 = 0.8);
    assert!(seldom[0].starts_with("the ranks have diverged, seen after step 2: "), "{}", seldom[0]);
    for out in ["rate", "seldom"] {
        let saved = std::fs::read_dir(dir.path().join(out)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(saved.into_iter().all(|name| !name.starts_with("checkpoint-")), "{out}");
    }
    insta::assert_snapshot!("rank_with_another_seed", said(dir.path(), "seed", 100, |plan| plan.run.seed += 1)[2]);
}
