//! The stand-in's libraries, and tests that run in a process of their own, whose loader finds them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use libloading::{Library, Symbol};

/// Set in a test's own process.
const INSIDE: &str = "GLMDDP_TEST_INSIDE";

/// In which order the threads of a block, and the blocks, come to run.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Ascending,
    Descending,
    Shuffled,
}

impl Order {
    pub const ALL: [Self; 3] = [Self::Ascending, Self::Descending, Self::Shuffled];
}

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Builds the libraries into `to`, from the kernels' sources in `sources`; what went wrong, from the compiler.
pub fn build(to: &Path, is_checked: bool, sources: &Path) -> Result<(), String> {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standin/build.sh"));
    command.args(is_checked.then_some("--checked")).arg(to).env("GLMDDP_STANDIN_SOURCES", sources);
    let output = command.output().map_err(|e| e.to_string())?;
    if output.status.success() { Ok(()) } else { Err(text(&output)) }
}

/// The folder of the kernels' sources.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels")
}

fn built(once: &'static OnceLock<PathBuf>, name: &str, is_checked: bool) -> &'static Path {
    once.get_or_init(|| {
        let to = folder(name);
        // A test's own process was started with what is built.
        if std::env::var_os(INSIDE).is_none() {
            build(&to, is_checked, &sources()).unwrap_or_else(|error| panic!("{error}"));
        }
        to
    })
}

/// For whole runs.
pub fn plain() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    built(&BUILT, "standin", false)
}

/// Every access to memory is checked.
pub fn checked() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    built(&BUILT, "standin-checked", true)
}

pub fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

pub fn run(libraries: &Path, program: &str, args: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(program).args(args).env("LD_LIBRARY_PATH", libraries).envs(variables.iter().copied()).output().unwrap()
}

/// The path of the test that it stands in, as the test program knows it.
macro_rules! this_test {
    () => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        name.split_once("::").and_then(|(_, rest)| rest.rsplit_once("::")).expect("a path in the test program").0
    }};
}
pub(crate) use this_test;

/// Starts this program again to run `test` alone with `libraries` on the loader's path, which is read when a process starts.
pub fn again(test: &str, libraries: &Path, variables: &[(&str, &str)]) -> Output {
    let program = std::env::current_exe().unwrap();
    let variables: Vec<(&str, &str)> = variables.iter().copied().chain([(INSIDE, "1")]).collect();
    let output = run(libraries, program.to_str().unwrap(), &["--exact", "--nocapture", "--include-ignored", test], &variables);
    assert!(text(&output).contains("running 1 test"), "{test}: {}", text(&output));
    output
}

pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs `body` in a process of its own, with `libraries` on the loader's path.
pub fn inside(test: &str, libraries: &Path, body: impl FnOnce()) {
    if is_inside() {
        return body();
    }
    let output = again(test, libraries, &[]);
    assert!(output.status.success() && text(&output).contains("1 passed"), "{}", text(&output));
}

/// What `test`, run again in each of two orders that the driver may choose, of operations, blocks and threads, has printed behind `> `.
pub fn in_two_orders(test: &str) -> [Vec<String>; 2] {
    ["1", "2"].map(|seed| {
        let output = again(test, checked(), &[("GLMDDP_STANDIN_SEED", seed)]);
        assert!(output.status.success(), "{}", text(&output));
        text(&output).lines().filter_map(|line| line.strip_prefix("> ")).map(str::to_owned).collect()
    })
}

/// Bytes that kernels moved, as they asked for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    pub read: u64,
    pub written: u64,
}

/// The stand-in's own functions, in a process that has loaded it.
pub struct Driver(Library);

impl Driver {
    pub fn loaded() -> Self {
        // SAFETY: the library is loaded already, by the loader's path; its initialisers have run.
        Self(unsafe { Library::new("libcuda.so.1") }.unwrap())
    }

    pub fn set_thread_order(&self, order: Order) {
        // SAFETY: the function is as driver.cpp declares it.
        let set: Symbol<'_, unsafe extern "C" fn(i32)> = unsafe { self.0.get("standin_set_thread_order") }.unwrap();
        // SAFETY: it takes any number.
        unsafe { set(order as i32) };
    }

    /// Of global memory, since the last call.
    pub fn take_bytes(&self) -> Moved {
        // SAFETY: the function is as blocks.cpp declares it.
        let take: Symbol<'_, unsafe extern "C" fn(*mut u64)> = unsafe { self.0.get("shim_take_counts") }.unwrap();
        let mut counts = [0u64; 4];
        // SAFETY: it writes four numbers.
        unsafe { take(counts.as_mut_ptr()) };
        Moved { read: counts[0], written: counts[1] }
    }
}
