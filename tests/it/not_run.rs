//! What a test needs and this machine lacks: said, counted by `scripts/test.sh`, or a failure if `GLMDDP_REQUIRE` names it.

use std::io::Write as _;

/// What may be missing, by the word that `GLMDDP_REQUIRE` has for it.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "one file for several test binaries, each of which uses its own part")]
pub enum Missing {
    /// mpirun, or the feature `mpi`.
    Mpi,
    /// Rows, a tokenizer and golden values that may not be shipped: `../shared`, or the folder that `GLMDDP_SHARED` names.
    Shared,
    /// The right to mount a tmpfs in a namespace of one's own.
    Mount,
    /// Fused multiply-adds.
    Fma,
    /// A peak of memory that can be reset.
    ClearRefs,
}

impl Missing {
    fn word(self) -> &'static str {
        match self {
            Self::Mpi => "mpi",
            Self::Shared => "shared",
            Self::Mount => "mount",
            Self::Fma => "fma",
            Self::ClearRefs => "clear_refs",
        }
    }
}

/// Says that this test, or a part of it, does not run. The file that `GLMDDP_NOT_RUN` names gets a line: word, test, reason.
///
/// # Panics
/// If what is missing is required.
#[track_caller]
pub fn not_run(missing: Missing, why: &str) {
    let required = std::env::var("GLMDDP_REQUIRE").unwrap_or_default();
    let word = missing.word();
    assert!(!required.split(',').any(|one| one == word), "GLMDDP_REQUIRE names `{word}`: {why}");
    eprintln!("NOT RUN: {why}");
    let Some(path) = std::env::var_os("GLMDDP_NOT_RUN").filter(|path| !path.is_empty()) else { return };
    let test = std::env::var("NEXTEST_TEST_NAME").unwrap_or_else(|_| std::thread::current().name().unwrap_or("?").to_owned());
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).expect("the file of GLMDDP_NOT_RUN");
    // One call, so that tests that run side by side do not mix their lines.
    file.write_all(format!("{word}\t{test}\t{why}\n").as_bytes()).expect("the file of GLMDDP_NOT_RUN");
}
