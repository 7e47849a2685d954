//! Matrix products with their epilogues against the CPU's: cuBLASLt is used as meant, with operands the right way round.

use candle_core::{Device, Tensor};

use super::{Case, Check, CheckError, Tolerance, random};
use crate::kernels::gpu::{Operands, Product};
use crate::kernels::launch::KernelDtype;
use crate::kernels::matmul;

/// What is added to a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Residual {
    None,
    Elsewhere,
    /// In d, which the sum replaces: how gradients of weights are added up.
    InPlace,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    operands: Operands,
    /// M, N, K.
    sizes: [usize; 3],
    dtype: KernelDtype,
    out_dtype: KernelDtype,
    bias: bool,
    residual: Residual,
}

/// For a GPU alone.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        let out_dtypes = if dtype == KernelDtype::F32 { vec![dtype] } else { vec![dtype, KernelDtype::F32] };
        for operands in [Operands::Nt, Operands::Nn, Operands::Tn] {
            for &out_dtype in &out_dtypes {
                let mut add = |sizes, bias, residual| {
                    let shape = Shape { operands, sizes, dtype, out_dtype, bias, residual };
                    cases.push(Case::new("products", shape.name(), move |check| product(check, shape)));
                };
                // The number of tokens is odd, and widths are multiples of 8, as in a model: rows begin at multiples of 16 bytes.
                let of = |tokens, from, to| match operands {
                    Operands::Nt => [tokens, to, from],
                    Operands::Nn => [tokens, from, to],
                    Operands::Tn => [to, from, tokens],
                };
                for sizes in [of(1, 32, 64), of(33, 64, 128)] {
                    for bias in [false, true] {
                        for residual in [Residual::None, Residual::Elsewhere, Residual::InPlace] {
                            add(sizes, bias, residual);
                        }
                    }
                }
                // The second has few results of many terms each, for which cuBLASLt likes to split the sum over blocks.
                for sizes in [of(193, 1024, 1152), if operands == Operands::Tn { [64, 40, 4097] } else { of(41, 4096, 64) }] {
                    add(sizes, false, Residual::None);
                    add(sizes, true, Residual::Elsewhere);
                }
            }
        }
    }
    cases.push(Case::new("products", "a shape a second time".to_owned(), the_same_again));
    cases
}

impl Shape {
    fn name(&self) -> String {
        let Self { operands, sizes, dtype, out_dtype, bias, residual } = self;
        let bias = if *bias { " + bias" } else { "" };
        let residual = match residual {
            Residual::None => "",
            Residual::Elsewhere => " + residual",
            Residual::InPlace => " + d",
        };
        format!("{operands:?} {} to {} {sizes:?}{bias}{residual}", dtype.suffix(), out_dtype.suffix())
    }
}

fn product(check: &mut Check, shape: Shape) -> Result<(), CheckError> {
    let Shape { operands, sizes: [m, n, k], dtype, out_dtype, bias: with_bias, residual: kind } = shape;
    let scale = 1.0 / (k as f32).sqrt();
    let a = check.once("a", || Ok(random(1, m * k, 1.0, dtype)))?;
    let b = check.once("b", || Ok(random(2, n * k, scale, dtype)))?;
    let bias = check.once("bias", || Ok(random(3, n, 1.0, out_dtype)))?;
    let residual = check.once("residual", || Ok(random(4, m * n, 1.0, out_dtype)))?;
    let expected = check.once("expected", || {
        let tensor = |values: &[f32], rows: usize| Tensor::from_slice(values, (rows, values.len() / rows), &Device::Cpu);
        let product = match operands {
            Operands::Nt => matmul::nt(&tensor(&a, m)?, &tensor(&b, n)?)?,
            Operands::Nn => matmul::nn(&tensor(&a, m)?, &tensor(&b, k)?)?,
            Operands::Tn => matmul::tn(&tensor(&a, k)?, &tensor(&b, k)?)?,
        };
        let mut expected: Vec<f32> = product.flatten_all()?.to_vec1()?;
        for (row, residual) in expected.chunks_exact_mut(n).zip(residual.chunks_exact(n)) {
            for ((value, bias), residual) in row.iter_mut().zip(bias.iter()).zip(residual) {
                *value += if with_bias { *bias } else { 0.0 } + if kind == Residual::None { 0.0 } else { *residual };
            }
        }
        Ok(expected)
    })?;
    let d = match kind {
        Residual::InPlace => check.input("d", out_dtype, &residual)?,
        Residual::None | Residual::Elsewhere => check.output("d", out_dtype, m * n)?,
    };
    let product = Product {
        operands,
        sizes: shape.sizes,
        a: check.input("a", dtype, &a)?,
        b: check.input("b", dtype, &b)?,
        d,
        dtype,
        out_dtype,
        bias: if with_bias { Some(check.input("bias", out_dtype, &bias)?) } else { None },
        residual: match kind {
            Residual::None => None,
            Residual::Elsewhere => Some(check.input("residual", out_dtype, &residual)?),
            Residual::InPlace => Some(d),
        },
    };
    check.gpu.product(&product)?;
    // The largest parts of the sum are of size 1 each.
    check.expect("d", product.d, out_dtype, &expected, Tolerance::summed(out_dtype, k, 2.0))
}

/// The algorithm of a shape is kept: other memory, the same bits.
fn the_same_again(check: &mut Check) -> Result<(), CheckError> {
    let [m, n, k] = [33, 128, 64];
    let dtype = KernelDtype::Bf16;
    let (a, b) = (random(1, m * k, 1.0, dtype), random(2, n * k, 1.0, dtype));
    let mut once = || -> Result<Vec<f32>, CheckError> {
        let (a, b, d) = (check.input("a", dtype, &a)?, check.input("b", dtype, &b)?, check.output("d", dtype, m * n)?);
        let product = Product { operands: Operands::Nt, sizes: [m, n, k], a, b, d, dtype, out_dtype: dtype, bias: None, residual: None };
        check.gpu.product(&product)?;
        Ok(check.read(d, dtype, m * n)?)
    };
    let (first, second) = (once()?, once()?);
    let differs = first.iter().zip(&second).position(|(a, b)| a.to_bits() != b.to_bits());
    differs.map_or(Ok(()), |at| {
        let what = format!("element {at} of the second product");
        Err(CheckError::Other { what, expected: first[at].to_string(), found: second[at].to_string() })
    })
}
