//! Launches without rows: nothing is started, nothing changes, nothing fails. A driver refuses a grid without blocks.

use super::{Case, Check, CheckError};
use crate::kernels::column_sums::{self, Sums};
use crate::kernels::cross_entropy::{self, Logits};
use crate::kernels::launch::{Executor, KernelDtype, LaunchError, NO_FAULT};
use crate::kernels::rotary::{self, Direction};
use crate::kernels::{adamw, elementwise, embedding, non_finite, rms_norm, swiglu};

const COLUMNS: usize = 64;
/// An aligned address that nothing may read or write.
const NOWHERE: u64 = 256;

pub fn cases() -> Vec<Case> {
    let case = |file, start: fn(&dyn Executor, KernelDtype) -> Result<(), LaunchError>| {
        Case::new(file, "without rows".to_owned(), move |check| {
            Ok(KernelDtype::ALL.iter().try_for_each(|dtype| start(check.executor, *dtype))?)
        })
    };
    vec![
        case("rms_norm", |e, dtype| {
            let rows = rms_norm::device::Rows { x: NOWHERE, w: NOWHERE, y: NOWHERE, rstd: NOWHERE, rows: 0, columns: COLUMNS };
            rms_norm::device::fwd(e, dtype, &rows, 1e-5)?;
            rms_norm::device::bwd_add(e, dtype, &rows, NOWHERE)
        }),
        case("swiglu", |e, dtype| {
            let rows = swiglu::device::Rows { gate_up: NOWHERE, act: NOWHERE, rows: 0, columns: COLUMNS, stride: 2 * COLUMNS };
            swiglu::device::fwd(e, dtype, &rows)?;
            swiglu::device::bwd_(e, dtype, &rows)
        }),
        case("rotary", |e, dtype| {
            let (x, cos, sin) = (NOWHERE, NOWHERE, NOWHERE);
            let heads = rotary::device::Heads { x, positions: cos, cos, sin, rows: 0, stride: 2 * COLUMNS, heads: 2, head_dim: COLUMNS };
            rotary::device::rotate_(e, dtype, &heads, Direction::Forward)
        }),
        case("cross_entropy", |e, dtype| {
            let (logits, targets, losses, fault) = (NOWHERE, NOWHERE, NOWHERE, NOWHERE);
            let rows = cross_entropy::device::Rows { logits, targets, losses, fault, rows: 0, columns: COLUMNS };
            cross_entropy::device::nll_(e, dtype, &rows, Logits::ToGradient, 1.0)
        }),
        case("embedding", |e, dtype| {
            let (table, x, ids, rows, fault) = (NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE);
            let gather = embedding::device::Gather { table, ids, rows, fault, vocabulary: 9, tokens: 0, columns: COLUMNS };
            embedding::device::gather(e, dtype, &gather)?;
            let (ends, order) = (NOWHERE, NOWHERE);
            let scatter = embedding::device::Scatter { table, x, ids, ends, order, num_segments: 0, columns: COLUMNS };
            embedding::device::scatter_add_(e, dtype, &scatter)
        }),
        case("elementwise", |e, dtype| {
            elementwise::device::add_(e, dtype, NOWHERE, NOWHERE, 0)?;
            elementwise::device::scale_(e, dtype, NOWHERE, 0, 2.0)?;
            elementwise::device::scale_columns(e, dtype, [NOWHERE; 3], 0, COLUMNS)
        }),
        case("adamw", |e, _| adamw::device::chunk_square_sums(e, NOWHERE, 0, NOWHERE)),
        Case::new("non_finite", "without values".to_owned(), |check| {
            let fault = check.fault()?;
            non_finite::device::first(check.executor, NOWHERE, 0, fault)?;
            check.expect_bits("fault", fault, &[NO_FAULT])
        }),
        Case::new("column_sums", "without rows".to_owned(), |check| KernelDtype::ALL.iter().try_for_each(|dtype| sums_stay(check, *dtype))),
    ]
}

/// Sums over no rows add nothing to what was there.
fn sums_stay(check: &mut Check, dtype: KernelDtype) -> Result<(), CheckError> {
    let before = vec![1.5f32; COLUMNS];
    let sums = Sums { sums: check.input("sums", KernelDtype::F32, &before)?, partials: NOWHERE, rows: 0, columns: COLUMNS };
    column_sums::add_row_sum_(check.executor, dtype, &sums, NOWHERE)?;
    column_sums::add_column_dots_(check.executor, dtype, &sums, NOWHERE, NOWHERE)?;
    check.expect_bits("sums", sums.sums, &before)
}
