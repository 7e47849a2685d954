//! The kernels of `attention.cu` (bf16, f16) and `attention_f32.cu`.

use bytemuck::NoUninit;

use super::{HEAD_DIMS, Heads, Wanted};
use crate::kernels::launch::{Executor, KernelDtype, Launch, LaunchError, launch, require_aligned};

const THREADS: u32 = 128;
/// Queries of a block (forward, dq) or keys of a block (dk, dv).
const TILE: usize = 64;

/// The rows of a packed batch as blocks take them: made and sent once, for all layers.
#[derive(Clone, Debug)]
pub struct Tiles {
    /// Tiles of queries, tiles of keys (row and first each), bounds of rows.
    words: Vec<i32>,
    num_query_tiles: usize,
    num_key_tiles: usize,
    num_tokens: usize,
    prefix_len: usize,
    wanted: Wanted,
}

impl Tiles {
    /// Of rows as in [`super::Rows::bounds`], each behind `prefix_len` keys, for a backward pass that gives what is `wanted`. Tiles with
    /// much to do come first.
    pub fn new(bounds: &[usize], prefix_len: usize, wanted: Wanted) -> Self {
        let (mut queries, mut keys) = (Vec::new(), Vec::new());
        for (row, bounds) in bounds.windows(2).enumerate() {
            let len = bounds[1] - bounds[0];
            let num_keys = prefix_len + if wanted == Wanted::All { len } else { 0 };
            queries.extend((0..len).step_by(TILE).map(|first| (prefix_len + len.min(first + TILE), row, first)));
            keys.extend((0..num_keys).step_by(TILE).map(|first| (len - first.saturating_sub(prefix_len), row, first)));
        }
        let mut words = Vec::new();
        for tiles in [&mut queries, &mut keys] {
            tiles.sort_by_key(|(work, ..)| std::cmp::Reverse(*work));
            words.extend(tiles.iter().flat_map(|(_, row, first)| [*row as i32, *first as i32]));
        }
        words.extend(bounds.iter().map(|bound| *bound as i32));
        let num_tokens = bounds.last().copied().unwrap_or(0);
        Self { words, num_query_tiles: queries.len(), num_key_tiles: keys.len(), num_tokens, prefix_len, wanted }
    }

    /// What is to be sent to the device.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// As [`Self::bytes`].
    pub(super) fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.words)
    }

    fn bytes_of(num_tiles: usize) -> u64 {
        num_tiles as u64 * 8
    }
}

/// A prefix on the device.
#[derive(Clone, Copy, Debug)]
pub enum PrefixAt {
    None,
    /// k and v `[G, P, D]`, for all rows.
    Shared {
        k: u64,
        v: u64,
    },
    /// k and v `[R, G, P, D]`.
    PerRow {
        k: u64,
        v: u64,
    },
}

/// Addresses, and what is there.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'t> {
    pub heads: Heads,
    pub tiles: &'t Tiles,
    /// [`Tiles::bytes`].
    pub tiles_at: u64,
    /// `[T, (N + 2G) D]`, tokens `qkv_stride` elements apart.
    pub qkv: u64,
    pub qkv_stride: usize,
    pub prefix: PrefixAt,
    /// `[T, N D]`
    pub out: u64,
    /// `[T, N]` f32
    pub lse: u64,
}

/// Addresses of the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct GradsAt {
    /// `[T, N D]`
    pub dout: u64,
    /// `[T, N]` f32, room for intermediate values.
    pub delta: u64,
    pub dqkv: DqkvAt,
    /// `[R, G, P, D]` f32 each; not used without a prefix.
    pub dprefix_k: u64,
    pub dprefix_v: u64,
}

/// Where the gradient towards q, k, v goes.
#[derive(Clone, Copy, Debug)]
pub enum DqkvAt {
    /// For [`Wanted::PrefixOnly`].
    NotWanted,
    /// `[T, (N + 2G) D]`, tokens `stride` elements apart.
    Here { address: u64, stride: usize },
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Args {
    qkv: u64,
    prefix_k: u64,
    prefix_v: u64,
    out: u64,
    lse: u64,
    dout: u64,
    delta: u64,
    dqkv: u64,
    dprefix_k: u64,
    dprefix_v: u64,
    tiles: u64,
    bounds: u64,
    qkv_stride: i64,
    dqkv_stride: i64,
    prefix_stride: i64,
    num_heads: i32,
    num_groups: i32,
    prefix_len: i32,
    num_tokens: i32,
    scale: f32,
    padding: i32,
}

/// As [`super::fwd`], without padding.
///
/// # Errors
/// When the sizes are none that the kernels are made for, an address is no multiple of 16 bytes, or the launch fails.
pub fn fwd(executor: &dyn Executor, dtype: KernelDtype, batch: &Batch) -> Result<(), LaunchError> {
    let op = Op::new(executor, dtype, batch, None)?;
    op.start("fwd", [batch.heads.num_heads, batch.tiles.num_query_tiles], op.shared_bytes(0), &op.args)
}

/// As [`super::bwd`], without padding. Each row's gradient of the prefix is left apart; [`sum_rows`] adds them for a shared one.
///
/// # Errors
/// As [`fwd`].
pub fn bwd(executor: &dyn Executor, dtype: KernelDtype, batch: &Batch, grads: &GradsAt) -> Result<(), LaunchError> {
    let op = Op::new(executor, dtype, batch, Some(grads))?;
    let (heads, tiles) = (batch.heads, batch.tiles);
    let sums_a_block = THREADS as usize * 16 / (heads.head_dim * dtype.num_bytes());
    op.start("bwd_delta", [(tiles.num_tokens * heads.num_heads).div_ceil(sums_a_block), 1], 0, &op.args)?;
    if let DqkvAt::Here { .. } = grads.dqkv {
        op.start("bwd_query", [heads.num_heads, tiles.num_query_tiles], op.shared_bytes(0), &op.args)?;
    }
    let args = Args { tiles: op.args.tiles + Tiles::bytes_of(tiles.num_query_tiles), ..op.args };
    let numbers = 4 * 4 * op.stage_rows();
    op.start("bwd_key", [heads.num_groups, tiles.num_key_tiles], op.shared_bytes(numbers), &args)
}

/// Gradients of a prefix's k and v by row, `[R, size]` f32, to their sums over rows, `[size]` f32.
#[derive(Clone, Copy, Debug)]
pub struct RowSums {
    pub dprefix_k: u64,
    pub dprefix_v: u64,
    pub dk: u64,
    pub dv: u64,
    /// G P D
    pub size: usize,
    pub num_rows: usize,
}

#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct RowSumsArgs {
    dprefix_k: u64,
    dprefix_v: u64,
    dk: u64,
    dv: u64,
    size: i64,
    num_rows: i64,
}

/// Adds the rows' gradients of a shared prefix in the order of rows.
///
/// # Errors
/// When there are no rows, the size is no multiple of 4, an address is no multiple of 16 bytes, or the launch fails.
pub fn sum_rows(executor: &dyn Executor, sums: &RowSums) -> Result<(), LaunchError> {
    let &RowSums { dprefix_k, dprefix_v, dk, dv, size, num_rows } = sums;
    let name = "attention_bwd_rows_f32";
    if size == 0 || !size.is_multiple_of(4) || num_rows == 0 {
        let reason = format!("{num_rows} rows of {size} values, expected one or more, of a multiple of 4");
        return Err(LaunchError::Kernel { kernel: name.to_owned(), reason });
    }
    let args = RowSumsArgs { dprefix_k, dprefix_v, dk, dv, size: size as i64, num_rows: num_rows as i64 };
    require_aligned(name, &[dprefix_k, dprefix_v, dk, dv])?;
    launch(executor, name, Launch::grid([size.div_ceil(4 * THREADS as usize), 2], THREADS, 0), &args)
}

/// Launches that share arguments.
struct Op<'e> {
    executor: &'e dyn Executor,
    dtype: KernelDtype,
    head_dim: usize,
    args: Args,
}

impl<'e> Op<'e> {
    fn new(executor: &'e dyn Executor, dtype: KernelDtype, batch: &Batch, grads: Option<&GradsAt>) -> Result<Self, LaunchError> {
        let &Batch { heads, tiles, tiles_at, qkv, qkv_stride, prefix, out, lse } = batch;
        let Heads { num_heads, num_groups, head_dim } = heads;
        let fail = |reason: String| Err(LaunchError::Kernel { kernel: format!("attention, {}", dtype.suffix()), reason });
        if !HEAD_DIMS.contains(&head_dim) {
            return fail(format!("a head dim of {head_dim}, expected {} or {}", HEAD_DIMS[0], HEAD_DIMS[1]));
        }
        if num_groups == 0 || !num_heads.is_multiple_of(num_groups) {
            return fail(format!("{num_heads} heads in {num_groups} groups, expected a multiple"));
        }
        let (dqkv, dqkv_stride) = match grads.map(|grads| grads.dqkv) {
            Some(DqkvAt::Here { address, stride }) => (address, stride),
            Some(DqkvAt::NotWanted) | None => (0, qkv_stride),
        };
        if let Some(grads) = grads
            && matches!(grads.dqkv, DqkvAt::NotWanted) != (tiles.wanted == Wanted::PrefixOnly)
        {
            return fail(format!("the batch's tiles are made for {:?}, found {:?}", tiles.wanted, grads.dqkv));
        }
        for stride in [qkv_stride, dqkv_stride] {
            if stride < heads.qkv_width() || !(stride * dtype.num_bytes()).is_multiple_of(16) {
                return fail(format!("tokens {stride} values apart, expected {} or more, and a multiple of 16 bytes", heads.qkv_width()));
            }
        }
        let size = num_groups * tiles.prefix_len * head_dim;
        let (prefix_k, prefix_v, prefix_stride) = match prefix {
            PrefixAt::None => (0, 0, 0),
            PrefixAt::Shared { k, v } => (k, v, 0),
            PrefixAt::PerRow { k, v } => (k, v, size),
        };
        if matches!(prefix, PrefixAt::None) != (size == 0) {
            return fail(format!("the batch's tiles are made for a prefix of {}, found {prefix:?}", tiles.prefix_len));
        }
        let (dout, delta, dprefix_k, dprefix_v) = grads.map_or((0, 0, 0, 0), |g| (g.dout, g.delta, g.dprefix_k, g.dprefix_v));
        let addresses = [qkv, prefix_k, prefix_v, out, dout, dqkv, dprefix_k, dprefix_v];
        require_aligned(&format!("attention, {}", dtype.suffix()), &addresses)?;
        let args = Args {
            qkv,
            prefix_k,
            prefix_v,
            out,
            lse,
            dout,
            delta,
            dqkv,
            dprefix_k,
            dprefix_v,
            tiles: tiles_at,
            bounds: tiles_at + Tiles::bytes_of(tiles.num_query_tiles + tiles.num_key_tiles),
            qkv_stride: qkv_stride as i64,
            dqkv_stride: dqkv_stride as i64,
            prefix_stride: prefix_stride as i64,
            num_heads: num_heads as i32,
            num_groups: num_groups as i32,
            prefix_len: tiles.prefix_len as i32,
            num_tokens: tiles.num_tokens as i32,
            scale: 1.0 / (head_dim as f32).sqrt(),
            padding: 0,
        };
        Ok(Self { executor, dtype, head_dim, args })
    }

    /// Rows of a stage, of which a block has two for each of two tensors.
    fn stage_rows(&self) -> usize {
        4096 / self.head_dim
    }

    /// A tile, the stages and `more` bytes; the kernels of f32 use none.
    fn shared_bytes(&self, more: usize) -> u32 {
        if self.dtype == KernelDtype::F32 { 0 } else { ((TILE + 4 * self.stage_rows()) * self.head_dim * 2 + more) as u32 }
    }

    fn start(&self, pass: &str, blocks: [usize; 2], shared_bytes: u32, args: &Args) -> Result<(), LaunchError> {
        let name = format!("attention_{pass}_d{}_{}", self.head_dim, self.dtype.suffix());
        launch(self.executor, &name, Launch::grid(blocks, THREADS, shared_bytes), args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::launch::Nowhere;

    /// What is said of a backward pass that `change` was done to.
    fn refusal(change: impl FnOnce(&mut Batch, &mut GradsAt)) -> String {
        let tiles = Tiles::new(&[0, 3, 70], 16, Wanted::All);
        let heads = Heads { num_heads: 4, num_groups: 2, head_dim: 64 };
        let prefix = PrefixAt::Shared { k: 256, v: 512 };
        let mut batch = Batch { heads, tiles: &tiles, tiles_at: 0, qkv: 0, qkv_stride: 512, prefix, out: 0, lse: 0 };
        let dqkv = DqkvAt::Here { address: 0, stride: 512 };
        let mut grads = GradsAt { dout: 0, delta: 0, dqkv, dprefix_k: 0, dprefix_v: 0 };
        change(&mut batch, &mut grads);
        bwd(&Nowhere, KernelDtype::Bf16, &batch, &grads).expect_err("nothing is started nowhere").to_string()
    }

    #[test]
    fn bwd_of_what_the_kernels_are_made_for_is_started() {
        insta::assert_snapshot!(refusal(|_, _| {}), @"kernel `attention_bwd_delta_d64_bf16`: started");
    }

    /// Blocks would read and write 16 bytes at a time.
    #[test]
    fn bwd_at_an_address_between_bounds_is_refused() {
        insta::assert_snapshot!(
            refusal(|batch, _| batch.qkv = 8),
            @"kernel `attention, bf16`: a buffer at 0x8, expected a multiple of 16 bytes"
        );
        insta::assert_snapshot!(
            refusal(|_, grads| grads.dprefix_v = 1026),
            @"kernel `attention, bf16`: a buffer at 0x402, expected a multiple of 16 bytes"
        );
    }

    #[test]
    fn bwd_of_what_no_kernel_is_made_for_is_refused() {
        insta::assert_snapshot!(
            refusal(|batch, _| batch.heads.head_dim = 80),
            @"kernel `attention, bf16`: a head dim of 80, expected 64 or 128"
        );
        insta::assert_snapshot!(
            refusal(|batch, _| batch.heads.num_groups = 3),
            @"kernel `attention, bf16`: 4 heads in 3 groups, expected a multiple"
        );
        insta::assert_snapshot!(
            refusal(|batch, _| batch.qkv_stride = 516),
            @"kernel `attention, bf16`: tokens 516 values apart, expected 512 or more, and a multiple of 16 bytes"
        );
        insta::assert_snapshot!(
            refusal(|batch, _| batch.prefix = PrefixAt::None),
            @"kernel `attention, bf16`: the batch's tiles are made for a prefix of 16, found None"
        );
        insta::assert_snapshot!(
            refusal(|_, grads| grads.dqkv = DqkvAt::NotWanted),
            @"kernel `attention, bf16`: the batch's tiles are made for All, found NotWanted"
        );
    }
}
