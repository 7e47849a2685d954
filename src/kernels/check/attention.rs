//! Attention's cases.

use candle_core::{Device, Tensor};

use super::{Case, Check, CheckError, Tolerance, random, values, vector_sizes};
use crate::kernels::attention::device::{self, Batch, DqkvAt, GradsAt, PrefixAt, RowSums, Tiles};
use crate::kernels::attention::{self, Heads, Prefix, Rows, Wanted};
use crate::kernels::launch::KernelDtype;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PrefixRows {
    Shared,
    PerRow,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Tokens of each row.
    rows: &'static [usize],
    prefix: usize,
    prefix_rows: PrefixRows,
    /// N, G, D
    heads: (usize, usize, usize),
    /// Elements between tokens that belong to nobody.
    gap: usize,
    /// Standard deviation of the scaled scores.
    logits: f32,
    wanted: Wanted,
}

impl Shape {
    /// The size of what gradients are multiplied with: queries are as much larger as the scores.
    fn factor(self) -> f32 {
        self.logits.max(1.0)
    }
}

const SMALL: Shape =
    Shape { rows: &[64, 31], prefix: 0, prefix_rows: PrefixRows::Shared, heads: (2, 1, 64), gap: 0, logits: 1.0, wanted: Wanted::All };

/// For all types.
const SHAPES: [Shape; 5] = [
    Shape { prefix: 128, prefix_rows: PrefixRows::PerRow, heads: (2, 2, 64), gap: 24, ..SMALL },
    Shape { rows: &[31, 1, 33], prefix: 1, heads: (4, 1, 64), ..SMALL },
    Shape { rows: &[64, 0, 65], prefix: 16, heads: (4, 2, 64), wanted: Wanted::PrefixOnly, ..SMALL },
    Shape { rows: &[1, 33], prefix: 16, heads: (2, 1, 128), gap: 8, ..SMALL },
    Shape { rows: &[127], prefix: 0, logits: 8.0, ..SMALL },
];

/// For types that tensor cores multiply.
const MORE_SHAPES: [Shape; 7] = [
    Shape { rows: &[1, 33, 127], heads: (4, 2, 64), ..SMALL },
    Shape { rows: &[33], prefix: 1, heads: (16, 1, 64), ..SMALL },
    Shape { rows: &[193], heads: (1, 1, 128), ..SMALL },
    Shape { rows: &[127, 0, 64], prefix: 128, heads: (2, 1, 128), wanted: Wanted::PrefixOnly, ..SMALL },
    Shape { rows: &[64, 31], prefix: 1, prefix_rows: PrefixRows::PerRow, heads: (4, 2, 128), gap: 8, ..SMALL },
    Shape { rows: &[127], prefix: 16, heads: (2, 1, 128), ..SMALL },
    Shape { rows: &[193], prefix: 1, heads: (1, 1, 64), logits: 30.0, ..SMALL },
];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        let (file, more): (_, &[Shape]) = if dtype == KernelDtype::F32 { ("attention_f32", &[]) } else { ("attention", &MORE_SHAPES) };
        for &shape in SHAPES.iter().chain(more) {
            cases.push(Case::new(file, format!("fwd {} {shape:?}", dtype.suffix()), move |check| forward(check, dtype, shape)));
            cases.push(Case::new(file, format!("bwd {} {shape:?}", dtype.suffix()), move |check| backward(check, dtype, shape)));
        }
    }
    cases
}

/// What both passes read.
struct Inputs {
    heads: Heads,
    bounds: Vec<usize>,
    /// `[T, stride]`
    spaced: Vec<f32>,
    stride: usize,
    qkv: Tensor,
    /// `[1 or R, G, P, D]` each.
    prefix: Option<(Tensor, Tensor)>,
}

impl Inputs {
    fn new(dtype: KernelDtype, shape: Shape) -> candle_core::Result<Self> {
        let (num_heads, num_groups, head_dim) = shape.heads;
        let heads = Heads { num_heads, num_groups, head_dim };
        let bounds: Vec<usize> = std::iter::once(0)
            .chain(shape.rows.iter().scan(0, |end, len| {
                *end += len;
                Some(*end)
            }))
            .collect();
        let (tokens, width) = (bounds[shape.rows.len()], heads.qkv_width());
        let stride = width + shape.gap;
        let mut spaced = random(1, tokens * stride, 1.0, dtype);
        for q in spaced.chunks_exact_mut(stride).flat_map(|token| &mut token[..num_heads * head_dim]) {
            *q = dtype.round(*q * shape.logits);
        }
        let qkv: Vec<f32> = spaced.chunks_exact(stride).flat_map(|token| &token[..width]).copied().collect();
        let rows = if shape.prefix_rows == PrefixRows::Shared { 1 } else { shape.rows.len() };
        let size = rows * num_groups * shape.prefix * head_dim;
        let prefix = |key| Tensor::from_vec(random(key, size, 1.0, dtype), (rows, num_groups, shape.prefix, head_dim), &Device::Cpu);
        let prefix = if shape.prefix > 0 { Some((prefix(2)?, prefix(3)?)) } else { None };
        Ok(Self { heads, bounds, spaced, stride, qkv: Tensor::from_vec(qkv, (tokens, width), &Device::Cpu)?, prefix })
    }

    fn tokens(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    fn prefix(&self) -> Option<Prefix<'_>> {
        self.prefix.as_ref().map(|(k_RGPD, v_RGPD)| Prefix { k_RGPD, v_RGPD })
    }

    fn rows(&self) -> Rows<'_> {
        Rows { bounds: &self.bounds, keep: None, tables: None }
    }

    /// On the device, without `out` and `lse`.
    fn upload<'t>(&self, check: &Check, dtype: KernelDtype, shape: Shape, tiles: &'t Tiles) -> Result<Batch<'t>, CheckError> {
        let prefix = match &self.prefix {
            None => PrefixAt::None,
            Some((k, v)) => {
                let (k, v) = (check.input("prefix k", dtype, &values(k)?)?, check.input("prefix v", dtype, &values(v)?)?);
                match shape.prefix_rows {
                    PrefixRows::Shared => PrefixAt::Shared { k, v },
                    PrefixRows::PerRow => PrefixAt::PerRow { k, v },
                }
            }
        };
        Ok(Batch {
            heads: self.heads,
            tiles,
            tiles_at: check.bytes("tiles", tiles.bytes())?,
            qkv: check.input("qkv", dtype, &self.spaced)?,
            qkv_stride: self.stride,
            prefix,
            out: 0,
            lse: 0,
        })
    }
}

fn forward(check: &mut Check, dtype: KernelDtype, shape: Shape) -> Result<(), CheckError> {
    let inputs = Inputs::new(dtype, shape)?;
    let (out, lse) = attention::fwd(&inputs.qkv, inputs.prefix(), inputs.rows(), inputs.heads)?;
    let tiles = Tiles::new(&inputs.bounds, shape.prefix, shape.wanted);
    let batch = Batch {
        out: check.output("out", dtype, out.elem_count())?,
        lse: check.output("lse", KernelDtype::F32, lse.elem_count())?,
        ..inputs.upload(check, dtype, shape, &tiles)?
    };
    device::fwd(check.executor, dtype, &batch)?;
    let out = out.reshape((inputs.tokens(), inputs.heads.num_heads, inputs.heads.head_dim))?;
    expect(check, "out", batch.out, dtype, &out, 1.0, Tolerance::rounded_inside(dtype))?;
    check.expect("lse", batch.lse, KernelDtype::F32, &values(&lse)?, Tolerance::rounded_once(KernelDtype::F32))
}

fn backward(check: &mut Check, dtype: KernelDtype, shape: Shape) -> Result<(), CheckError> {
    let inputs = Inputs::new(dtype, shape)?;
    let (heads, stride, width) = (inputs.heads, inputs.stride, inputs.heads.qkv_width());
    let (out, lse) = attention::fwd(&inputs.qkv, inputs.prefix(), inputs.rows(), heads)?;
    let (tokens, num_rows) = (inputs.tokens(), inputs.bounds.len() - 1);
    let out: Vec<f32> = values(&out)?.into_iter().map(|x| dtype.round(x)).collect();
    let dout = random(4, out.len(), 1.0, dtype);
    let tensor = |values: &[f32]| Tensor::from_slice(values, (tokens, values.len() / tokens), &Device::Cpu);
    let (dout_t, out_t) = (tensor(&dout)?, tensor(&out)?);
    let grads = attention::bwd(&dout_t, &inputs.qkv, inputs.prefix(), &out_t, &lse, inputs.rows(), heads, shape.wanted)?;

    let tiles = Tiles::new(&inputs.bounds, shape.prefix, shape.wanted);
    let lse = values(&lse)?;
    let batch = Batch {
        out: check.input("out", dtype, &out)?,
        lse: check.input("lse", KernelDtype::F32, &lse)?,
        ..inputs.upload(check, dtype, shape, &tiles)?
    };
    // What lies between tokens stays.
    let dqkv_before = random(5, tokens * stride, 1.0, dtype);
    let dqkv = match shape.wanted {
        Wanted::PrefixOnly => DqkvAt::NotWanted,
        Wanted::All if shape.gap == 0 => DqkvAt::Here { address: check.output("dqkv", dtype, tokens * stride)?, stride },
        Wanted::All => DqkvAt::Here { address: check.input("dqkv", dtype, &dqkv_before)?, stride },
    };
    let size = heads.num_groups * shape.prefix * heads.head_dim;
    let on_device = GradsAt {
        dout: check.input("dout", dtype, &dout)?,
        delta: check.output("delta", KernelDtype::F32, lse.len())?,
        dqkv,
        dprefix_k: check.output("dprefix k", KernelDtype::F32, num_rows * size)?,
        dprefix_v: check.output("dprefix v", KernelDtype::F32, num_rows * size)?,
    };
    device::bwd(check.executor, dtype, &batch, &on_device)?;
    if let (DqkvAt::Here { address, stride }, Some(grad)) = (dqkv, &grads.dqkv) {
        let (grad, mut expected, mut sizes) = (values(grad)?, dqkv_before, vec![0.0; tokens * stride]);
        for (to, from) in [(&mut expected, &grad), (&mut sizes, &vector_sizes(&grad, heads.head_dim))] {
            for (to, from) in to.chunks_exact_mut(stride).zip(from.chunks_exact(width)) {
                to[..width].copy_from_slice(from);
            }
        }
        check.expect_sized("dqkv", address, dtype, &expected, &sizes, shape.factor(), Tolerance::rounded_inside(dtype))?;
    }
    let Some((dk, dv)) = &grads.dprefix else { return Ok(()) };
    let (stored, inside, factor) = (KernelDtype::F32, Tolerance::rounded_inside(dtype), shape.factor());
    expect(check, "dprefix k", on_device.dprefix_k, stored, dk, factor, inside)?;
    expect(check, "dprefix v", on_device.dprefix_v, stored, dv, factor, inside)?;
    if shape.prefix_rows == PrefixRows::PerRow {
        return Ok(());
    }
    let sums = RowSums {
        dprefix_k: on_device.dprefix_k,
        dprefix_v: on_device.dprefix_v,
        dk: check.output("dk of all rows", stored, size)?,
        dv: check.output("dv of all rows", stored, size)?,
        size,
        num_rows,
    };
    device::sum_rows(check.executor, &sums)?;
    expect(check, "dk of all rows", sums.dk, stored, &dk.sum(0)?, factor, inside)?;
    expect(check, "dv of all rows", sums.dv, stored, &dv.sum(0)?, factor, inside)
}

/// `expected` `[.., D]`
fn expect(
    check: &mut Check,
    what: &str,
    address: u64,
    stored: KernelDtype,
    expected: &Tensor,
    factor: f32,
    tolerance: Tolerance,
) -> Result<(), CheckError> {
    let (head_dim, expected) = (expected.dim(candle_core::D::Minus1)?, values(expected)?);
    check.expect_sized(what, address, stored, &expected, &vector_sizes(&expected, head_dim), factor, tolerance)
}
