//! RMSNorm's cases.

use candle_core::{Device, Tensor};

use super::{COUNTS, Case, Check, CheckError, Tolerance, random};
use crate::kernels::launch::KernelDtype;
use crate::kernels::rms_norm::{self, device};

const EPS: f64 = 1e-5;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for (rows, columns) in COUNTS.map(|rows| (rows, 64)).into_iter().chain([(3, 8), (2, 136), (2, 4096), (1, 6144)]) {
            let name = |pass: &str| format!("{pass} {} [{rows}, {columns}]", dtype.suffix());
            cases.push(Case::new("rms_norm", name("fwd"), move |check| forward(check, dtype, rows, columns)));
            cases.push(Case::new("rms_norm", name("bwd"), move |check| backward(check, dtype, rows, columns)));
        }
    }
    cases
}

fn tensor(values: &[f32], rows: usize) -> candle_core::Result<Tensor> {
    Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu)
}

fn forward(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (x, w) = (random(1, rows * columns, 1.5, dtype), random(2, columns, 1.0, dtype));
    let (y, rstd) = rms_norm::fwd(&tensor(&x, rows)?, &Tensor::from_slice(&w, columns, &Device::Cpu)?, EPS)?;
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
    check.expect("y", on_device.y, dtype, &y.flatten_all()?.to_vec1::<f32>()?, tolerance)?;
    check.expect("rstd", on_device.rstd, KernelDtype::F32, &rstd.to_vec1::<f32>()?, Tolerance::rounded_once(KernelDtype::F32))
}

fn backward(check: &mut Check, dtype: KernelDtype, rows: usize, columns: usize) -> Result<(), CheckError> {
    let (x, w) = (random(1, rows * columns, 1.5, dtype), random(2, columns, 1.0, dtype));
    let (dy, dx) = (random(3, rows * columns, 1.0, dtype), random(4, rows * columns, 1.0, dtype));
    let (x_t, w_t, dx_t) = (tensor(&x, rows)?, Tensor::from_slice(&w, columns, &Device::Cpu)?, tensor(&dx, rows)?);
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
    check.expect("dx", on_device.y, dtype, &dx_t.flatten_all()?.to_vec1::<f32>()?, Tolerance::rounded_once(dtype))
}
