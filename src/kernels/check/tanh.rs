//! The cases of tanh.

use super::{Bound, COUNTS, Case, Check, CheckError, Tolerance, flat, random, values};
use crate::kernels::launch::KernelDtype;
use crate::kernels::tanh::{self, device};

const F32: KernelDtype = KernelDtype::F32;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in COUNTS.into_iter().chain([1024, 5003]) {
        cases.push(Case::new("tanh", format!("fwd {n}"), move |check| forward(check, n)).moving(device::fwd_bytes(n)));
        cases.push(Case::new("tanh", format!("bwd {n}"), move |check| backward(check, n)));
    }
    cases
}

/// Small, large and in between, infinities among them.
fn inputs(n: usize) -> Vec<f32> {
    let mut x = random(1, n, 1.0, F32);
    x.iter_mut().enumerate().for_each(|(i, x)| *x *= [1e-3, 0.3, 1.0, 4.0, 50.0][i % 5]);
    let special = [0.0, -0.0, 0.625, -0.6249999, f32::INFINITY, f32::NEG_INFINITY, 1e-30];
    x.iter_mut().rev().zip(special).for_each(|(x, value)| *x = value);
    x
}

fn forward(check: &mut Check, n: usize) -> Result<(), CheckError> {
    let x = inputs(n);
    let expected = values(&tanh::fwd(&flat(&x)?)?)?;
    let at = device::At { x: check.input("x", F32, &x)?, dy: 0, out: check.output("y", F32, n)?, n };
    device::fwd(check.executor, &at)?;
    // Relative alone: near 0, where 1 - 2 / (e^2x + 1) cancels, an absolute bound would let everything pass.
    let arithmetic = Bound { relative: 1e-6, absolute: 0.0 };
    check.expect("y", at.out, F32, &expected, Tolerance { rounding: Bound::default(), arithmetic })
}

fn backward(check: &mut Check, n: usize) -> Result<(), CheckError> {
    let (y, dy) = (values(&tanh::fwd(&flat(&inputs(n))?)?)?, random(2, n, 1.0, F32));
    let expected = values(&tanh::bwd(&flat(&y)?, &flat(&dy)?)?)?;
    let at = device::At { x: check.input("y", F32, &y)?, dy: check.input("dy", F32, &dy)?, out: check.output("dx", F32, n)?, n };
    device::bwd(check.executor, &at)?;
    check.expect("dx", at.out, F32, &expected, Tolerance::rounded_once(F32))
}
