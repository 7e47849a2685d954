//! Kernels on the host: the sources that nvcc compiles for a GPU, compiled by clang with the shim, against the CPU's code.

mod mutations;
mod shim;

use glmddp::kernels::check::{Case, cases};

use crate::shim::{Order, Shim};

/// Runs all cases of a file, each with its threads in several orders: equal bits.
fn check(file: &str) {
    let shim = Shim::compile(&shim::sources()).expect("the kernels compile");
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
fn attention() {
    check("attention");
}

#[test]
fn attention_f32() {
    check("attention_f32");
}
