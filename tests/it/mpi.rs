//! Ranks as real processes: this binary starts itself under mpirun, with a scenario that each rank then plays.

use std::io::{BufRead, BufReader, Read};
use std::num::NonZeroUsize;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use glmddp::dist::{
    Collectives, DistError, GradientSum, Part, ProcessGroup, Reduction, Shards, SlotScalars, Solo, Wire, agree, all_gather_shards, connect,
    gather_slots, install_panic_hook, plan_threads,
};
use glmddp::rng::{KeyedRng, Stream};

use crate::not_run::{Missing, not_run};

/// Names the scenario that a rank plays.
const SCENARIO: &str = "GLMDDP_TEST_MPI_SCENARIO";
/// A line with it on a rank's stdout starts the clock of a test.
const NOW: &str = "now:";
/// A job that fails must end within this time.
const END: Duration = Duration::from_secs(10);
/// A job that hangs is killed after this time; far above what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(120);

struct Job {
    status: ExitStatus,
    stdout: String,
    stderr: String,
    /// From the first line with [`NOW`] to the end of the job.
    since_now: Option<Duration>,
}

impl Job {
    fn assert_success(&self) {
        assert!(self.status.success(), "{:?}\nstdout: {}\nstderr: {}", self.status, self.stdout, self.stderr);
    }

    /// The job ended as a failure, in time.
    fn assert_failed_in_time(&self) {
        assert!(!self.status.success(), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(self.since_now.expect("the scenario prints the mark") < END, "took {:?}", self.since_now);
    }

    fn errors(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("error: ")).collect()
    }
}

/// Runs `scenario` on `num_ranks` ranks; `on_mark` gets the text after the mark. None, said loudly, where there is no MPI.
fn run(num_ranks: usize, scenario: &str, on_mark: impl Fn(&str)) -> Option<Job> {
    if !cfg!(feature = "mpi") {
        not_run(Missing::Mpi, "this build has no feature `mpi`, and the test needs it");
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["-n", &num_ranks.to_string()]).arg(std::env::current_exe().expect("the test binary has a path"));
    command.args(["--exact", "mpi::rank_plays_its_scenario", "--nocapture"]);
    command.env(SCENARIO, scenario).env("RUST_BACKTRACE", "0");
    // Ranks are more than cores here, and the user may be root in a container; Open MPI 4 and 5.
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        ("OMPI_MCA_mpi_yield_when_idle", "1"),
        ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
        ("OMPI_MCA_btl_base_warn_component_unused", "0"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
        ("PRTE_MCA_hwloc_default_binding_policy", "none"),
    ] {
        command.env(name, value);
    }
    let mut child = match command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            not_run(Missing::Mpi, "mpirun is not installed, and the test needs it");
            return None;
        }
        Err(error) => panic!("cannot start mpirun: {error}"),
    };
    let stdout = lines(child.stdout.take().expect("piped"));
    let stderr = lines(child.stderr.take().expect("piped"));
    let (started, mut now, mut out) = (Instant::now(), None, String::new());
    let mut take = |wait: Duration| {
        let Ok(line) = stdout.recv_timeout(wait) else { return false };
        if let (Some((_, text)), None) = (line.split_once(NOW), now) {
            now = Some(Instant::now());
            on_mark(text);
        }
        out.push_str(&line);
        out.push('\n');
        true
    };
    let status = loop {
        if let Some(status) = child.try_wait().expect("mpirun is our child") {
            break status;
        }
        if started.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!(
                "scenario {scenario} hangs on {num_ranks} ranks\nstdout: {out}\nstderr: {}",
                stderr.iter().collect::<Vec<_>>().join("\n")
            );
        }
        take(Duration::from_millis(20));
    };
    let ended = Instant::now();
    while take(Duration::from_secs(1)) {}
    Some(Job { status, stderr: stderr.iter().collect::<Vec<_>>().join("\n"), since_now: now.map(|now| ended - now), stdout: out })
}

fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || BufReader::new(pipe).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    receiver
}

/// What each rank runs; nothing when the tests start it themselves.
#[test]
fn rank_plays_its_scenario() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let tensors = connect(&|name| std::env::var(name).ok()).expect("mpirun started this");
    let group = tensors.group();
    install_panic_hook(group);
    let outcome = match scenario.as_str() {
        "collectives" => collectives(tensors.as_ref()),
        "slot_tree" => slot_tree(tensors.as_ref()),
        "panic" => panic_on_rank_1(group),
        "return" => return_on_rank_1(group),
        "abort" => abort_on_rank_1(group),
        "endless" => endless(tensors.as_ref()),
        "agreed_error" => {
            let mine = if group.rank() == 2 { Err("cannot read `train.json`, line 7".to_owned()) } else { Ok(()) };
            println!("{NOW}");
            let error = agree(group, mine).expect_err("rank 2 fails");
            if group.rank() == 0 {
                eprintln!("error: {error}");
            }
            println!("rank {} has: {error}", group.rank());
            tensors.finish();
            std::process::exit(2);
        }
        other => panic!("unknown scenario {other}"),
    };
    if outcome.is_err() {
        // As a program that forgets to tell the others: the launcher must end them.
        std::process::exit(1);
    }
    tensors.finish();
}

fn tensor(values: impl IntoIterator<Item = f32>) -> Tensor {
    Tensor::from_iter(values, &Device::Cpu).expect("a vector on the CPU")
}

fn collectives(tensors: &dyn Collectives) -> Result<(), DistError> {
    let g = tensors.group();
    let (rank, size) = (g.rank(), g.world_size());
    assert_eq!(size, std::env::var("OMPI_COMM_WORLD_SIZE").map_or(size, |n| n.parse().expect("a number")));
    assert_eq!((g.local_rank(), g.local_size(), g.machine()), (rank, size, 0));
    for n in [0, 1, 1000] {
        let mine = tensor((0..n).map(|i| (rank * 1000 + i) as f32));
        let rows = tensors.all_gather(&mine)?.to_vec2::<f32>()?;
        assert!(
            rows.len() == size && rows.iter().enumerate().all(|(r, row)| row == &(0..n).map(|i| (r * 1000 + i) as f32).collect::<Vec<_>>())
        );
        let sum = tensors.all_reduce(&mine)?.to_vec1::<f32>()?;
        assert!(sum.iter().enumerate().all(|(i, &s)| s == (0..size).map(|r| (r * 1000 + i) as f32).sum::<f32>()));
        for root in 0..size {
            let got = tensors.broadcast(&mine, root)?.to_vec1::<f32>()?;
            assert!(got.iter().enumerate().all(|(i, &v)| v == (root * 1000 + i) as f32));
        }
    }
    // n elements more for each further rank; a duplicate gives the same.
    let duplicate = tensors.duplicate()();
    for (n, tensors) in [(0, tensors), (1, tensors), (1000, tensors), (1000, &*duplicate)] {
        let (send, receive): (Vec<_>, Vec<_>) = (0..size).map(|other| (other * n, rank * n)).unzip();
        let parts = tensor(send.iter().enumerate().flat_map(|(to, &len)| vec![(10 * rank + to) as f32; len]));
        let got = tensors.all_to_all_v(&parts, &send, &receive)?.to_vec1::<f32>()?;
        assert_eq!(got, (0..size).flat_map(|from| vec![(10 * from + rank) as f32; rank * n]).collect::<Vec<_>>());
    }
    let bytes = g.all_gather_bytes(&vec![rank as u8; 3 * rank])?;
    assert!(bytes.iter().enumerate().all(|(r, b)| b == &vec![r as u8; 3 * r]));
    assert!(tensors.all_reduce(&tensor([1.0]).to_dtype(candle_core::DType::F64)?).is_err(), "only f32");
    assert_eq!(plan_threads(g, NonZeroUsize::new(3))?.count.get(), 3);
    assert!(plan_threads(g, None)?.count.get() <= std::thread::available_parallelism().map_or(1, NonZeroUsize::get));
    g.barrier()
}

/// Uneven shares of 13 slots, the last rank's the largest: the sum on every rank, and in shards, made at the end or on the way, that are put
/// together again.
fn slot_tree(tensors: &dyn Collectives) -> Result<(), DistError> {
    const SLOTS: usize = 13;
    const N: usize = 10_007;
    let g = tensors.group();
    let slot_grad = |slot: usize| tensor(KeyedRng::new(3, Stream::ParameterInit, slot as u64).normal(N));
    let sums = |tensors, part| GradientSum::new(tensors, Reduction::SlotTree, SLOTS, part, &Device::Cpu);
    let sum_of = |sums: &GradientSum, range: std::ops::Range<usize>| {
        let mut sum = sums.begin(range.clone())?;
        for slot in range {
            sum.slot(slot, slot_grad(slot))?;
        }
        sum.finish()
    };
    let bits = |t: Tensor| Ok::<_, DistError>(t.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    let share = 2 * g.rank()..if g.rank() + 1 == g.world_size() { SLOTS } else { 2 * g.rank() + 2 };
    let scalars = |slot: usize| SlotScalars { slot, nll_sum: slot as f64 / 7.0, num_targets: 9, finite: true };
    let whole = sum_of(&sums(&Solo, Part::Whole(N)), 0..SLOTS)?;
    assert_eq!(bits(sum_of(&sums(tensors, Part::Whole(N)), share.clone())?)?, bits(whole.clone())?);
    let shards = Shards::new(N, g.world_size(), 64);
    let own = shards.range(g.rank());
    let shard = sum_of(&sums(tensors, Part::Shard(shards)), share.clone())?;
    assert_eq!(bits(shard.clone())?, bits(whole.narrow(0, own.start, own.len())?)?);
    // The last slot in three parts, from both ends to the middle.
    let stages = vec![vec![0..100, 9000..N], vec![100..5000], vec![5000..9000]];
    let on_the_way = sums(tensors, Part::Shard(shards)).overlapped(stages.clone())?;
    for _ in 0..3 {
        let mut sum = on_the_way.begin(share.clone())?;
        let last = share.end - 1;
        for slot in share.start..last {
            sum.slot(slot, slot_grad(slot))?;
        }
        let running = tensor(vec![f32::NAN; N]);
        for (i, stage) in stages.iter().enumerate() {
            for part in stage {
                running.slice_set(&slot_grad(last).narrow(0, part.start, part.len())?.force_contiguous()?, 0, part.start)?;
            }
            sum.stage(last, i + 1, &running)?;
            g.barrier()?;
        }
        sum.slot(last, running)?;
        assert_eq!(bits(sum.finish()?)?, bits(shard.clone())?);
    }
    let flat = tensor(vec![0.0; N]);
    flat.slice_set(&shard.copy()?, 0, own.start)?;
    all_gather_shards(tensors, &flat, &shards, Wire::F32)?;
    assert_eq!(bits(flat)?, bits(whole)?);
    // Whole numbers up to 256, NaN and infinities are bf16's too.
    let rounded = tensor((0..N).map(|i| [(i % 513) as f32 - 256.0, f32::NEG_INFINITY][usize::from(i % 100 == 99)]));
    let flat = tensor((0..N).map(|i| if own.contains(&i) { (i % 513) as f32 - 256.0 } else { 0.5 }));
    for i in own.clone().filter(|i| i % 100 == 99) {
        flat.slice_set(&tensor([f32::NEG_INFINITY]), 0, i)?;
    }
    all_gather_shards(tensors, &flat, &shards, Wire::Bf16)?;
    assert_eq!(bits(flat)?, bits(rounded)?);
    assert_eq!(gather_slots(g, &share.map(scalars).collect::<Vec<_>>())?, (0..SLOTS).map(scalars).collect::<Vec<_>>());
    println!("same bits on rank {}", g.rank());
    Ok(())
}

fn panic_on_rank_1(g: &dyn ProcessGroup) -> Result<(), DistError> {
    if g.rank() == 1 {
        println!("{NOW}");
        std::thread::scope(|scope| scope.spawn(|| panic!("the worker broke")).join().expect("not reached"));
    }
    g.barrier()
}

fn return_on_rank_1(g: &dyn ProcessGroup) -> Result<(), DistError> {
    if g.rank() == 1 {
        println!("{NOW}");
        return Err(DistError::MpiInitialised);
    }
    g.barrier()
}

fn abort_on_rank_1(g: &dyn ProcessGroup) -> Result<(), DistError> {
    if g.rank() == 1 {
        println!("{NOW}");
        g.abort("the disk is full");
    }
    g.barrier()
}

fn endless(tensors: &dyn Collectives) -> Result<(), DistError> {
    let g = tensors.group();
    let mine = tensor(vec![1.0; 100_000]);
    for round in 0u64.. {
        tensors.all_reduce(&mine)?;
        if round == 20 && g.rank() == 1 {
            println!("{NOW}{}", std::process::id());
        }
    }
    Ok(())
}

#[test]
fn collectives_on_1_to_4_ranks_give_the_expected_values() {
    for num_ranks in 1..=4 {
        let Some(job) = run(num_ranks, "collectives", |_| ()) else { return };
        job.assert_success();
    }
}

#[test]
fn slot_tree_on_1_to_4_ranks_equals_the_bits_of_one() {
    for num_ranks in 1..=4 {
        let Some(job) = run(num_ranks, "slot_tree", |_| ()) else { return };
        job.assert_success();
        assert_eq!(job.stdout.matches("same bits on rank").count(), num_ranks);
    }
}

#[test]
fn panic_on_one_rank_ends_the_job_with_one_message() {
    let Some(job) = run(3, "panic", |_| ()) else { return };
    job.assert_failed_in_time();
    let errors = job.errors();
    assert_eq!(errors.len(), 1, "{}", job.stderr);
    assert!(errors[0].starts_with("error: rank 1 of 3: panicked at ") && errors[0].ends_with(": the worker broke"), "{}", errors[0]);
}

#[test]
fn abort_on_one_rank_ends_the_job_with_one_message() {
    let Some(job) = run(3, "abort", |_| ()) else { return };
    job.assert_failed_in_time();
    assert_eq!(job.errors(), ["error: rank 1 of 3: the disk is full"]);
}

#[test]
fn error_returned_by_one_rank_alone_never_leaves_the_others_waiting() {
    let Some(job) = run(3, "return", |_| ()) else { return };
    job.assert_failed_in_time();
}

#[test]
fn agreed_error_ends_all_ranks_with_the_same_message_and_no_banner() {
    let Some(job) = run(4, "agreed_error", |_| ()) else { return };
    job.assert_failed_in_time();
    assert_eq!(job.status.code(), Some(2));
    assert_eq!(job.errors(), ["error: rank 2 of 4: cannot read `train.json`, line 7"]);
    assert_eq!(job.stdout.matches("has: rank 2 of 4: cannot read `train.json`, line 7").count(), 4, "{}", job.stdout);
    assert!(!job.stderr.contains("MPI_ABORT"), "{}", job.stderr);
}

#[test]
fn rank_killed_in_a_collective_ends_the_job_and_is_named() {
    let kill = |pid: &str| {
        let status = Command::new("kill").args(["-9", pid.trim()]).status().expect("kill is there");
        assert!(status.success());
    };
    let Some(job) = run(3, "endless", kill) else { return };
    job.assert_failed_in_time();
    assert!(job.stderr.contains("rank 1 "), "{}", job.stderr);
}
