//! Matrix products with their epilogues against the CPU's: cuBLASLt is used as meant, with operands the right way round.

use candle_core::{Device, Tensor};

use super::{Case, Check, CheckError, Tolerance, random};
use crate::kernels::gpu::{Operands, Product};
use crate::kernels::launch::KernelDtype;
use crate::kernels::matmul;

/// For a GPU alone.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for operands in [Operands::Nt, Operands::Nn, Operands::Tn] {
            for sizes in [[1, 64, 32], [33, 128, 64], [193, 1152, 1024]] {
                for (bias, residual) in [(false, false), (true, false), (false, true), (true, true)] {
                    let extra = format!("{}{}", if bias { " + bias" } else { "" }, if residual { " + residual" } else { "" });
                    let name = format!("{operands:?} {} {sizes:?}{extra}", dtype.suffix());
                    cases.push(Case::new("products", name, move |check| product(check, dtype, operands, sizes, bias, residual)));
                }
            }
        }
    }
    cases
}

fn product(
    check: &mut Check,
    dtype: KernelDtype,
    operands: Operands,
    sizes: [usize; 3],
    with_bias: bool,
    with_residual: bool,
) -> Result<(), CheckError> {
    let [m, n, k] = sizes;
    let scale = 1.0 / (k as f32).sqrt();
    let (a, b) = (random(1, m * k, 1.0, dtype), random(2, n * k, scale, dtype));
    let (bias, residual) = (random(3, n, 1.0, dtype), random(4, m * n, 1.0, dtype));
    let tensor = |values: &[f32], rows: usize| Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu);
    let expected = match operands {
        Operands::Nt => matmul::nt(&tensor(&a, m)?, &tensor(&b, n)?)?,
        Operands::Nn => matmul::nn(&tensor(&a, m)?, &tensor(&b, k)?)?,
        Operands::Tn => matmul::tn(&tensor(&a, k)?, &tensor(&b, k)?)?,
    };
    let mut expected: Vec<f32> = expected.flatten_all()?.to_vec1()?;
    for (row, residual) in expected.chunks_exact_mut(n).zip(residual.chunks_exact(n)) {
        for ((value, bias), residual) in row.iter_mut().zip(&bias).zip(residual) {
            *value += if with_bias { *bias } else { 0.0 } + if with_residual { *residual } else { 0.0 };
        }
    }
    let product = Product {
        operands,
        sizes,
        a: check.input("a", dtype, &a)?,
        b: check.input("b", dtype, &b)?,
        d: check.output("d", dtype, m * n)?,
        dtype,
        out_dtype: dtype,
        bias: if with_bias { Some(check.input("bias", dtype, &bias)?) } else { None },
        residual: if with_residual { Some(check.input("residual", dtype, &residual)?) } else { None },
    };
    check.gpu()?.product(&product)?;
    check.expect("d", product.d, dtype, &expected, Tolerance::rounded_once(dtype))
}
