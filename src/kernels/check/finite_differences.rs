//! Backward kernels against central differences of the forward kernels, in f32: true of the kernels by themselves, whatever the specification is.

use super::{Case, Check, CheckError, random};
use crate::kernels::launch::KernelDtype;
use crate::kernels::rms_norm;

/// Of a unit normal direction: small against the inputs, large against f32's rounding.
const STEP: f32 = 1e-2;
/// Of the gradient's norm: what rounding and the third derivative leave.
const TOLERANCE: f64 = 5e-3;
const F32: KernelDtype = KernelDtype::F32;

pub fn cases() -> Vec<Case> {
    vec![Case::new("rms_norm", "finite differences [5, 136]".to_owned(), |check| rms_norm(check, 5, 136))]
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
