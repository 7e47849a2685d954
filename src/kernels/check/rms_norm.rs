//! RMSNorm's cases.

use super::{COUNTS, Case, Check, CheckError, Tolerance, column_sums, flat, random, tensor, values};
use crate::kernels::column_sums::{Sums, num_partials};
use crate::kernels::launch::KernelDtype;
use crate::kernels::rms_norm::{self, device};

const EPS: f64 = 1e-5;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for (rows, columns) in COUNTS.map(|rows| (rows, 64)).into_iter().chain([(3, 8), (2, 136), (2, 4096), (1, 6144)]) {
            let name = |pass: &str| format!("{pass} {} [{rows}, {columns}]", dtype.suffix());
            cases.push(
                Case::new("rms_norm", name("fwd"), move |check| forward(check, dtype, rows, columns, 1.5))
                    .moving(device::fwd_bytes(dtype, rows, columns)),
            );
            cases.push(
                Case::new("rms_norm", name("bwd"), move |check| backward(check, dtype, rows, columns))
                    .moving(device::bwd_bytes(dtype, rows, columns)),
            );
        }
        // Of values about as large as the root of epsilon.
        let name = format!("fwd {} of small values", dtype.suffix());
        cases.push(Case::new("rms_norm", name, move |check| forward(check, dtype, 3, 64, 2e-3)));
        for (rows, columns) in column_sums::SIZES {
            let name = format!("weight {} [{rows}, {columns}]", dtype.suffix());
            let case = Case::new("rms_norm", name, move |check| weight(check, dtype, rows, columns));
            cases.push(case.moving(device::bwd_weight_bytes(dtype, rows, columns)));
        }
    }
    cases.push(Case::refused(
        "rms_norm",
        "a width of 12",
        "kernel `rms_norm_fwd_bf16`: rows of 12 values, expected a multiple of 8 up to 16384",
        |executor| device::fwd(executor, KernelDtype::Bf16, &device::Rows { x: 0, w: 0, y: 0, rstd: 0, rows: 1, columns: 12 }, EPS),
    ));
    cases.push(Case::refused(
        "rms_norm",
        "an address between bounds",
        "kernel `rms_norm_bwd_f32`: a buffer at 0x18, expected a multiple of 16 bytes",
        |executor| {
            let rows = device::Rows { x: 0, w: 0, y: 0, rstd: 0, rows: 1, columns: 64 };
            device::bwd_add(executor, KernelDtype::F32, &rows, 0x18)
        },
    ));
    cases
}

fn forward(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize, size: f32) -> Result<(), CheckError> {
    let (x, w) = (random(1, rows * columns, size, dtype), random(2, columns, 1.0, dtype));
    let (y, rstd) = rms_norm::fwd(&tensor(&x, rows)?, &flat(&w)?, EPS)?;
    let on_device = device::Rows {
        x: check.input("x", dtype, &x)?,
        w: check.input("w", dtype, &w)?,
        y: check.output("y", dtype, rows * columns)?,
        rstd: check.output("rstd", KernelDtype::F32, rows)?,
        rows,
        columns,
    };
    device::fwd(check.executor, dtype, &on_device, EPS)?;
    let tolerance = Tolerance::rounded_once(dtype);
    check.expect("y", on_device.y, dtype, &values(&y)?, tolerance)?;
    check.expect("rstd", on_device.rstd, KernelDtype::F32, &rstd.to_vec1::<f32>()?, Tolerance::rounded_once(KernelDtype::F32))
}

fn backward(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (x, w) = (random(1, rows * columns, 1.5, dtype), random(2, columns, 1.0, dtype));
    let (dy, dx) = (random(3, rows * columns, 1.0, dtype), random(4, rows * columns, 1.0, dtype));
    let (x_t, w_t, dx_t) = (tensor(&x, rows)?, flat(&w)?, tensor(&dx, rows)?);
    let (_, rstd) = rms_norm::fwd(&x_t, &w_t, EPS)?;
    rms_norm::bwd_add_(&dx_t, &tensor(&dy, rows)?, &x_t, &rstd, &w_t)?;
    let on_device = device::Rows {
        x: check.input("x", dtype, &x)?,
        w: check.input("w", dtype, &w)?,
        y: check.input("dx", dtype, &dx)?,
        rstd: check.input("rstd", KernelDtype::F32, &rstd.to_vec1::<f32>()?)?,
        rows,
        columns,
    };
    let dy = check.input("dy", dtype, &dy)?;
    device::bwd_add(check.executor, dtype, &on_device, dy)?;
    check.expect("dx", on_device.y, dtype, &values(&dx_t)?, Tolerance::rounded_once(dtype))
}

fn weight(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (x, dy) = (random(1, rows * columns, 1.0, dtype), random(2, rows * columns, 1.0, dtype));
    let (rstd, dw) = (random(3, rows, 1.0, KernelDtype::F32), random(4, columns, 1.0, KernelDtype::F32));
    let dw_t = flat(&dw)?;
    rms_norm::bwd_weight_add_(&dw_t, &tensor(&dy, rows)?, &tensor(&x, rows)?, &flat(&rstd)?)?;
    let sums = Sums {
        sums: check.input("dw", KernelDtype::F32, &dw)?,
        partials: check.output("partials", KernelDtype::F32, num_partials(rows, columns))?,
        rows,
        columns,
    };
    let operands = [check.input("dy", dtype, &dy)?, check.input("x", dtype, &x)?, check.input("rstd", KernelDtype::F32, &rstd)?];
    device::bwd_weight_add(check.executor, dtype, &sums, operands)?;
    check.expect("dw", sums.sums, KernelDtype::F32, &values(&dw_t)?, column_sums::TOLERANCE)
}
