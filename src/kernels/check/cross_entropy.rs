//! Cross-entropy's cases.

use super::{COUNTS, Case, Check, CheckError, Tolerance, random, tensor, values};
use crate::kernels::cross_entropy::{self, Logits, device};
use crate::kernels::launch::{KernelDtype, NO_FAULT};

const SCALE: f32 = 0.37;

/// Rows of logits.
#[derive(Clone, Copy)]
struct Chunk {
    rows: usize,
    vocabulary: usize,
    /// Standard deviation of the logits.
    size: f32,
    /// So many of each row's first logits are minus infinity.
    impossible: usize,
    /// Every third row is not in the loss.
    has_ignored: bool,
}

pub fn cases() -> Vec<Case> {
    let chunk = |rows, vocabulary| Chunk { rows, vocabulary, size: 3.0, impossible: 0, has_ignored: false };
    let mut chunks = COUNTS.map(|rows| chunk(rows, 8)).to_vec();
    chunks.extend([(5, 1000), (1, 4104)].map(|(rows, vocabulary)| chunk(rows, vocabulary)));
    chunks.push(Chunk { has_ignored: true, ..chunk(4, 4104) });
    chunks.push(Chunk { size: 30.0, ..chunk(2, 8200) });
    chunks.push(Chunk { impossible: 24, ..chunk(2, 8200) });
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        // ChatGLM2's, which takes a while.
        let whole = if dtype == KernelDtype::Bf16 { vec![chunk(1, 65024)] } else { vec![] };
        for &chunk in chunks.iter().chain(&whole) {
            let Chunk { rows, vocabulary, size, impossible, has_ignored } = chunk;
            for logits in [Logits::ToGradient, Logits::Discard] {
                // Both walk over rows alike.
                if logits == Logits::Discard && rows > 33 {
                    continue;
                }
                let name = format!(
                    "{logits:?} {} [{rows}, {vocabulary}], size {size}, {impossible} impossible, ignored {has_ignored}",
                    dtype.suffix()
                );
                let case = Case::new("cross_entropy", name, move |check| nll(check, dtype, chunk, logits));
                let bytes = device::bytes(dtype, rows, vocabulary, logits);
                // Counting runs a case once more.
                cases.push(if has_ignored || rows > 33 { case } else { case.moving(bytes) });
            }
        }
    }
    cases.push(Case::new("cross_entropy", "targets out of the vocabulary".to_owned(), bad_targets));
    for dtype in KernelDtype::ALL {
        let name = format!("the loss of an impossible target in {}", dtype.suffix());
        cases.push(Case::new("cross_entropy", name, move |check| impossible_target(check, dtype)));
    }
    let rows = device::Rows { logits: 0, targets: 0, losses: 0, fault: 0, rows: 1, columns: 12 };
    cases.push(Case::refused(
        "cross_entropy",
        "a vocabulary of 12",
        "kernel `cross_entropy_grad_bf16`: rows of 12 values, expected a multiple of 8",
        move |executor| device::nll_(executor, KernelDtype::Bf16, &rows, Logits::ToGradient, 1.0),
    ));
    cases
}

/// Logits of a row a target, on the device, and memory for what comes of them.
fn sent(check: &Check, dtype: KernelDtype, logits: &[f32], targets: &[i32]) -> Result<device::Rows, CheckError> {
    Ok(device::Rows {
        logits: check.input("logits", dtype, logits)?,
        targets: check.bytes("targets", bytemuck::cast_slice(targets))?,
        losses: check.output("losses", KernelDtype::F32, targets.len())?,
        fault: check.fault()?,
        rows: targets.len(),
        columns: logits.len() / targets.len(),
    })
}

fn nll(check: &mut Check, dtype: KernelDtype, chunk: Chunk, logits: Logits) -> Result<(), CheckError> {
    let Chunk { rows, vocabulary, size, impossible, has_ignored } = chunk;
    let mut x = random(1, rows * vocabulary, size, dtype);
    x.chunks_exact_mut(vocabulary).for_each(|row| row[..impossible].fill(f32::NEG_INFINITY));
    // The last of all, then others.
    let targets: Vec<u32> = (0..rows).map(|row| (vocabulary - 1 - row * 37 % (vocabulary - impossible)) as u32).collect();
    let is_ignored = |row: usize| has_ignored && row % 3 == 1;
    let expected = tensor(&x, rows)?;
    let mut losses = values(&cross_entropy::nll_(&expected, &targets, Logits::ToGradient)?)?;
    let mut gradient: Vec<f32> = values(&expected)?.into_iter().map(|g| g * SCALE).collect();
    for row in (0..rows).filter(|&row| is_ignored(row)) {
        losses[row] = 0.0;
        gradient[row * vocabulary..][..vocabulary].fill(0.0);
    }
    let targets: Vec<i32> =
        targets.iter().enumerate().map(|(row, &target)| if is_ignored(row) { device::IGNORED } else { target as i32 }).collect();
    let on_device = sent(check, dtype, &x, bytemuck::cast_slice(&targets))?;
    device::nll_(check.executor, dtype, &on_device, logits, SCALE)?;
    check.expect("losses", on_device.losses, KernelDtype::F32, &losses, Tolerance::rounded_once(KernelDtype::F32))?;
    check.expect_bits("fault", on_device.fault, &[NO_FAULT])?;
    let expected = if logits == Logits::ToGradient { &gradient } else { &x };
    check.expect("logits", on_device.logits, dtype, expected, Tolerance::rounded_once(dtype))
}

fn bad_targets(check: &mut Check) -> Result<(), CheckError> {
    let (dtype, targets) = (KernelDtype::Bf16, [-1i32, 7, 8, 3, -2]);
    let on_device = sent(check, dtype, &random(1, 5 * 8, 1.0, dtype), &targets)?;
    device::nll_(check.executor, dtype, &on_device, Logits::ToGradient, 1.0)?;
    check.expect_bits("fault", on_device.fault, &[2u64])?;
    let losses = check.read(on_device.losses, KernelDtype::F32, 5)?;
    let is_zero: Vec<u8> = losses.iter().map(|&loss| u8::from(loss == 0.0)).collect();
    let zeros = check.bytes("which losses are 0", &is_zero)?;
    check.expect_bits("which losses are 0", zeros, &[1u8, 0, 1, 0, 1])
}

/// The gradient alone tells that a loss is infinite.
fn impossible_target(check: &mut Check, dtype: KernelDtype) -> Result<(), CheckError> {
    let (rows, vocabulary, targets) = (3, 16, [3u32, 9, 5]);
    let mut x = random(1, rows * vocabulary, 1.0, dtype);
    x[3] = f32::NEG_INFINITY;
    if dtype != KernelDtype::F16 {
        // Both are finite, and how far they are apart is not.
        (x[2 * vocabulary + 5], x[2 * vocabulary + 6]) = (dtype.round(-3e38), dtype.round(3e38));
    }
    let expected = tensor(&x, rows)?;
    let losses = values(&cross_entropy::nll_(&expected, &targets, Logits::ToGradient)?)?;
    let on_device = sent(check, dtype, &x, bytemuck::cast_slice(&targets))?;
    device::nll_(check.executor, dtype, &on_device, Logits::ToGradient, 1.0)?;
    check.expect("losses", on_device.losses, KernelDtype::F32, &losses, Tolerance::rounded_once(KernelDtype::F32))?;
    let is_nan = |values: &[f32]| values.iter().map(|x| u8::from(x.is_nan())).collect::<Vec<_>>();
    let found = is_nan(&check.read(on_device.logits, dtype, rows * vocabulary)?);
    let found = check.bytes("which gradients are NaN", &found)?;
    check.expect_bits("which gradients are NaN", found, &is_nan(&values(&expected)?))
}
