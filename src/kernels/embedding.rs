//! The embedding: rows of a table by id, and the sum of their gradients.

use candle_core::{DType, Result, Tensor, bail};

use super::host::{F32View, with_f32_mut};
use super::ids::Ids;
use super::launch::NO_REPORT;
use super::on_gpu::on_gpu;

/// table `[V, H]` -> its rows at `ids`, `[T, H]`.
///
/// # Errors
/// When an id is not below V.
pub fn gather(table_VH: &Tensor, ids: &Ids) -> Result<Tensor> {
    let (v, h) = table_VH.dims2()?;
    if let Some(&bad) = ids.as_slice().iter().find(|&&id| id as usize >= v) {
        bail!("embedding: id {bad} is not below {v}");
    }
    let Some(gpu) = on_gpu(table_VH)? else {
        return table_VH.index_select(&Tensor::new(ids.as_slice(), table_VH.device())?, 0);
    };
    let (rows_TH, ids_T) = (gpu.result((ids.len(), h))?, ids.on(&gpu)?);
    let gather = device::Gather {
        table: gpu.at(table_VH)?,
        ids: gpu.at_of(ids_T, DType::U32)?,
        rows: gpu.at(&rows_TH)?,
        fault: NO_REPORT,
        vocabulary: v,
        tokens: ids.len(),
        columns: h,
    };
    gpu.run(|e, dtype| device::gather(e, dtype, &gather))?;
    Ok(rows_TH)
}

/// Puts row t of x `[N, H]` into row `ids[t]` of sum `[T, H]`, which must be 0; ids ascend.
///
/// # Errors
/// When the sizes differ, an id is not below T, or ids do not ascend.
pub fn put_rows_(sum_TH: &Tensor, ids: &Ids, x_NH: &Tensor) -> Result<()> {
    if ids.as_slice().windows(2).any(|pair| pair[0] >= pair[1]) {
        bail!("put_rows: the rows do not ascend");
    }
    let Some(gpu) = on_gpu(sum_TH)? else { return scatter_add_rows_(sum_TH, ids.as_slice(), x_NH) };
    let ((t, h), (n, width)) = (sum_TH.dims2()?, x_NH.dims2()?);
    if h != width || ids.len() != n || ids.as_slice().iter().any(|&id| id as usize >= t) {
        bail!("put_rows: rows [{n}, {width}] at {} places of [{t}, {h}]", ids.len());
    }
    let ids_N = ids.on(&gpu)?;
    let put = device::Put { table: gpu.at(sum_TH)?, ids: gpu.at_of(ids_N, DType::U32)?, rows: gpu.at(x_NH)?, tokens: n, columns: h };
    gpu.run(|e, dtype| device::put(e, dtype, &put))
}

/// table `[V, H]`: row `ids[t]` += row t of x `[T, H]`, in the order of t.
///
/// # Errors
/// When the sizes differ or an id is not below V.
pub fn scatter_add_rows_(table_VH: &Tensor, ids: &[u32], x_TH: &Tensor) -> Result<()> {
    let ((v, h), (t, width)) = (table_VH.dims2()?, x_TH.dims2()?);
    if h != width || ids.len() != t {
        bail!("scatter_add_rows: table [{v}, {h}], {} ids, rows [{t}, {width}]", ids.len());
    }
    if let Some(&bad) = ids.iter().find(|&&id| id as usize >= v) {
        bail!("scatter_add_rows: id {bad} is not below {v}");
    }
    let x = F32View::new(x_TH)?;
    with_f32_mut(table_VH, "scatter_add_rows", |table| {
        for (&id, row) in ids.iter().zip(x.chunks_exact(h)) {
            table[id as usize * h..][..h].iter_mut().zip(row).for_each(|(a, b)| *a += b);
        }
    })
}

/// The kernels of `embedding.cu`.
pub mod device {
    use bytemuck::NoUninit;

    use crate::kernels::launch::{Bytes, Executor, KernelDtype, Launch, LaunchError, launch, require, require_aligned, tiles};

    const THREADS: u32 = 256;

    /// Addresses, contiguous: table `[V, H]`, ids `[T]` u32, rows `[T, H]`; the fault's 8 bytes, which get the lowest token whose id is not
    /// below V, or [`NO_REPORT`](super::NO_REPORT).
    #[derive(Clone, Copy, Debug)]
    pub struct Gather {
        pub table: u64,
        pub ids: u64,
        pub rows: u64,
        pub fault: u64,
        /// V.
        pub vocabulary: usize,
        /// T.
        pub tokens: usize,
        /// H.
        pub columns: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct GatherArgs {
        table: u64,
        ids: u64,
        rows: u64,
        fault: u64,
        words: i64,
        vocabulary: u32,
        tiles: i32,
    }

    /// The table's rows at `ids`; 0 for an id that is not below V.
    ///
    /// # Errors
    /// When the width or an address is no multiple of 16 bytes, or the launch fails.
    pub fn gather(executor: &dyn Executor, dtype: KernelDtype, gather: &Gather) -> Result<(), LaunchError> {
        let &Gather { table, ids, rows, fault, vocabulary, tokens, columns } = gather;
        let name = "embedding_gather";
        let tiles = tiles(name, dtype, columns, THREADS)?;
        require_aligned(name, &[table, rows])?;
        let words = (columns / dtype.wide()) as i64;
        let args = GatherArgs { table, ids, rows, fault, words, vocabulary: vocabulary as u32, tiles: tiles as i32 };
        launch(executor, name, Launch::row(tokens * tiles, THREADS, 0), &args)
    }

    /// Of [`gather`] where all ids are below V.
    pub fn gather_bytes(dtype: KernelDtype, tokens: usize, columns: usize) -> Bytes {
        let row = columns * dtype.num_bytes();
        let asked = (columns / dtype.wide()).next_multiple_of(THREADS as usize) * 4;
        Bytes { read: (tokens * (row + asked)) as u64, written: (tokens * row) as u64 }
    }

    /// Addresses, contiguous: table `[V, H]`, ids `[T]` u32, each below V and once, rows `[T, H]`.
    #[derive(Clone, Copy, Debug)]
    pub struct Put {
        pub table: u64,
        pub ids: u64,
        pub rows: u64,
        /// T.
        pub tokens: usize,
        /// H.
        pub columns: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct PutArgs {
        table: u64,
        ids: u64,
        rows: u64,
        words: i64,
        tiles: i32,
        padding: i32,
    }

    /// The table's rows at `ids` become `rows`.
    ///
    /// # Errors
    /// As [`gather`].
    pub fn put(executor: &dyn Executor, dtype: KernelDtype, put: &Put) -> Result<(), LaunchError> {
        let &Put { table, ids, rows, tokens, columns } = put;
        let name = "embedding_put";
        let tiles = tiles(name, dtype, columns, THREADS)?;
        require_aligned(name, &[table, rows])?;
        let args = PutArgs { table, ids, rows, words: (columns / dtype.wide()) as i64, tiles: tiles as i32, padding: 0 };
        launch(executor, name, Launch::row(tokens * tiles, THREADS, 0), &args)
    }

    /// Bytes moved by [`put`].
    pub fn put_bytes(dtype: KernelDtype, tokens: usize, columns: usize) -> Bytes {
        let row = columns * dtype.num_bytes();
        Bytes { read: (tokens * (row + columns / dtype.wide() * 4)) as u64, written: (tokens * row) as u64 }
    }

    /// Tokens sorted by their ids, those of one id in their own order.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Segments {
        /// The ids that occur, ascending.
        pub ids: Vec<u32>,
        /// Where in `order` each id's tokens end.
        pub ends: Vec<u32>,
        pub order: Vec<u32>,
    }

    impl Segments {
        /// # Errors
        /// When an id is not below `vocabulary`.
        pub fn new(ids: &[u32], vocabulary: usize) -> Result<Self, LaunchError> {
            let bad = ids.iter().position(|&id| id as usize >= vocabulary);
            require(bad.is_none(), "embedding_scatter_add", || {
                let at = bad.unwrap_or_default();
                format!("token {at} has the id {}, expected one below {vocabulary}", ids[at])
            })?;
            let mut order: Vec<u32> = (0..ids.len() as u32).collect();
            order.sort_by_key(|&token| ids[token as usize]);
            let mut segments = Self { ids: Vec::new(), ends: Vec::new(), order };
            for (i, &token) in segments.order.iter().enumerate() {
                let id = ids[token as usize];
                if segments.ids.last() == Some(&id) {
                    segments.ends.pop();
                } else {
                    segments.ids.push(id);
                }
                segments.ends.push(i as u32 + 1);
            }
            Ok(segments)
        }
    }

    /// Addresses, contiguous: table `[V, H]` f32, x `[T, H]`; the three lists of [`Segments`].
    #[derive(Clone, Copy, Debug)]
    pub struct Scatter {
        pub table: u64,
        pub x: u64,
        pub ids: u64,
        pub ends: u64,
        pub order: u64,
        pub num_segments: usize,
        /// H.
        pub columns: usize,
    }

    #[repr(C)]
    #[derive(Clone, Copy, NoUninit)]
    struct ScatterArgs {
        table: u64,
        x: u64,
        ids: u64,
        ends: u64,
        order: u64,
        columns: i64,
        tiles: i32,
        padding: i32,
    }

    /// As [`super::scatter_add_rows_`], to the bit.
    ///
    /// # Errors
    /// As [`gather`].
    pub fn scatter_add_(executor: &dyn Executor, dtype: KernelDtype, scatter: &Scatter) -> Result<(), LaunchError> {
        let &Scatter { table, x, ids, ends, order, num_segments, columns } = scatter;
        let name = format!("embedding_scatter_add_{}", dtype.suffix());
        let tiles = tiles(&name, dtype, columns, THREADS)?;
        require_aligned(&name, &[table, x])?;
        let args = ScatterArgs { table, x, ids, ends, order, columns: columns as i64, tiles: tiles as i32, padding: 0 };
        launch(executor, &name, Launch::row(num_segments * tiles, THREADS, 0), &args)
    }

    /// Of [`scatter_add_`].
    pub fn scatter_add_bytes(dtype: KernelDtype, tokens: usize, num_segments: usize, columns: usize) -> Bytes {
        let threads = columns / dtype.wide();
        let of_tokens = tokens * (columns * dtype.num_bytes() + 4 * threads);
        // An id and two ends a thread, but for the first segment, which begins at 0.
        let of_segments = num_segments * (4 * columns + 12 * threads) - 4 * threads;
        Bytes { read: (of_tokens + of_segments) as u64, written: (num_segments * 4 * columns) as u64 }
    }
}
