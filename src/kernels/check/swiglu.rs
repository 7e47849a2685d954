//! SwiGLU's cases.

use super::{COUNTS, Case, Check, CheckError, Tolerance, random, strided, tensor, values};
use crate::kernels::launch::KernelDtype;
use crate::kernels::swiglu::{self, device};

/// Between rows that are apart; nothing may read or change it.
const BETWEEN: f32 = -7.0;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        let contiguous = COUNTS.map(|rows| (rows, 64)).into_iter().chain([(3, 8), (2, 136), (2, 4096), (1, 13696)]);
        for (rows, columns, gap) in contiguous.map(|(rows, columns)| (rows, columns, 0)).chain([(5, 40, 16)]) {
            let stride = 2 * columns + gap;
            let name = |pass: &str| format!("{pass} {} [{rows}, {columns}], rows {stride} apart", dtype.suffix());
            let forward = Case::new("swiglu", name("fwd"), move |check| forward(check, dtype, rows, columns, stride));
            cases.push(forward.moving(device::fwd_bytes(dtype, rows, columns)));
            let backward = Case::new("swiglu", name("bwd"), move |check| backward(check, dtype, rows, columns, stride));
            cases.push(backward.moving(device::bwd_bytes(dtype, rows, columns)));
        }
    }
    let rows = |columns, stride| device::Rows { gate_up: 0, act: 0, rows: 1, columns, stride };
    cases.push(Case::refused(
        "swiglu",
        "a width of 12",
        "kernel `swiglu_fwd_bf16`: rows of 12 values, expected a multiple of 8",
        move |executor| device::fwd(executor, KernelDtype::Bf16, &rows(12, 24)),
    ));
    cases.push(Case::refused(
        "swiglu",
        "rows that overlap",
        "kernel `swiglu_bwd_f32`: rows 12 values apart, expected a multiple of 4 from 16 on",
        move |executor| device::bwd_(executor, KernelDtype::F32, &rows(8, 12)),
    ));
    cases
}

fn forward(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize, stride: usize) -> Result<(), CheckError> {
    let gate_up = random(1, rows * 2 * columns, 2.0, dtype);
    let expected = swiglu::fwd(&tensor(&gate_up, rows)?)?;
    let on_device = device::Rows {
        gate_up: check.input("gate_up", dtype, &strided(&gate_up, 2 * columns, stride, BETWEEN))?,
        act: check.output("act", dtype, rows * columns)?,
        rows,
        columns,
        stride,
    };
    device::fwd(check.executor, dtype, &on_device)?;
    check.expect("act", on_device.act, dtype, &values(&expected)?, Tolerance::rounded_once(dtype))
}

fn backward(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize, stride: usize) -> Result<(), CheckError> {
    let (gate_up, dact) = (random(1, rows * 2 * columns, 2.0, dtype), random(2, rows * columns, 1.0, dtype));
    let expected = values(&swiglu::bwd(tensor(&gate_up, rows)?, &tensor(&dact, rows)?)?)?;
    let on_device = device::Rows {
        gate_up: check.input("gate_up", dtype, &strided(&gate_up, 2 * columns, stride, BETWEEN))?,
        act: check.input("dact", dtype, &dact)?,
        rows,
        columns,
        stride,
    };
    device::bwd_(check.executor, dtype, &on_device)?;
    let expected = strided(&expected, 2 * columns, stride, BETWEEN);
    check.expect("dgate_up", on_device.gate_up, dtype, &expected, Tolerance::rounded_once(dtype))
}
