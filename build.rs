//! With the feature `cuda`: compiles each `src/kernels/*.cu` with nvcc to one image, which holds machine code for several architectures and
//! PTX for newer ones, and writes the table of images that `src/kernels/cuda` embeds. An image is compiled again when its source, a `.cuh`,
//! the flags, nvcc or this file have changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Compute capabilities that get machine code: A100 (and 8.6, 8.7, which run it too), RTX 4090, H100.
const ARCHITECTURES: [u32; 3] = [80, 89, 90];
/// The one whose PTX is kept, for the driver to compile where no machine code fits: on GPUs newer than all of the above. So it is the newest.
const PTX: u32 = 90;
const KERNELS: &str = "src/kernels";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    // The folder, so that a new kernel is seen; what has not changed is not compiled.
    println!("cargo::rerun-if-changed={KERNELS}");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    // Libraries beside the program are found, as in the folder that scripts/bundle.sh makes.
    println!("cargo::rustc-link-arg-bins=-Wl,-rpath,$ORIGIN/../lib");
    if let Err(error) = build() {
        error.lines().for_each(|line| println!("cargo::error={line}"));
        std::process::exit(1);
    }
}

/// One compiled source.
struct Image {
    source: String,
    fatbin: PathBuf,
    /// Names and bytes of their arguments, as a list in Rust.
    kernels: String,
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo did not set OUT_DIR")?);
    let nvcc = Nvcc::find()?;
    let headers = files(".cuh")?.iter().map(|file| read(file)).collect::<Result<String, _>>()?;
    let mut sources = files(".cu")?;
    sources.reverse();
    let (sources, images) = (Mutex::new(sources), Mutex::new(Vec::new()));
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    std::thread::scope(|scope| {
        let work = || -> Result<(), String> {
            // The lock is held while taking, not while compiling.
            let next = || sources.lock().map_err(|e| e.to_string()).map(|mut left| left.pop());
            while let Some(source) = next()? {
                let image = nvcc.compile(&source, &headers, &out)?;
                images.lock().map_err(|e| e.to_string())?.push(image);
            }
            Ok(())
        };
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().map_err(|_| "a thread of build.rs panicked".to_owned())?)
    })?;
    let mut images = images.into_inner().map_err(|e| e.to_string())?;
    images.sort_by(|a, b| a.source.cmp(&b.source));
    write_if_changed(&out.join("images.rs"), &table(&images, nvcc.version))
}

/// Files of [`KERNELS`] whose names end so, in order.
fn files(end: &str) -> Result<Vec<PathBuf>, String> {
    let folder = fs::read_dir(KERNELS).map_err(|e| format!("{KERNELS}: {e}"))?;
    let mut files: Vec<PathBuf> =
        folder.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| p.to_string_lossy().ends_with(end)).collect();
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn write_if_changed(path: &Path, text: &str) -> Result<(), String> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The source of the table that `include!` reads.
fn table(images: &[Image], (major, minor): (u32, u32)) -> String {
    let pairs = ARCHITECTURES.map(|a| format!("({}, {})", a / 10, a % 10)).join(", ");
    let mut text = format!(
        "pub const TOOLKIT: (u32, u32) = ({major}, {minor});\npub const ARCHITECTURES: &[(u32, u32)] = &[{pairs}];\n\
         pub const PTX: (u32, u32) = ({}, {});\npub static IMAGES: &[Image] = &[\n",
        PTX / 10,
        PTX % 10
    );
    for image in images {
        text += &format!(
            "    Image {{ source: {:?}, kernels: &{}, bytes: include_bytes!({:?}) }},\n",
            image.source, image.kernels, image.fatbin
        );
    }
    text + "];\n"
}

struct Nvcc {
    path: PathBuf,
    /// What it says of itself.
    about: String,
    version: (u32, u32),
}

impl Nvcc {
    /// That of `CUDA_HOME`, of `PATH` or of the usual folder.
    fn find() -> Result<Self, String> {
        let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
        let candidates: Vec<PathBuf> = home.into_iter().chain(["nvcc".into(), "/usr/local/cuda/bin/nvcc".into()]).collect();
        for path in &candidates {
            let Ok(output) = Command::new(path).arg("--version").output() else { continue };
            let about = String::from_utf8_lossy(&output.stdout).into_owned();
            let release = about.split(", release ").nth(1).and_then(|rest| rest.split(',').next()).and_then(|v| v.split_once('.'));
            let version = release.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            let version = version.ok_or_else(|| format!("{} --version says no release: {about}", path.display()))?;
            return Ok(Self { path: path.clone(), about, version });
        }
        let looked: Vec<String> = candidates.iter().map(|p| p.display().to_string()).collect();
        Err(format!(
            "the feature `cuda` needs nvcc, which was not found; looked for {}\nhint: source scripts/setup_cuda.sh, or set CUDA_HOME",
            looked.join(", ")
        ))
    }

    fn compile(&self, source: &Path, headers: &str, out: &Path) -> Result<Image, String> {
        let stem = source.file_stem().ok_or("a kernel without a name")?.to_string_lossy().into_owned();
        let (fatbin, stamp) = (out.join(format!("{stem}.fatbin")), out.join(format!("{stem}.stamp")));
        let mut args = vec!["-fatbin".to_owned(), "--options-file".to_owned(), format!("{KERNELS}/nvcc.flags")];
        for a in ARCHITECTURES {
            args.push(format!("-gencode=arch=compute_{a},code=sm_{a}"));
        }
        args.push(format!("-gencode=arch=compute_{PTX},code=compute_{PTX}"));
        let flags = read(&Path::new(KERNELS).join("nvcc.flags"))?;
        // The first line is the kernels, the rest what they were made from.
        let made_from = [include_str!("build.rs"), &self.about, &flags, &args.join(" "), headers, &read(source)?].join("\n");
        if let Ok(old) = fs::read_to_string(&stamp)
            && let Some((kernels, old)) = old.split_once('\n')
            && old == made_from
            && fatbin.exists()
        {
            return Ok(Image { source: format!("{stem}.cu"), fatbin, kernels: kernels.to_owned() });
        }
        let kept = out.join(format!("{stem}.kept"));
        fs::create_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
        let mut command = Command::new(&self.path);
        command.args(&args).arg("--keep").arg("--keep-dir").arg(&kept).arg("-o").arg(&fatbin).arg(source);
        let output = command.output().map_err(|e| format!("{}: {e}", self.path.display()))?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
            return Err(format!("nvcc could not compile {}:\n{said}", source.display()));
        }
        let kernels = entries(&read(&kept.join(format!("{stem}.compute_{PTX}.ptx")))?).map_err(|e| format!("{}: {e}", source.display()))?;
        fs::remove_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
        fs::write(&stamp, format!("{kernels}\n{made_from}")).map_err(|e| format!("{}: {e}", stamp.display()))?;
        Ok(Image { source: format!("{stem}.cu"), fatbin, kernels })
    }
}

/// The kernels of a PTX text, in the order of their names: `.entry NAME(` and `.param .align 8 .b8 NAME_param_0[BYTES]`.
fn entries(ptx: &str) -> Result<String, String> {
    let mut kernels = Vec::new();
    for entry in ptx.split(".entry ").skip(1) {
        let (name, rest) = entry.split_once('(').ok_or("PTX with an entry without parameters")?;
        let bytes = rest.split_once("_param_0[").and_then(|(_, rest)| rest.split(']').next()?.parse::<usize>().ok());
        kernels.push((name.trim(), bytes.ok_or_else(|| format!("kernel {name} does not take one struct by value"))?));
    }
    kernels.sort_unstable();
    Ok(format!("{kernels:?}"))
}
