//! The cases of the search for what is not finite.

use super::{COUNTS, Case, Check, CheckError, flat, random};
use crate::kernels::launch::{KernelDtype, NO_FAULT};
use crate::kernels::non_finite::{device, first_non_finite};

/// What is put into a place in turn.
const BAD: [f32; 3] = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in COUNTS.into_iter().chain([4096, 10_007]) {
        for bad in [vec![], vec![0], vec![n - 1], vec![n / 2, n / 2 + 1], vec![n / 3, n - 1], vec![0, n / 2, n - 1]] {
            let bad: Vec<usize> = bad.into_iter().filter(|&at| at < n).collect();
            let name = format!("{n} values, {bad:?} not finite");
            cases.push(Case::new("non_finite", name, move |check| search(check, n, &bad)).moving(device::bytes(n)));
        }
    }
    cases.push(Case::new("non_finite", "a lower index is kept".to_owned(), |check| {
        let x = check.input("x", KernelDtype::F32, &[1.0, f32::MAX, f32::NAN])?;
        let fault = check.bytes("fault", &1u64.to_le_bytes())?;
        device::first(check.executor, x, 3, fault)?;
        check.expect_bits("fault", fault, &[1u64])
    }));
    cases
}

fn search(check: &mut Check, n: usize, bad: &[usize]) -> Result<(), CheckError> {
    let mut x = random(1, n, 1.0, KernelDtype::F32);
    bad.iter().zip(BAD).for_each(|(&at, value)| x[at] = value);
    let expected = first_non_finite(&flat(&x)?)?.map_or(NO_FAULT, |(at, _)| at as u64);
    let (x, fault) = (check.input("x", KernelDtype::F32, &x)?, check.fault()?);
    device::first(check.executor, x, n, fault)?;
    check.expect_bits("fault", fault, &[expected])
}
