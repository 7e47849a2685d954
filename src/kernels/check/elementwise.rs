//! The cases of additions and scalings.

use super::{COUNTS, Case, Check, CheckError, Tolerance, flat, random, tensor, values};
use crate::kernels::elementwise::{self, device};
use crate::kernels::launch::KernelDtype;

const FACTOR: f32 = -0.7;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for n in COUNTS.into_iter().chain([2048, 5003]) {
            let name = |op: &str| format!("{op} {} {n}", dtype.suffix());
            let case = Case::new("elementwise", name("add"), move |check| add(check, dtype, n));
            cases.push(case.moving(device::add_bytes(dtype, n)));
            let case = Case::new("elementwise", name("scale"), move |check| scale(check, dtype, n));
            cases.push(case.moving(device::scale_bytes(dtype, n)));
            if dtype == KernelDtype::F32 {
                continue;
            }
            let case = Case::new("elementwise", name("add_same"), move |check| add_same(check, dtype, n));
            cases.push(case.moving(device::add_same_bytes(dtype, n)));
            let case = Case::new("elementwise", name("cast"), move |check| cast(check, dtype, n));
            cases.push(case.moving(device::cast_bytes(dtype, n)));
        }
        for (rows, columns) in COUNTS.map(|rows| (rows, 64)).into_iter().chain([(3, 8), (2, 136), (2, 4096)]) {
            let name = format!("scale_columns {} [{rows}, {columns}]", dtype.suffix());
            let case = Case::new("elementwise", name, move |check| scale_columns(check, dtype, rows, columns));
            cases.push(case.moving(device::scale_columns_bytes(dtype, rows, columns)));
        }
    }
    cases.push(Case::refused(
        "elementwise",
        "an address that is not aligned",
        "kernel `add_f32`: a buffer at 0x18, expected a multiple of 16 bytes",
        |executor| device::add_(executor, KernelDtype::F32, 0x10, 0x18, 1),
    ));
    cases.push(Case::new("elementwise", "nothing to add or scale".to_owned(), |check| {
        device::add_(check.executor, KernelDtype::F32, 0, 0, 0)?;
        Ok(device::scale_(check.executor, KernelDtype::F32, 0, 0, 1.0)?)
    }));
    cases
}

fn add(check: &mut Check, dtype: KernelDtype, n: usize) -> Result<(), CheckError> {
    let (sum, x) = (random(1, n, 1.0, KernelDtype::F32), random(2, n, 1.0, dtype));
    let expected = flat(&sum)?;
    elementwise::add_(&expected, &flat(&x)?)?;
    let (sum, x) = (check.input("sum", KernelDtype::F32, &sum)?, check.input("x", dtype, &x)?);
    device::add_(check.executor, dtype, sum, x, n)?;
    check.expect_bits("sum", sum, &values(&expected)?)
}

fn add_same(check: &mut Check, dtype: KernelDtype, n: usize) -> Result<(), CheckError> {
    let (sum, x) = (random(1, n, 1.0, dtype), random(2, n, 1.0, dtype));
    let expected: Vec<f32> = sum.iter().zip(&x).map(|(a, b)| dtype.round(a + b)).collect();
    let (sum, x) = (check.input("sum", dtype, &sum)?, check.input("x", dtype, &x)?);
    device::add_same_(check.executor, dtype, sum, x, n)?;
    check.expect_bits("sum", sum, &dtype.to_bytes(&expected))
}

fn cast(check: &mut Check, dtype: KernelDtype, n: usize) -> Result<(), CheckError> {
    let values = random(1, n, 1.0, KernelDtype::F32);
    let (x, y) = (check.input("x", KernelDtype::F32, &values)?, check.output("y", dtype, n)?);
    device::cast(check.executor, dtype, [x, y], n)?;
    check.expect_bits("y", y, &dtype.to_bytes(&values))
}

fn scale(check: &mut Check, dtype: KernelDtype, n: usize) -> Result<(), CheckError> {
    let x = random(1, n, 1.0, dtype);
    let expected = flat(&x)?;
    elementwise::scale_(&expected, FACTOR)?;
    let x = check.input("x", dtype, &x)?;
    device::scale_(check.executor, dtype, x, n, FACTOR)?;
    check.expect_bits("x", x, &dtype.to_bytes(&values(&expected)?))
}

fn scale_columns(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (x, factors) = (random(1, rows * columns, 1.0, dtype), random(2, columns, 1.0, KernelDtype::F32));
    let expected = elementwise::scale_columns(&tensor(&x, rows)?, &factors)?;
    let (x, factors) = (check.input("x", dtype, &x)?, check.input("factors", KernelDtype::F32, &factors)?);
    let y = check.output("y", dtype, rows * columns)?;
    device::scale_columns(check.executor, dtype, [x, factors, y], rows, columns)?;
    check.expect("y", y, dtype, &values(&expected)?, Tolerance::rounded_once(dtype))
}
