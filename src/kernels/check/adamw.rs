//! The cases of norm, clipping and AdamW: the CPU's bits.

use super::{Case, Check, CheckError, flat, random, values};
use crate::kernels::adamw::{self, CHUNK, Norm, Update, device};
use crate::kernels::bf16;
use crate::kernels::launch::KernelDtype;

const F32: KernelDtype = KernelDtype::F32;

/// The scalars of a third step at beta1 0.9, beta2 0.999, rate 1e-2, decay 0.1.
const UPDATE: Update =
    Update { weight1: 0.1, keep2: 0.999, weight2: 0.001, keep: 0.999, step_size: -0.036_900_37, correction: 0.054_745_2, epsilon: 1e-8 };
/// With the other form of torch's lerp.
const SHORT_MEMORY: Update = Update { weight1: 0.7, keep2: 0.95, weight2: 0.05, epsilon: 1e-3, ..UPDATE };

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for n in [1, 7, 8, 100, CHUNK - 1, CHUNK, 2 * CHUNK + 11, 17 * CHUNK + 4] {
        let case = Case::new("adamw", format!("square sums of {n}"), move |check| square_sums(check, n));
        cases.push(case.moving(device::chunk_square_sums_bytes(n)));
    }
    // Small norms too, in which the 1e-6 of the factor counts.
    for (num_chunks, size) in [(0, 1.0), (1, 50.0), (3, 1e-5), (1024, 50.0), (1500, 50.0)] {
        for max_norm in [1e-6, 1e9, f64::INFINITY] {
            let name = format!("norm of {num_chunks} chunks of size {size}, at most {max_norm:e}");
            let case = Case::new("adamw", name, move |check| norm(check, num_chunks, size, max_norm));
            cases.push(case.moving(device::norm_bytes(num_chunks)));
        }
    }
    for bad in [f64::NAN, f64::INFINITY] {
        cases.push(Case::new("adamw", format!("norm of {bad}"), move |check| {
            let sums = check.bytes("sums", bytemuck::cast_slice(&[1.0, bad]))?;
            let (norm, factor) = (check.output("norm", F32, 2)?, check.output("factor", F32, 1)?);
            device::norm(check.executor, sums, 2, f64::INFINITY, norm, factor)?;
            check.expect_bits("factor", factor, &[f32::NAN])
        }));
    }
    for n in [1, 3, 31, 64, 1027, 4100] {
        for (update, kind) in [(UPDATE, "long"), (SHORT_MEMORY, "short")] {
            for (factor, has_masters) in [(1.0, false), (0.3, false), (0.3, true)] {
                let name = format!("step of {n}, {kind} memory, clipped by {factor}, masters {has_masters}");
                let case = Case::new("adamw", name, move |check| step(check, update, n, factor, has_masters));
                cases.push(case.moving(device::step_bytes(n, has_masters)));
            }
        }
    }
    cases.push(Case::new("adamw", "step that a norm forbids".to_owned(), |check| step(check, UPDATE, 31, f32::NAN, true)));
    cases.push(Case::new("adamw", "step of an empty shard".to_owned(), |check| step(check, UPDATE, 0, 1.0, false)));
    cases
}

fn square_sums(check: &mut Check, n: usize) -> Result<(), CheckError> {
    let x = random(1, n, 1.0, F32);
    let expected = values(&adamw::chunk_square_sums(&flat(&x)?)?)?;
    let (x, sums) = (check.input("x", F32, &x)?, check.output("sums", F32, expected.len())?);
    device::chunk_square_sums(check.executor, x, n, sums)?;
    check.expect_bits("sums", sums, &expected)
}

fn norm(check: &mut Check, num_chunks: usize, size: f32, max_norm: f64) -> Result<(), CheckError> {
    let sums: Vec<f64> = random(1, num_chunks, size, F32).into_iter().map(|x| f64::from(x) * f64::from(x)).collect();
    let words: &[f32] = bytemuck::cast_slice(&sums);
    let expected = Norm::new(&flat(words)?, Some(max_norm))?;
    let sums = check.input("sums", F32, words)?;
    let (norm, factor) = (check.output("norm", F32, 2)?, check.output("factor", F32, 1)?);
    device::norm(check.executor, sums, num_chunks, max_norm, norm, factor)?;
    check.expect_bits("norm", norm, &values(expected.words())?)?;
    check.expect_bits("factor", factor, &values(expected.factor())?)
}

fn step(check: &mut Check, update: Update, n: usize, factor: f32, has_masters: bool) -> Result<(), CheckError> {
    let (params, grads) = (random(1, n, 1.0, F32), random(2, n, 0.3, F32));
    let (exp_avg, exp_avg_sq) = (random(3, n, 0.1, F32), random(4, n, 0.1, F32).into_iter().map(|v| v * v).collect::<Vec<_>>());
    let on_device = device::Buffers {
        params: check.input("params", F32, &params)?,
        exp_avg: check.input("exp_avg", F32, &exp_avg)?,
        exp_avg_sq: check.input("exp_avg_sq", F32, &exp_avg_sq)?,
        grads: check.input("grads", F32, &grads)?,
        rounded: if has_masters { Some(check.input("rounded", KernelDtype::Bf16, &params)?) } else { None },
        factor: check.input("factor", F32, &[factor])?,
        n,
    };
    device::step(check.executor, &update, &on_device)?;
    let expected = [flat(&params)?, flat(&exp_avg)?, flat(&exp_avg_sq)?];
    let rounded = flat(&params)?;
    bf16::round_(&rounded)?;
    update.apply(&expected[0], &expected[1], &expected[2], &flat(&grads)?, &flat(&[factor])?)?;
    if !factor.is_nan() {
        bf16::round_into_(&rounded, &expected[0])?;
    }
    check.expect_bits("params", on_device.params, &values(&expected[0])?)?;
    check.expect_bits("exp_avg", on_device.exp_avg, &values(&expected[1])?)?;
    check.expect_bits("exp_avg_sq", on_device.exp_avg_sq, &values(&expected[2])?)?;
    match on_device.rounded {
        Some(address) => check.expect_bits("rounded", address, &KernelDtype::Bf16.to_bytes(&values(&rounded)?)),
        None => Ok(()),
    }
}
