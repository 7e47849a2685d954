//! Backward kernels against central differences of the forward kernels, in f32: true of the kernels by themselves, whatever the specification is.

use super::{Case, Check, CheckError, random};
use crate::kernels::attention::device::{self as attention_device, Batch, DqkvAt, GradsAt, PrefixAt, RowSums, Tiles};
use crate::kernels::attention::{Heads, Wanted};
use crate::kernels::cross_entropy::{self, Logits};
use crate::kernels::launch::{KernelDtype, NO_FAULT};
use crate::kernels::{rms_norm, swiglu};

/// Of a unit normal direction: small against the inputs, large against f32's rounding.
const STEP: f32 = 1e-2;
/// Of the gradient's norm: what rounding and the third derivative leave.
const TOLERANCE: f64 = 5e-3;
const F32: KernelDtype = KernelDtype::F32;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("rms_norm", "finite differences [5, 136]".to_owned(), |check| rms_norm(check, 5, 136)),
        Case::new("swiglu", "finite differences [5, 72]".to_owned(), |check| swiglu(check, 5, 72)),
        Case::new("cross_entropy", "finite differences [5, 72]".to_owned(), |check| cross_entropy(check, 5, 72)),
        Case::new("attention_f32", "finite differences, rows of 3 and 9 behind 5".to_owned(), attention),
    ]
}

/// Holds `gradient` of sum(dy forward(x)) against differences along a random direction.
fn along_a_direction(
    check: &mut Check,
    x: &[f32],
    dy: &[f32],
    gradient: &[f32],
    forward: impl Fn(&mut Check, &[f32]) -> Result<Vec<f32>, CheckError>,
) -> Result<(), CheckError> {
    let direction = random(77, x.len(), 1.0, F32);
    let mut loss = |step: f32| -> Result<f64, CheckError> {
        let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, v)| x + step * v).collect();
        Ok(dot(&forward(check, &moved)?, dy))
    };
    let found = (loss(STEP)? - loss(-STEP)?) / f64::from(2.0 * STEP);
    let (expected, norm) = (dot(gradient, &direction), dot(gradient, gradient).sqrt());
    if (expected - found).abs() <= TOLERANCE * norm {
        return Ok(());
    }
    let what = format!("the gradient along a direction (its norm is {norm:.4e})");
    Err(CheckError::Other { what, expected: format!("{expected:.6e}"), found: format!("differences of {found:.6e}") })
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn rms_norm(check: &mut Check, rows: usize, columns: usize) -> Result<(), CheckError> {
    let n = rows * columns;
    let (x, w, dy) = (random(1, n, 1.0, F32), random(2, columns, 1.0, F32), random(3, n, 1.0, F32));
    let forward = |check: &mut Check, x: &[f32]| -> Result<_, CheckError> {
        let (x, w) = (check.input("x", F32, x)?, check.input("w", F32, &w)?);
        let (y, rstd) = (check.output("y", F32, n)?, check.output("rstd", F32, rows)?);
        let on_device = rms_norm::device::Rows { x, w, y, rstd, rows, columns };
        rms_norm::device::fwd(check.executor, F32, &on_device, 1e-5)?;
        Ok((check.read(y, F32, n)?, on_device))
    };
    let (_, saved) = forward(check, &x)?;
    let (dx, dy_at) = (check.input("dx", F32, &vec![0.0; n])?, check.input("dy", F32, &dy)?);
    rms_norm::device::bwd_add(check.executor, F32, &rms_norm::device::Rows { y: dx, ..saved }, dy_at)?;
    let gradient = check.read(dx, F32, n)?;
    along_a_direction(check, &x, &dy, &gradient, |check, x| Ok(forward(check, x)?.0))
}

fn swiglu(check: &mut Check, rows: usize, columns: usize) -> Result<(), CheckError> {
    let n = rows * columns;
    let (x, dy) = (random(1, 2 * n, 1.0, F32), random(2, n, 1.0, F32));
    let on_device = |gate_up, act| swiglu::device::Rows { gate_up, act, rows, columns, stride: 2 * columns };
    let at = on_device(check.input("gate_up", F32, &x)?, check.input("dact", F32, &dy)?);
    swiglu::device::bwd_(check.executor, F32, &at)?;
    let gradient = check.read(at.gate_up, F32, 2 * n)?;
    along_a_direction(check, &x, &dy, &gradient, |check, x| {
        let at = on_device(check.input("gate_up", F32, x)?, check.output("act", F32, n)?);
        swiglu::device::fwd(check.executor, F32, &at)?;
        Ok(check.read(at.act, F32, n)?)
    })
}

fn cross_entropy(check: &mut Check, rows: usize, columns: usize) -> Result<(), CheckError> {
    let x = random(1, rows * columns, 2.0, F32);
    let targets: Vec<u8> = (0..rows).flat_map(|row| ((row * 17 % columns) as i32).to_le_bytes()).collect();
    let on_device = |check: &Check, x: &[f32]| -> Result<_, CheckError> {
        let (logits, targets) = (check.input("logits", F32, x)?, check.bytes("targets", &targets)?);
        let (losses, fault) = (check.output("losses", F32, rows)?, check.bytes("fault", &NO_FAULT.to_le_bytes())?);
        Ok(cross_entropy::device::Rows { logits, targets, losses, fault, rows, columns })
    };
    let at = on_device(check, &x)?;
    cross_entropy::device::nll_(check.executor, F32, &at, Logits::ToGradient, 1.0)?;
    let gradient = check.read(at.logits, F32, x.len())?;
    along_a_direction(check, &x, &vec![1.0; rows], &gradient, |check, x| {
        let at = on_device(check, x)?;
        cross_entropy::device::nll_(check.executor, F32, &at, Logits::Discard, 1.0)?;
        Ok(check.read(at.losses, F32, rows)?)
    })
}

/// Towards q, k, v and the prefix's k and v together.
fn attention(check: &mut Check) -> Result<(), CheckError> {
    const PREFIX: usize = 5;
    let heads = Heads { num_heads: 4, num_groups: 2, head_dim: 64 };
    let (bounds, width) = ([0, 3, 12], heads.qkv_width());
    let (tokens, num_rows, size) = (bounds[2], bounds.len() - 1, heads.num_groups * PREFIX * heads.head_dim);
    let (of_qkv, of_out, of_lse) = (tokens * width, tokens * heads.num_heads * heads.head_dim, tokens * heads.num_heads);
    let (x, dout) = (random(1, of_qkv + 2 * size, 1.0, F32), random(2, of_out, 1.0, F32));
    let tiles = Tiles::new(&bounds, PREFIX, Wanted::All);
    let forward = |check: &mut Check, x: &[f32]| -> Result<_, CheckError> {
        let (qkv, prefix) = x.split_at(of_qkv);
        let (k, v) = (check.input("prefix k", F32, &prefix[..size])?, check.input("prefix v", F32, &prefix[size..])?);
        let batch = Batch {
            heads,
            tiles: &tiles,
            tiles_at: check.bytes("tiles", tiles.bytes())?,
            qkv: check.input("qkv", F32, qkv)?,
            qkv_stride: width,
            prefix: PrefixAt::Shared { k, v },
            out: check.output("out", F32, of_out)?,
            lse: check.output("lse", F32, of_lse)?,
        };
        attention_device::fwd(check.executor, F32, &batch)?;
        Ok((check.read(batch.out, F32, of_out)?, batch))
    };
    let (_, batch) = forward(check, &x)?;
    let dqkv = check.output("dqkv", F32, of_qkv)?;
    let grads = GradsAt {
        dout: check.input("dout", F32, &dout)?,
        delta: check.output("delta", F32, of_lse)?,
        dqkv: DqkvAt::Here { address: dqkv, stride: width },
        dprefix_k: check.output("dprefix k", F32, num_rows * size)?,
        dprefix_v: check.output("dprefix v", F32, num_rows * size)?,
    };
    attention_device::bwd(check.executor, F32, &batch, &grads)?;
    let (dk, dv) = (check.output("dk", F32, size)?, check.output("dv", F32, size)?);
    let GradsAt { dprefix_k, dprefix_v, .. } = grads;
    attention_device::sum_rows(check.executor, &RowSums { dprefix_k, dprefix_v, dk, dv, size, num_rows })?;
    let gradient = [check.read(dqkv, F32, of_qkv)?, check.read(dk, F32, size)?, check.read(dv, F32, size)?].concat();
    along_a_direction(check, &x, &dout, &gradient, |check, x| Ok(forward(check, x)?.0))
}
