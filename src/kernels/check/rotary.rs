//! The rotary embedding's cases.

use super::{COUNTS, Case, Check, CheckError, Tolerance, random, strided, tensor, values};
use crate::kernels::launch::KernelDtype;
use crate::kernels::rotary::{self, Angles, Direction, Precision, Table, device};

/// Heads that turn; one more, the values, stands behind them.
const HEADS: usize = 3;
const BETWEEN: f32 = -7.0;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for (rows, head_dim, gap) in COUNTS.map(|rows| (rows, 16, 0)).into_iter().chain([(3, 64, 0), (5, 128, 0), (33, 32, 8)]) {
            for direction in [Direction::Forward, Direction::Inverse] {
                let name = format!("{direction:?} {} {rows} rows, head dim {head_dim}, {gap} values between rows", dtype.suffix());
                let case = Case::new("rotary", name, move |check| rotate(check, dtype, rows, head_dim, gap, direction));
                cases.push(case.moving(device::bytes(dtype, rows, HEADS, head_dim)));
            }
        }
    }
    let heads = |head_dim, stride| device::Heads { x: 0, positions: 0, cos: 0, sin: 0, rows: 1, stride, heads: 2, head_dim };
    cases.push(Case::refused(
        "rotary",
        "a head of 24",
        "kernel `rotary_f16`: 2 heads of 24 values, expected a multiple of 16",
        move |executor| device::rotate_(executor, KernelDtype::F16, &heads(24, 48), Direction::Forward),
    ));
    cases.push(Case::refused(
        "rotary",
        "rows shorter than their heads",
        "kernel `rotary_f16`: rows 24 values apart, expected a multiple of 8 from 32 on",
        move |executor| device::rotate_(executor, KernelDtype::F16, &heads(16, 24), Direction::Forward),
    ));
    cases
}

fn rotate(check: &mut Check, dtype: KernelDtype, rows: usize, head_dim: usize, gap: usize, direction: Direction) -> Result<(), CheckError> {
    let width = (HEADS + 1) * head_dim;
    // As in packed rows: positions begin again.
    let positions: Vec<u32> = (0..rows as u32).map(|t| t * 7 % 50).collect();
    let table = Table::new(&positions, head_dim, Angles { base: 10_000.0, position_divisor: 1.0, precision: Precision::Exact });
    let x = random(1, rows * width, 1.0, dtype);
    let expected = tensor(&x, rows)?;
    rotary::rotate_(&expected, &table, HEADS, head_dim, direction)?;
    let (cos, sin) = table.values();
    let on_device = device::Heads {
        x: check.input("x", dtype, &strided(&x, width, width + gap, BETWEEN))?,
        positions: check.bytes("positions", bytemuck::cast_slice(&positions))?,
        cos: check.input("cos", KernelDtype::F32, cos)?,
        sin: check.input("sin", KernelDtype::F32, sin)?,
        rows,
        stride: width + gap,
        heads: HEADS,
        head_dim,
    };
    device::rotate_(check.executor, dtype, &on_device, direction)?;
    let expected = strided(&values(&expected)?, width, width + gap, BETWEEN);
    check.expect("x", on_device.x, dtype, &expected, Tolerance::rounded_once(dtype))
}
