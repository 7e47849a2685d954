//! Sums over rows on a device, column by column: [`elementwise::add_row_sum_`](super::elementwise::add_row_sum_) and
//! [`elementwise::column_dots`](super::elementwise::column_dots), and the last step of RMSNorm's weight gradient. The kernels of
//! `column_sums.cu` and `columns.cuh`.
//!
//! The order is another than the CPU's, which adds row by row: 8 sums of every 8th row, for each 128 rows, then those. It depends on the number
//! of rows alone.

use bytemuck::NoUninit;

use super::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, WARP, launch, require_aligned, tiles};

const THREADS: u32 = 256;
const TOTAL_THREADS: usize = 64;
const ROWS_OF_BLOCK: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Args {
    a: u64,
    b: u64,
    partials: u64,
    rows: i64,
    columns: i32,
    tiles: i32,
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct PartialsArgs {
    partials: u64,
    sums: u64,
    parts: i64,
    columns: i64,
}

/// f32 values that `partials` must have room for.
pub fn num_partials(rows: usize, columns: usize) -> usize {
    rows.div_ceil(ROWS_OF_BLOCK) * columns
}

/// Where a sum over rows goes, and what it needs on the way: sums `[n]` f32, to which is added; partials `[num_partials]` f32.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    pub sums: u64,
    pub partials: u64,
    pub rows: usize,
    pub columns: usize,
}

/// sums += the rows of x `[rows, columns]`.
///
/// # Errors
/// When the width or an address is no multiple of 16 bytes, or a launch fails.
pub fn add_row_sum_(executor: &dyn Executor, dtype: KernelDtype, sums: &Sums, x: u64) -> Result<(), LaunchError> {
    start(executor, "row_sum", dtype, sums, x, 0)
}

/// sums += for each column of a and b `[rows, columns]` the sum over rows of their products.
///
/// # Errors
/// As [`add_row_sum_`].
pub fn add_column_dots_(executor: &dyn Executor, dtype: KernelDtype, sums: &Sums, a: u64, b: u64) -> Result<(), LaunchError> {
    start(executor, "column_dots", dtype, sums, a, b)
}

/// Of [`add_row_sum_`], or with two operands of [`add_column_dots_`].
pub fn bytes(dtype: KernelDtype, rows: usize, columns: usize, operands: usize) -> Bytes {
    let (values, partials) = (operands * rows * columns * dtype.num_bytes(), 4 * num_partials(rows, columns));
    Bytes { read: (values + partials + 4 * columns) as u64, written: (partials + 4 * columns) as u64 }
}

fn start(executor: &dyn Executor, op: &str, dtype: KernelDtype, sums: &Sums, a: u64, b: u64) -> Result<(), LaunchError> {
    let name = format!("{op}_{}", dtype.suffix());
    require_aligned(&name, &[a, b])?;
    let (launch_of, tiles) = partials_launch(&name, dtype, sums)?;
    let args = Args { a, b, partials: sums.partials, rows: sums.rows as i64, columns: sums.columns as i32, tiles: tiles as i32 };
    launch(executor, &name, launch_of, &args)?;
    add_partials_(executor, sums)
}

/// How a kernel that calls `column_partials` is started, and its tiles of columns.
///
/// # Errors
/// When the width or an address is no multiple of 16 bytes.
pub(super) fn partials_launch(name: &str, dtype: KernelDtype, sums: &Sums) -> Result<(Launch, usize), LaunchError> {
    let tiles = tiles(name, dtype, sums.columns, WARP)?;
    require_aligned(name, &[sums.sums, sums.partials])?;
    let shared_bytes = THREADS * dtype.wide() as u32 * 4;
    Ok((Launch::row(sums.rows.div_ceil(ROWS_OF_BLOCK) * tiles, THREADS, shared_bytes), tiles))
}

/// sums += the partial sums, in their order.
///
/// # Errors
/// When the launch fails.
pub(super) fn add_partials_(executor: &dyn Executor, sums: &Sums) -> Result<(), LaunchError> {
    let &Sums { sums, partials, rows, columns } = sums;
    let args = PartialsArgs { partials, sums, parts: rows.div_ceil(ROWS_OF_BLOCK) as i64, columns: columns as i64 };
    launch(executor, "column_sums_add", Launch::row((columns / 4).div_ceil(TOTAL_THREADS), TOTAL_THREADS as u32, 0), &args)
}
