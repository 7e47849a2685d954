//! Kernels on the checked stand-in, against the CPU's code.

use std::path::PathBuf;

use glmddp::bench::kernels::{Shape, Work, entries};
use glmddp::kernels::check::products::cases as products;
use glmddp::kernels::check::{CARD_SLACK, Case, FILES, Memo, cases};
use glmddp::kernels::cuda;
use glmddp::kernels::gpu::Gpu;

use crate::libraries::{Driver, Moved, Order, checked, inside, sources, this_test};

/// The host computes as the specification does: the kernels' results may differ by what the specification allows, and no more.
const SLACK: f32 = 1.0;

/// What is wrong with a case: its threads run in several orders, which must give equal bits.
pub fn problem(gpu: &dyn Gpu, driver: &Driver, case: &Case, slack: f32) -> Option<String> {
    let memo = Memo::default();
    let run = |order| {
        driver.set_thread_order(order);
        let result = case.run(gpu, &memo, slack);
        gpu.free_all();
        result
    };
    let mut hashes = Vec::new();
    for order in Order::ALL {
        match run(order) {
            Ok(hash) => hashes.push(hash),
            Err(error) => return Some(error.to_string()),
        }
    }
    hashes.iter().any(|hash| *hash != hashes[0]).then(|| "the order of threads shows".to_owned())
}

/// Runs all cases of a file.
fn check(test: &str, file: &str) {
    inside(test, checked(), || {
        let (gpu, driver) = (cuda::open(0).unwrap(), Driver::loaded());
        let cases: Vec<Case> = cases().into_iter().filter(|case| case.file == file).collect();
        assert!(!cases.is_empty(), "{file} has cases");
        for case in &cases {
            assert_eq!(problem(&*gpu, &driver, case, SLACK), None, "{file}, {}", case.name);
        }
    });
}

/// The kernels' files, without their ending.
fn files() -> Vec<String> {
    let entries = std::fs::read_dir(sources()).unwrap().map(|entry| entry.unwrap().path());
    let kernels: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|end| end == "cu")).collect();
    let mut files: Vec<String> = kernels.iter().map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    files.sort();
    files
}

#[test]
fn every_file_of_kernels_has_cases() {
    let mut with_cases: Vec<&str> = cases().iter().map(|case| case.file).collect();
    with_cases.sort_unstable();
    with_cases.dedup();
    assert_eq!(files(), with_cases);
}

#[test]
fn adamw() {
    check(this_test!(), "adamw");
}

#[test]
fn attention() {
    check(this_test!(), "attention");
}

#[test]
fn attention_f32() {
    check(this_test!(), "attention_f32");
}

#[test]
fn column_sums() {
    check(this_test!(), "column_sums");
}

#[test]
fn cross_entropy() {
    check(this_test!(), "cross_entropy");
}

#[test]
fn dropout() {
    check(this_test!(), "dropout");
}

#[test]
fn elementwise() {
    check(this_test!(), "elementwise");
}

#[test]
fn embedding() {
    check(this_test!(), "embedding");
}

#[test]
fn non_finite() {
    check(this_test!(), "non_finite");
}

#[test]
fn rms_norm() {
    check(this_test!(), "rms_norm");
}

#[test]
fn rotary() {
    check(this_test!(), "rotary");
}

#[test]
fn swiglu() {
    check(this_test!(), "swiglu");
}

#[test]
fn tanh() {
    check(this_test!(), "tanh");
}

/// Of every third case: the products' own kernels are NVIDIA's, and what is held here is how they are asked for.
#[test]
fn products_of_the_library() {
    inside(this_test!(), checked(), || {
        let (gpu, driver) = (cuda::open(0).unwrap(), Driver::loaded());
        for case in products().iter().step_by(3) {
            assert_eq!(problem(&*gpu, &driver, case, CARD_SLACK), None, "{}", case.name);
        }
    });
}

/// What is counted, against the formulas beside the launches, which are those of the headers.
#[test]
fn bytes_are_those_of_the_headers() {
    inside(this_test!(), checked(), || {
        let (gpu, driver) = (cuda::open(0).unwrap(), Driver::loaded());
        for case in cases() {
            let Some(bytes) = case.bytes else { continue };
            driver.take_bytes();
            case.run(&*gpu, &Memo::default(), SLACK).unwrap_or_else(|error| panic!("{}, {}: {error}", case.file, case.name));
            gpu.free_all();
            assert_eq!(driver.take_bytes(), Moved { read: bytes.read, written: bytes.written }, "{}, {}", case.file, case.name);
        }
    });
}

#[test]
fn every_file_of_memory_bound_kernels_has_its_bytes_counted() {
    let counted = |file: &str| cases().iter().any(|case| case.file == file && case.bytes.is_some());
    // Tensor cores bound attention; the products' kernels are NVIDIA's.
    let memory_bound = FILES.into_iter().filter(|file| !file.starts_with("attention") && *file != "products");
    assert_eq!(memory_bound.filter(|file| !counted(file)).collect::<Vec<_>>(), Vec::<&str>::new());
}

/// `glmddp kernels bench` starts each kernel with memory and sizes that fit.
#[test]
fn launches_of_the_bench_are_right() {
    inside(this_test!(), checked(), || {
        let gpu = cuda::open(0).unwrap();
        let word = gpu.alloc("a word", 4).unwrap();
        gpu.write(word, &[0; 4]).unwrap();
        for entry in entries(&*gpu, &Shape::SMALL).unwrap() {
            assert!(!matches!(entry.work, Work::Bytes(0) | Work::Flops(0)), "{} does nothing", entry.name);
            entry.start(&*gpu).unwrap();
            // Faults are noticed here.
            gpu.read(word).unwrap_or_else(|error| panic!("{}: {error}", entry.name));
        }
    });
}
