//! Kernels on the host: the sources that nvcc compiles for a GPU, compiled by clang with the shim, against the CPU's code.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod faults;
mod mutations;
mod shim;

use glmddp::bench::kernels::{Shape, Work, entries};
use glmddp::kernels::check::{Case, cases};

use crate::shim::{Moved, Order, Shim};

/// Runs all cases of a file, each with its threads in several orders: equal bits.
fn check(file: &str) {
    let shim = Shim::compile(&shim::sources_of(file)).expect("the kernels compile");
    let cases: Vec<Case> = cases().into_iter().filter(|case| case.file == file).collect();
    assert!(!cases.is_empty(), "{file} has cases");
    for case in &cases {
        let hashes = Order::ALL.map(|order| shim.run(case, order).unwrap_or_else(|error| panic!("{file}, {}: {error}", case.name)));
        assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{file}, {}: the order of threads shows", case.name);
    }
}

#[test]
fn every_file_of_kernels_has_cases() {
    let files: Vec<String> = shim::sources().iter().map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    let mut with_cases: Vec<&str> = cases().iter().map(|case| case.file).collect();
    with_cases.sort_unstable();
    with_cases.dedup();
    assert_eq!(files, with_cases);
}

#[test]
fn rms_norm() {
    check("rms_norm");
}

#[test]
fn swiglu() {
    check("swiglu");
}

#[test]
fn rotary() {
    check("rotary");
}

#[test]
fn cross_entropy() {
    check("cross_entropy");
}

#[test]
fn embedding() {
    check("embedding");
}

#[test]
fn column_sums() {
    check("column_sums");
}

#[test]
fn elementwise() {
    check("elementwise");
}

#[test]
fn non_finite() {
    check("non_finite");
}

#[test]
fn adamw() {
    check("adamw");
}

/// What the shim counts, against the formulas beside the launches, which are those of the headers.
#[test]
fn bytes_are_those_of_the_headers() {
    let shim = Shim::compile(&shim::sources()).expect("the kernels compile");
    for case in cases() {
        let Some(bytes) = case.bytes else { continue };
        let (_, moved) = shim.measured(&case, Order::Ascending).unwrap_or_else(|error| panic!("{}, {}: {error}", case.file, case.name));
        assert_eq!(moved, Moved { read: bytes.read, written: bytes.written }, "{}, {}", case.file, case.name);
    }
}

#[test]
fn every_file_of_memory_bound_kernels_has_its_bytes_counted() {
    let counted = |file: &str| cases().iter().any(|case| case.file == file && case.bytes.is_some());
    let files = ["adamw", "column_sums", "cross_entropy", "elementwise", "embedding", "non_finite", "rms_norm", "rotary", "swiglu"];
    assert_eq!(files.into_iter().filter(|file| !counted(file)).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn attention() {
    check("attention");
}

#[test]
fn attention_f32() {
    check("attention_f32");
}

/// `glmddp kernels bench` starts each kernel with memory and sizes that fit.
#[test]
fn launches_of_the_bench_are_right() {
    let shim = Shim::compile(&shim::sources()).expect("the kernels compile");
    let all = Case::new("bench", "small".to_owned(), |check| {
        for entry in entries(check.executor, &Shape::SMALL)? {
            assert!(!matches!(entry.work, Work::Bytes(0) | Work::Flops(0)), "{} does nothing", entry.name);
            entry.start(check.executor)?;
        }
        Ok(())
    });
    shim.run(&all, Order::Ascending).unwrap_or_else(|error| panic!("{error}"));
}
