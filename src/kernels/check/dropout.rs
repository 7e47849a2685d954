//! The cases of dropout and of a prefix with it: the masks have the CPU's bits.

use candle_core::{DType, Device};

use super::{COUNTS, Case, Check, CheckError, Tolerance, random, tensor, values};
use crate::kernels::dropout::{Key, Mask, Rows, device};
use crate::kernels::launch::KernelDtype;
use crate::kernels::prefix::{self, Dropout, Layout, device as prefix_device};
use crate::rng::Stream;

const KEY: Key = Key { seed: 0x1234_5678_9abc_def0, stream: Stream::LowRankDropout, place: 4095, p: 0.3 };
/// Places in the training stream, one of them beyond 32 bits.
const POSITIONS: [u64; 4] = [5, 0, (1 << 40) + 3, 77];
const LAYOUT: Layout = Layout { virtual_tokens: 5, layers: 3, groups: 2, head_dim: 64 };

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for (tokens, columns) in COUNTS.map(|tokens| (tokens, 64)).into_iter().chain([(9, 8), (5, 136), (2, 4096)]) {
            let name = format!("dropout {} of a row of {tokens}, {columns} values", dtype.suffix());
            let case = Case::new("dropout", name, move |check| dropout(check, dtype, &[0, tokens], columns));
            cases.push(case.moving(device::bytes_of_a_row(dtype, tokens, columns)));
        }
        cases.push(Case::new("dropout", format!("dropout {} of four rows", dtype.suffix()), move |check| {
            dropout(check, dtype, &[0, 3, 4, 36, 49], 64)
        }));
        for rows in [0, 1, 4] {
            let name = |op: &str| format!("{op} {} for {rows} rows", dtype.suffix());
            cases.push(Case::new("dropout", name("prefix_expand"), move |check| expand(check, dtype, rows)));
        }
    }
    for (rows, drops) in [(1, false), (4, false), (1, true), (4, true)] {
        let name = format!("prefix_sum of {rows} rows, dropout {drops}");
        cases.push(Case::new("dropout", name, move |check| sum(check, rows, drops)));
    }
    cases.push(Case::refused(
        "dropout",
        "rows between bounds",
        "kernel `dropout_bf16`: rows of 20 values, expected a multiple of 8",
        |executor| {
            let rows = device::Rows { x: 0, y: 0, bounds: 0, positions: 0, tokens: 1, columns: 20, rows: 1 };
            device::apply(executor, KernelDtype::Bf16, KEY, &rows)
        },
    ));
    cases
}

fn dropout(check: &mut Check, dtype: KernelDtype, bounds: &[usize], columns: usize) -> Result<(), CheckError> {
    let (tokens, rows) = (bounds[bounds.len() - 1], bounds.len() - 1);
    let x = random(1, tokens * columns, 1.0, dtype);
    let mask = Mask::new(KEY, &Rows::new(bounds, &POSITIONS[..rows], &Device::Cpu)?, columns);
    let expected = values(&mask.apply(&tensor(&x, tokens)?)?)?;
    let words: Vec<u32> = bounds.iter().map(|&bound| bound as u32).collect();
    let on_device = device::Rows {
        x: check.input("x", dtype, &x)?,
        y: check.output("y", dtype, tokens * columns)?,
        bounds: check.bytes("bounds", bytemuck::cast_slice(&words))?,
        positions: check.bytes("positions", bytemuck::cast_slice(&POSITIONS[..rows]))?,
        tokens,
        columns,
        rows,
    };
    device::apply(check.executor, dtype, KEY, &on_device)?;
    check.expect_bits("y", on_device.y, &dtype.to_bytes(&expected))
}

/// Of `rows` rows with dropout; 0: of all rows without.
fn dropout_of(rows: usize) -> candle_core::Result<Dropout> {
    if rows == 0 { Ok(Dropout::None) } else { Dropout::keyed(LAYOUT, KEY.seed, KEY.p, &POSITIONS[..rows], &Device::Cpu) }
}

fn keyed(check: &Check, rows: usize) -> Result<prefix_device::Keyed, CheckError> {
    if rows == 0 {
        return Ok(prefix_device::Keyed::default());
    }
    let positions = check.bytes("positions", bytemuck::cast_slice(&POSITIONS[..rows]))?;
    Ok(prefix_device::Keyed { positions, seed: KEY.seed, p: KEY.p })
}

fn expand(check: &mut Check, dtype: KernelDtype, rows: usize) -> Result<(), CheckError> {
    let table = random(1, LAYOUT.len(), 1.0, KernelDtype::F32);
    for layer in 0..LAYOUT.layers {
        let (k, v) = prefix::expand(&tensor(&table, LAYOUT.virtual_tokens)?, LAYOUT, layer, &dropout_of(rows)?, DType::F32)?;
        let len = k.elem_count();
        let at = prefix_device::At {
            table: check.input("table", KernelDtype::F32, &table)?,
            k: check.output("k", dtype, len)?,
            v: check.output("v", dtype, len)?,
            layout: LAYOUT,
            layer,
            rows: rows.max(1),
        };
        let keyed = keyed(check, rows)?;
        prefix_device::expand(check.executor, dtype, &at, &keyed)?;
        check.expect_bits("k", at.k, &dtype.to_bytes(&values(&k)?))?;
        check.expect_bits("v", at.v, &dtype.to_bytes(&values(&v)?))?;
    }
    Ok(())
}

fn sum(check: &mut Check, rows: usize, drops: bool) -> Result<(), CheckError> {
    let Layout { virtual_tokens, groups, head_dim, layers } = LAYOUT;
    let grad = random(1, LAYOUT.len(), 1.0, KernelDtype::F32);
    let shape = (rows, groups, virtual_tokens, head_dim);
    let [dk, dv] = [2, 3].map(|key| random(key, rows * groups * virtual_tokens * head_dim, 1.0, KernelDtype::F32));
    let expected = tensor(&grad, virtual_tokens)?;
    let table = check.input("grad", KernelDtype::F32, &grad)?;
    let keyed = keyed(check, if drops { rows } else { 0 })?;
    for layer in 0..layers {
        let [k, v] = [&dk, &dv].map(|grad| tensor(grad, rows).and_then(|grad| grad.reshape(shape)));
        prefix::sum_(&expected, LAYOUT, layer, [&k?, &v?], &dropout_of(if drops { rows } else { 0 })?)?;
        let (k, v) = (check.input("dk", KernelDtype::F32, &dk)?, check.input("dv", KernelDtype::F32, &dv)?);
        prefix_device::sum_(check.executor, &prefix_device::At { table, k, v, layout: LAYOUT, layer, rows }, &keyed)?;
    }
    check.expect("grad", table, KernelDtype::F32, &values(&expected)?, Tolerance::default())
}
