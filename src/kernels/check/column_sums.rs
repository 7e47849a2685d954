//! The cases of sums over rows.

use super::{Bound, Case, Check, CheckError, Tolerance, flat, random, tensor, values};
use crate::kernels::column_sums::{Sums, add_column_dots_, add_row_sum_, bytes, num_partials};
use crate::kernels::elementwise;
use crate::kernels::launch::KernelDtype;

/// Rows and columns: about the rows of a block, of several blocks, and tiles of columns.
pub const SIZES: [(usize, usize); 10] =
    [(1, 64), (31, 64), (33, 64), (127, 64), (128, 8), (129, 64), (193, 64), (300, 136), (2, 4096), (260, 264)];
/// Some hundred values of size 1 in another order than the CPU's.
pub const TOLERANCE: Tolerance =
    Tolerance { rounding: Bound { relative: 0.0, absolute: 0.0 }, arithmetic: Bound { relative: 1e-5, absolute: 2e-5 } };

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for (rows, columns) in SIZES {
            let name = |op: &str| format!("{op} {} [{rows}, {columns}]", dtype.suffix());
            let case = Case::new("column_sums", name("row_sum"), move |check| row_sum(check, dtype, rows, columns));
            cases.push(case.moving(bytes(dtype, rows, columns, 1)));
            let case = Case::new("column_sums", name("dots"), move |check| dots(check, dtype, rows, columns));
            cases.push(case.moving(bytes(dtype, rows, columns, 2)));
        }
    }
    cases.push(Case::refused(
        "column_sums",
        "a width of 12",
        "kernel `row_sum_bf16`: rows of 12 values, expected a multiple of 8",
        |executor| add_row_sum_(executor, KernelDtype::Bf16, &Sums { sums: 0, partials: 0, rows: 1, columns: 12 }, 0),
    ));
    cases
}

fn sums(check: &Check, sums: &[f32], rows: usize) -> Result<Sums, CheckError> {
    let columns = sums.len();
    Ok(Sums {
        sums: check.input("sums", KernelDtype::F32, sums)?,
        partials: check.output("partials", KernelDtype::F32, num_partials(rows, columns))?,
        rows,
        columns,
    })
}

fn row_sum(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (before, x) = (random(1, columns, 1.0, KernelDtype::F32), random(2, rows * columns, 1.0, dtype));
    let expected = flat(&before)?;
    elementwise::add_row_sum_(&expected, &tensor(&x, rows)?)?;
    let sums = sums(check, &before, rows)?;
    let x = check.input("x", dtype, &x)?;
    add_row_sum_(check.executor, dtype, &sums, x)?;
    check.expect("sums", sums.sums, KernelDtype::F32, &values(&expected)?, TOLERANCE)
}

fn dots(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (before, a, b) =
        (random(1, columns, 1.0, KernelDtype::F32), random(2, rows * columns, 1.0, dtype), random(3, rows * columns, 1.0, dtype));
    let expected = elementwise::column_dots(&tensor(&a, rows)?, &tensor(&b, rows)?)?;
    let expected: Vec<f32> = expected.iter().zip(&before).map(|(dot, before)| before + dot).collect();
    let sums = sums(check, &before, rows)?;
    let (a, b) = (check.input("a", dtype, &a)?, check.input("b", dtype, &b)?);
    add_column_dots_(check.executor, dtype, &sums, a, b)?;
    check.expect("sums", sums.sums, KernelDtype::F32, &expected, TOLERANCE)
}
