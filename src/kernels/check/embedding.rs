//! The embedding's cases.

use super::{COUNTS, Case, Check, CheckError, random, tensor, values};
use crate::kernels::embedding::{
    self,
    device::{self, Segments},
};
use crate::kernels::launch::{KernelDtype, NO_FAULT};

/// Rows of the table.
const VOCABULARY: usize = 50;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in KernelDtype::ALL {
        for (tokens, columns) in COUNTS.map(|tokens| (tokens, 64)).into_iter().chain([(9, 8), (5, 136), (40, 4096)]) {
            let name = |op: &str| format!("{op} {} of {tokens} tokens, {columns} values", dtype.suffix());
            let case = Case::new("embedding", name("gather"), move |check| gather(check, dtype, tokens, columns));
            cases.push(case.moving(device::gather_bytes(dtype, tokens, columns)));
            if tokens < VOCABULARY {
                let case = Case::new("embedding", name("put"), move |check| put(check, dtype, tokens, columns));
                cases.push(case.moving(device::put_bytes(dtype, tokens, columns)));
            }
            let case = Case::new("embedding", name("scatter_add"), move |check| scatter(check, dtype, tokens, columns));
            let num_segments = Segments::new(&ids(tokens), VOCABULARY).map_or(0, |segments| segments.ids.len());
            cases.push(case.moving(device::scatter_add_bytes(dtype, tokens, num_segments, columns)));
        }
    }
    cases.push(Case::new("embedding", "ids out of the vocabulary".to_owned(), bad_ids));
    cases.push(Case::refused(
        "embedding",
        "an id out of the vocabulary, summed",
        "kernel `embedding_scatter_add`: token 1 has the id 7, expected one below 7",
        |_| Segments::new(&[3, 7, 9], 7).map(|_| ()),
    ));
    cases
}

/// Some several times, the last of the table among them.
fn ids(tokens: usize) -> Vec<u32> {
    (0..tokens).map(|t| ((VOCABULARY - 1 + t * t * 13) % VOCABULARY) as u32).collect()
}

fn gather(check: &mut Check, dtype: KernelDtype, tokens: usize, columns: usize) -> Result<(), CheckError> {
    let (table, ids) = (random(1, VOCABULARY * columns, 1.0, dtype), ids(tokens));
    let expected: Vec<f32> = ids.iter().flat_map(|&id| table[id as usize * columns..][..columns].to_vec()).collect();
    let on_device = device::Gather {
        table: check.input("table", dtype, &table)?,
        ids: check.bytes("ids", bytemuck::cast_slice(&ids))?,
        rows: check.output("rows", dtype, tokens * columns)?,
        fault: check.fault()?,
        vocabulary: VOCABULARY,
        tokens,
        columns,
    };
    device::gather(check.executor, dtype, &on_device)?;
    check.expect_bits("fault", on_device.fault, &[NO_FAULT])?;
    check.expect_bits("rows", on_device.rows, &dtype.to_bytes(&expected))
}

fn put(check: &mut Check, dtype: KernelDtype, tokens: usize, columns: usize) -> Result<(), CheckError> {
    let (mut table, rows) = (random(1, VOCABULARY * columns, 1.0, dtype), random(2, tokens * columns, 1.0, dtype));
    // 7 and 50 have no divisor in common: no place comes twice.
    let ids: Vec<u32> = (0..tokens).map(|t| ((VOCABULARY - 1 + 7 * t) % VOCABULARY) as u32).collect();
    let table_at = check.input("table", dtype, &table)?;
    for (row, &id) in rows.chunks_exact(columns).zip(&ids) {
        table[id as usize * columns..][..columns].copy_from_slice(row);
    }
    let (ids, rows) = (check.bytes("ids", bytemuck::cast_slice(&ids))?, check.input("rows", dtype, &rows)?);
    device::put(check.executor, dtype, &device::Put { table: table_at, ids, rows, tokens, columns })?;
    check.expect_bits("table", table_at, &dtype.to_bytes(&table))
}

fn bad_ids(check: &mut Check) -> Result<(), CheckError> {
    let table: Vec<f32> = (0..4 * 8).map(|i| i as f32).collect();
    let dtype = KernelDtype::Bf16;
    let on_device = device::Gather {
        table: check.input("table", dtype, &table)?,
        ids: check.bytes("ids", bytemuck::cast_slice(&[3u32, 4, 0, u32::MAX]))?,
        rows: check.output("rows", dtype, 4 * 8)?,
        fault: check.fault()?,
        vocabulary: 4,
        tokens: 4,
        columns: 8,
    };
    device::gather(check.executor, dtype, &on_device)?;
    check.expect_bits("fault", on_device.fault, &[1u64])?;
    let expected = [&table[24..], &[0.0; 8], &table[..8], &[0.0; 8]].concat();
    check.expect_bits("rows", on_device.rows, &dtype.to_bytes(&expected))
}

fn scatter(check: &mut Check, dtype: KernelDtype, tokens: usize, columns: usize) -> Result<(), CheckError> {
    let (table, x) = (random(1, VOCABULARY * columns, 1.0, KernelDtype::F32), random(2, tokens * columns, 1.0, dtype));
    let (ids, expected) = (ids(tokens), tensor(&table, VOCABULARY)?);
    embedding::scatter_add_rows_(&expected, &ids, &tensor(&x, tokens)?)?;
    let segments = Segments::new(&ids, VOCABULARY)?;
    let on_device = device::Scatter {
        table: check.input("table", KernelDtype::F32, &table)?,
        x: check.input("x", dtype, &x)?,
        ids: check.bytes("ids", bytemuck::cast_slice(&segments.ids))?,
        ends: check.bytes("ends", bytemuck::cast_slice(&segments.ends))?,
        order: check.bytes("order", bytemuck::cast_slice(&segments.order))?,
        num_segments: segments.ids.len(),
        columns,
    };
    device::scatter_add_(check.executor, dtype, &on_device)?;
    check.expect_bits("table", on_device.table, &values(&expected)?)
}
