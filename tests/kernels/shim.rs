//! Kernels compiled by clang with the shim, as an executor.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use glmddp::kernels::check::{Case, CheckError};
use glmddp::kernels::launch::{Buffer, Executor, Launch, LaunchError};
use libloading::{Library, Symbol};

/// Shared memory of a block that all of sm_80, sm_89 and sm_90 have.
const MAX_SHARED_BYTES: u32 = 99 << 10;
/// Without the sanitizer's library: its callbacks are the shim's.
const INSTRUMENTED: [&str; 8] = [
    "-fsanitize=thread",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-mllvm",
    "-tsan-instrument-read-before-write",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-Wno-unknown-pragmas",
];

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

/// Bytes that kernels moved, as they asked for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    pub read: u64,
    pub written: u64,
}

type Alloc = unsafe extern "C" fn(*const c_char, usize) -> *mut c_void;
type Upload = unsafe extern "C" fn(*mut c_void, *const c_void, usize);
type Download = unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> usize;
type Kernel = unsafe extern "C" fn(*const c_void);
type Start = unsafe extern "C" fn(Kernel, *const c_int, c_int, usize, *const c_void, usize, c_int) -> *const c_char;

pub struct Shim {
    library: Library,
    /// The library has one set of buffers and one block at a time.
    one_at_a_time: Mutex<()>,
}

/// The kernels' files, sorted.
pub fn sources() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels");
    let entries = std::fs::read_dir(folder).expect("the kernels' folder").map(|entry| entry.expect("an entry of it").path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    files.sort();
    files
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{} cannot be started: {e}", command.get_program().display()))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Shim {
    /// Compiles `sources` and the shim into a library of their own.
    pub fn compile(sources: &[PathBuf]) -> Result<Self, String> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let result = Self::compile_in(&folder, root, sources);
        // A library that is loaded needs its file no longer.
        std::fs::remove_dir_all(&folder).map_err(|e| e.to_string())?;
        result
    }

    fn compile_in(folder: &Path, root: &Path, sources: &[PathBuf]) -> Result<Self, String> {
        let include = |path: &str| format!("-I{}", root.join(path).display());
        let object = |source: &Path, flags: &[&str]| {
            let to = folder.join(source.with_extension("o").file_name().expect("a file"));
            let mut clang = Command::new("clang");
            clang.args([
                "-x",
                "c++",
                "-c",
                "-O1",
                "-std=c++17",
                "-fPIC",
                "-fno-exceptions",
                "-fno-rtti",
                "-ffp-contract=off",
                "-DGLMDDP_SHIM",
            ]);
            clang.args([include("tests/kernels/shim"), include("src/kernels")]).args(flags).arg(source).arg("-o").arg(&to);
            run(&mut clang).map(|()| to)
        };
        let mut objects = vec![object(&root.join("tests/kernels/shim/runtime.cpp"), &["-Wall", "-Wextra", "-Werror"])?];
        for source in sources {
            objects.push(object(source, &INSTRUMENTED)?);
        }
        let library = folder.join("kernels.so");
        run(Command::new("clang").arg("-shared").args(&objects).arg("-lm").arg("-o").arg(&library))?;
        // SAFETY: the library was made above; it runs nothing when it is loaded.
        let library = unsafe { Library::new(&library) }.map_err(|e| e.to_string())?;
        Ok(Self { library, one_at_a_time: Mutex::new(()) })
    }

    /// Runs a case; the hash of what its kernels wrote.
    pub fn run(&self, case: &Case, order: Order) -> Result<String, CheckError> {
        self.measured(case, order).map(|(hash, _)| hash)
    }

    /// As [`Self::run`], with the bytes that the case's kernels moved.
    pub fn measured(&self, case: &Case, order: Order) -> Result<(String, Moved), CheckError> {
        let _guard = self.one_at_a_time.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let result = case.run(&OnHost { shim: self, order });
        let mut counts = [0u64; 4];
        // SAFETY: the functions are as runtime.cpp declares them; four counts are written, and nobody uses the buffers any more.
        unsafe {
            self.symbol::<unsafe extern "C" fn(*mut u64)>("shim_take_counts")(counts.as_mut_ptr());
            self.symbol::<unsafe extern "C" fn()>("shim_free_all")();
        }
        Ok((result?, Moved { read: counts[0], written: counts[1] }))
    }

    fn symbol<T>(&self, name: &str) -> Symbol<'_, T> {
        // SAFETY: every type that is asked for is that of runtime.cpp.
        unsafe { self.library.get(name) }.unwrap_or_else(|e| panic!("{e}"))
    }

    /// A number that KERNEL leaves beside a kernel.
    fn number(&self, kernel: &str, what: &str) -> Option<c_int> {
        let name = format!("{kernel}_{what}");
        // SAFETY: KERNEL defines it as a `const int`.
        unsafe { self.library.get::<*const c_int>(&name).ok().map(|number| **number) }
    }
}

/// The shim with one order of threads.
struct OnHost<'s> {
    shim: &'s Shim,
    order: Order,
}

impl Executor for OnHost<'_> {
    fn describe(&self) -> String {
        format!("the host's shim, threads {:?}", self.order)
    }

    fn alloc(&self, name: &str, bytes: usize) -> Result<Buffer, LaunchError> {
        let c_name = CString::new(name).expect("a name without a null");
        // SAFETY: as runtime.cpp declares it.
        let memory = unsafe { self.shim.symbol::<Alloc>("shim_alloc")(c_name.as_ptr(), bytes) };
        if memory.is_null() {
            return Err(LaunchError::Memory { name: name.to_owned(), bytes, reason: "the shim has no more buffers".to_owned() });
        }
        Ok(Buffer { address: memory as u64, bytes })
    }

    fn write(&self, to: Buffer, bytes: &[u8]) -> Result<(), LaunchError> {
        assert!(bytes.len() <= to.bytes);
        // SAFETY: `to` is a buffer of `alloc` that is as long.
        unsafe { self.shim.symbol::<Upload>("shim_upload")(to.address as *mut c_void, bytes.as_ptr().cast(), bytes.len()) };
        Ok(())
    }

    fn read(&self, from: Buffer) -> Result<Vec<u8>, LaunchError> {
        let mut bytes = vec![0; from.bytes];
        // SAFETY: `from` is a buffer of `alloc` that is as long.
        let missing =
            unsafe { self.shim.symbol::<Download>("shim_download")(bytes.as_mut_ptr().cast(), from.address as *const c_void, bytes.len()) };
        if missing > 0 {
            let reason = format!("{missing} bytes of it were never written");
            return Err(LaunchError::Memory { name: "an output".to_owned(), bytes: from.bytes, reason });
        }
        Ok(bytes)
    }

    fn launch(&self, name: &str, launch: Launch, args: &[u8]) -> Result<(), LaunchError> {
        let fail = |reason: String| LaunchError::Kernel { kernel: name.to_owned(), reason };
        let (Some(threads), Some(args_bytes)) = (self.shim.number(name, "threads"), self.shim.number(name, "args_bytes")) else {
            return Err(fail("there is no such kernel".to_owned()));
        };
        if launch.threads == 0 || launch.threads > threads as u32 || !launch.threads.is_multiple_of(32) {
            return Err(fail(format!("started with {} threads, made for {threads}", launch.threads)));
        }
        if args.len() != args_bytes as usize {
            return Err(fail(format!("{} bytes of arguments, expected {args_bytes}", args.len())));
        }
        if launch.shared_bytes > MAX_SHARED_BYTES {
            return Err(fail(format!("{} bytes of shared memory, more than {MAX_SHARED_BYTES}", launch.shared_bytes)));
        }
        let [x, y, z] = launch.grid;
        if x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 {
            return Err(fail(format!("a grid of {:?}", launch.grid)));
        }
        let grid = launch.grid.map(|n| n as c_int);
        // SAFETY: the kernel is one of KERNEL, which takes its arguments' address; their size was compared. The shim checks what it accesses.
        let message = unsafe {
            let kernel: Symbol<'_, Kernel> = self.shim.symbol(name);
            self.shim.symbol::<Start>("shim_launch")(
                *kernel,
                grid.as_ptr(),
                launch.threads as c_int,
                launch.shared_bytes as usize,
                args.as_ptr().cast(),
                args.len(),
                self.order as c_int,
            )
        };
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: the message is static text of the library.
        Err(fail(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()))
    }
}
