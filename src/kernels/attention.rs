//! Causal grouped-query attention over packed rows, each behind its own prefix. Only the log-sum-exp is kept for the backward pass
//! (Dao et al. 2022, arXiv:2205.14135).
//!
//! Row r's queries see the whole prefix (or cache) of row r, then the row's own keys up to themselves; rows do not see each other.
//! Shapes: T packed tokens, R rows, N query heads, G groups, D head dim, P prefix length. Query head h reads group h / (N / G).

pub mod device;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::host::{self, F32View};
use super::matmul::{Mat, MatMut, Write, product};
use super::on_gpu::{OnGpu, on_gpu};
use super::simd::{dot, exp, exp_sum, max, vectorize};

/// Queries scored at once: small enough that what the causal mask throws away stays below 16 keys a query.
const BLOCK: usize = 32;

/// Sizes of heads that the kernels of a GPU take.
pub const HEAD_DIMS: [usize; 2] = [64, 128];

/// Head counts and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub num_heads: usize,
    pub num_groups: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Values of a token's q, k and v together.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_groups) * self.head_dim
    }

    /// Query heads that share one group's keys.
    fn sharing(&self) -> usize {
        self.num_heads / self.num_groups
    }
}

/// Which tokens form a row and which of them are padding.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// `[R + 1]` row r is tokens `bounds[r]..bounds[r + 1]`.
    pub bounds: &'a [usize],
    /// `[T]` false on padding; `None`: no padding. A padded key is seen by nobody; a padded query sees the row's whole length where there is no
    /// prefix, and the prefix and the earlier unpadded keys where there is one.
    pub keep: Option<&'a [bool]>,
    /// What a GPU needs to know of the rows, kept from layer to layer; `None`: it is sent each time.
    pub tables: Option<&'a Tables>,
}

/// Tiles of rows on a GPU, by the prefix's length and what the backward pass gives: sent once, for all layers.
#[derive(Debug, Default)]
pub struct Tables(Mutex<BTreeMap<(usize, bool), SentTiles>>);

/// Tiles, and their words on a GPU.
type SentTiles = (Arc<device::Tiles>, Tensor);

impl Tables {
    fn of(&self, gpu: &OnGpu, bounds: &[usize], prefix_len: usize, wanted: Wanted) -> Result<SentTiles> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (prefix_len, wanted == Wanted::All);
        if let Some(found) = tables.get(&key) {
            return Ok(found.clone());
        }
        let tiles = device::Tiles::new(bounds, prefix_len, wanted);
        let sent = gpu.upload(tiles.words())?;
        Ok(tables.entry(key).or_insert((Arc::new(tiles), sent)).clone())
    }
}

/// Keys and values in front of each row: `[R, G, P, D]`, or `[1, G, P, D]` for all rows.
#[derive(Clone, Copy)]
pub struct Prefix<'a> {
    pub k_RGPD: &'a Tensor,
    pub v_RGPD: &'a Tensor,
}

/// Gradients of [`bwd`].
pub struct Grads {
    /// `[T, (N + 2G) D]` towards the rotated q, k and the v; none unless asked for.
    pub dqkv: Option<Tensor>,
    /// `[R, G, P, D]` each, towards the prefix; none without a prefix.
    pub dprefix: Option<(Tensor, Tensor)>,
}

/// Which gradients [`bwd`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    All,
    /// The prefix's alone: nothing below this layer is trained.
    PrefixOnly,
}

/// qkv `[T, (N + 2G) D]` (rotated; all q, all k, all v) -> (output `[T, N D]`, log-sum-exp of the scaled scores `[T, N]`).
///
/// # Errors
/// When the sizes do not fit each other.
///
/// # Source
/// THUDM modeling_chatglm.py, CoreAttention and ChatGLMModel.get_masks; scale 1/sqrt(D).
pub fn fwd(qkv: &Tensor, prefix: Option<Prefix>, rows: Rows, heads: Heads) -> Result<(Tensor, Tensor)> {
    let t = check(qkv, prefix, rows, heads)?;
    let (n, d, sharing) = (heads.num_heads, heads.head_dim, heads.sharing());
    if let Some(gpu) = on_gpu(qkv)? {
        let (out, lse) = (gpu.result((t, n * d))?, gpu.result_of((t, n), DType::F32)?);
        let launch = Launched::new(&gpu, qkv, prefix, [&out, &lse], rows, heads, Wanted::All)?;
        gpu.run(|e, dtype| device::fwd(e, dtype, &launch.batch()))?;
        return Ok((out, lse));
    }
    let (mut out, mut lse) = (vec![0f32; t * n * d], vec![0f32; t * n]);
    with_tasks(qkv, prefix, rows, heads, |tasks| {
        let parts: Vec<_> = tasks.par_iter().map(Task::forward).collect();
        for (task, (o, l)) in tasks.iter().zip(parts) {
            for i in 0..task.len {
                let token = task.start + i;
                let at = (token * n + task.group * sharing) * d;
                out[at..at + sharing * d].copy_from_slice(&o[i * sharing * d..(i + 1) * sharing * d]);
                let at = token * n + task.group * sharing;
                lse[at..at + sharing].copy_from_slice(&l[i * sharing..(i + 1) * sharing]);
            }
        }
    })?;
    Ok((host::tensor(out, &[t, n * d])?, host::tensor(lse, &[t, n])?))
}

/// The backward of [`fwd`]: `dout` and `out` `[T, N D]`, `lse` `[T, N]`. Scores are computed again from q and k.
///
/// # Errors
/// When the sizes do not fit each other.
pub fn bwd(
    dout: &Tensor,
    qkv: &Tensor,
    prefix: Option<Prefix>,
    out: &Tensor,
    lse: &Tensor,
    rows: Rows,
    heads: Heads,
    wanted: Wanted,
) -> Result<Grads> {
    let t = check(qkv, prefix, rows, heads)?;
    let (n, g, d, sharing) = (heads.num_heads, heads.num_groups, heads.head_dim, heads.sharing());
    if dout.dims() != [t, n * d] || out.dims() != [t, n * d] || lse.dims() != [t, n] {
        bail!("attention: dout {:?}, out {:?}, lse {:?} do not fit {t} tokens, {n} heads of {d}", dout.dims(), out.dims(), lse.dims());
    }
    let num_rows = rows.bounds.len() - 1;
    let p = prefix.map_or(Ok(0), |prefix| prefix.k_RGPD.dim(2))?;
    let width = heads.qkv_width();
    if let Some(gpu) = on_gpu(qkv)? {
        let launch = Launched::new(&gpu, qkv, prefix, [out, lse], rows, heads, wanted)?;
        let delta = gpu.result_of((t, n), DType::F32)?;
        let dqkv = if wanted == Wanted::All { Some(gpu.result((t, width))?) } else { None };
        let shape = (num_rows, g, p, d);
        let dprefix = if p == 0 { None } else { Some((gpu.result_of(shape, DType::F32)?, gpu.result_of(shape, DType::F32)?)) };
        let of_prefix = |x: Option<&Tensor>| x.map_or(Ok(0), |x| gpu.at_of(x, DType::F32));
        let grads = device::GradsAt {
            dout: gpu.at(dout)?,
            delta: gpu.at_of(&delta, DType::F32)?,
            dqkv: match &dqkv {
                Some(dqkv) => device::DqkvAt::Here { address: gpu.at(dqkv)?, stride: width },
                None => device::DqkvAt::NotWanted,
            },
            dprefix_k: of_prefix(dprefix.as_ref().map(|(k, _)| k))?,
            dprefix_v: of_prefix(dprefix.as_ref().map(|(_, v)| v))?,
        };
        gpu.run(|e, dtype| device::bwd(e, dtype, &launch.batch(), &grads))?;
        return Ok(Grads { dqkv, dprefix });
    }
    let (dout, out, lse) = (F32View::new(dout)?, F32View::new(out)?, F32View::new(lse)?);
    let mut dqkv = (wanted == Wanted::All).then(|| vec![0f32; t * width]);
    let (mut dpk, mut dpv) = (vec![0f32; num_rows * g * p * d], vec![0f32; num_rows * g * p * d]);
    with_tasks(qkv, prefix, rows, heads, |tasks| {
        let parts: Vec<_> = tasks.par_iter().map(|task| task.backward(&dout, &out, &lse, wanted)).collect();
        for (task, part) in tasks.iter().zip(parts) {
            let at = (task.row * g + task.group) * p * d;
            dpk[at..at + p * d].copy_from_slice(&part.dpk);
            dpv[at..at + p * d].copy_from_slice(&part.dpv);
            let Some(dqkv) = &mut dqkv else { continue };
            for i in 0..task.len {
                let token = &mut dqkv[(task.start + i) * width..(task.start + i + 1) * width];
                let (q, k, v) = (task.group * sharing * d, (n + task.group) * d, (n + g + task.group) * d);
                token[q..q + sharing * d].copy_from_slice(&part.dq[i * sharing * d..(i + 1) * sharing * d]);
                token[k..k + d].copy_from_slice(&part.dk[i * d..(i + 1) * d]);
                token[v..v + d].copy_from_slice(&part.dv[i * d..(i + 1) * d]);
            }
        }
    })?;
    let shape = [num_rows, g, p, d];
    let dprefix = if p == 0 { None } else { Some((host::tensor(dpk, &shape)?, host::tensor(dpv, &shape)?)) };
    Ok(Grads { dqkv: dqkv.map(|v| host::tensor(v, &[t, width])).transpose()?, dprefix })
}

/// Tensors of a pass on a GPU, as the kernels see them.
struct Launched {
    heads: Heads,
    tiles: Arc<device::Tiles>,
    /// Its memory lives until the kernels are queued.
    _sent: Tensor,
    tiles_at: u64,
    qkv: u64,
    prefix: device::PrefixAt,
    out: u64,
    lse: u64,
}

impl Launched {
    fn new(
        gpu: &OnGpu,
        qkv: &Tensor,
        prefix: Option<Prefix>,
        [out, lse]: [&Tensor; 2],
        rows: Rows,
        heads: Heads,
        wanted: Wanted,
    ) -> Result<Self> {
        if rows.keep.is_some() {
            bail!("attention: padding is supported on the CPU only");
        }
        let prefix_len = prefix.map_or(Ok(0), |prefix| prefix.k_RGPD.dim(2))?;
        let (tiles, sent) = rows.tables.unwrap_or(&Tables::default()).of(gpu, rows.bounds, prefix_len, wanted)?;
        let prefix = match prefix {
            None => device::PrefixAt::None,
            Some(Prefix { k_RGPD, v_RGPD }) => {
                let (k, v) = (gpu.at(k_RGPD)?, gpu.at(v_RGPD)?);
                if k_RGPD.dim(0)? == 1 { device::PrefixAt::Shared { k, v } } else { device::PrefixAt::PerRow { k, v } }
            }
        };
        let (qkv, out, lse) = (gpu.at(qkv)?, gpu.at(out)?, gpu.at_of(lse, DType::F32)?);
        Ok(Self { heads, tiles, tiles_at: gpu.at_of(&sent, DType::U32)?, _sent: sent, qkv, prefix, out, lse })
    }

    fn batch(&self) -> device::Batch<'_> {
        let &Self { heads, ref tiles, tiles_at, qkv, prefix, out, lse, .. } = self;
        device::Batch { heads, tiles, tiles_at, qkv, qkv_stride: heads.qkv_width(), prefix, out, lse }
    }
}

fn check(qkv: &Tensor, prefix: Option<Prefix>, rows: Rows, heads: Heads) -> Result<usize> {
    let (t, width) = qkv.dims2()?;
    if width != heads.qkv_width() || !heads.num_heads.is_multiple_of(heads.num_groups) {
        bail!("attention: q, k, v are {width} wide, expected {} for {heads:?}", heads.qkv_width());
    }
    if rows.bounds.first() != Some(&0) || rows.bounds.last() != Some(&t) || rows.bounds.windows(2).any(|b| b[0] > b[1]) {
        bail!("attention: row bounds {:?} do not cover {t} tokens", rows.bounds);
    }
    if rows.keep.is_some_and(|keep| keep.len() != t) {
        bail!("attention: the padding mask does not have {t} tokens");
    }
    if let Some(prefix) = prefix {
        let (r, g, _, d) = prefix.k_RGPD.dims4()?;
        let fits = (r == 1 || r == rows.bounds.len() - 1) && g == heads.num_groups && d == heads.head_dim;
        if !fits || prefix.v_RGPD.dims() != prefix.k_RGPD.dims() {
            bail!("attention: prefix k {:?}, v {:?} do not fit {heads:?}", prefix.k_RGPD.dims(), prefix.v_RGPD.dims());
        }
    }
    Ok(t)
}

/// One row and one group: all arithmetic that shares keys, in one thread, in one order.
struct Task<'a> {
    row: usize,
    group: usize,
    /// First token of the row and number of tokens.
    start: usize,
    len: usize,
    heads: Heads,
    qkv: &'a [f32],
    /// `[P, D]` each.
    prefix_k: &'a [f32],
    prefix_v: &'a [f32],
    keep: Option<&'a [bool]>,
}

struct TaskGrads {
    /// `[n, N/G, D]`, `[n, D]`, `[n, D]`; empty unless all gradients are wanted.
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// `[P, D]`
    dpk: Vec<f32>,
    dpv: Vec<f32>,
}

fn with_tasks(qkv: &Tensor, prefix: Option<Prefix>, rows: Rows, heads: Heads, f: impl FnOnce(&[Task])) -> Result<()> {
    let qkv = F32View::new(qkv)?;
    let prefix = match prefix {
        Some(p) => Some((F32View::new(p.k_RGPD)?, F32View::new(p.v_RGPD)?, p.k_RGPD.dim(0)?, p.k_RGPD.dim(2)?)),
        None => None,
    };
    let mut tasks = Vec::new();
    for (row, bounds) in rows.bounds.windows(2).enumerate() {
        for group in 0..heads.num_groups {
            let (prefix_k, prefix_v): (&[f32], &[f32]) = match &prefix {
                Some((k, v, num_rows, len)) => {
                    let size = len * heads.head_dim;
                    let at = ((if *num_rows == 1 { 0 } else { row }) * heads.num_groups + group) * size;
                    (&k[at..at + size], &v[at..at + size])
                }
                None => (&[], &[]),
            };
            let (start, len) = (bounds[0], bounds[1] - bounds[0]);
            let keep = rows.keep.map(|keep| &keep[bounds[0]..bounds[1]]);
            tasks.push(Task { row, group, start, len, heads, qkv: &qkv, prefix_k, prefix_v, keep });
        }
    }
    f(&tasks);
    Ok(())
}

impl<'a> Task<'a> {
    fn prefix_len(&self) -> usize {
        self.prefix_k.len() / self.heads.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.heads.head_dim as f32).sqrt()
    }

    /// Values of a part of q, k, v from token `i` of the row on, `column` elements into a token.
    fn at(&self, i: usize, column: usize) -> Mat<'a> {
        let width = self.heads.qkv_width();
        Mat::rows(&self.qkv[(self.start + i) * width + column..], width)
    }

    fn q(&self, i: usize, head: usize) -> Mat<'a> {
        self.at(i, (self.group * self.heads.sharing() + head) * self.heads.head_dim)
    }

    fn k(&self) -> Mat<'a> {
        self.at(0, (self.heads.num_heads + self.group) * self.heads.head_dim)
    }

    fn v(&self) -> Mat<'a> {
        self.at(0, (self.heads.num_heads + self.heads.num_groups + self.group) * self.heads.head_dim)
    }

    /// Query blocks: (first query, queries, own keys that any of them sees).
    fn blocks(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (len, padded) = (self.len, self.keep.is_some());
        (0..len).step_by(BLOCK).map(move |i| {
            let queries = BLOCK.min(len - i);
            (i, queries, if padded { len } else { i + queries })
        })
    }

    /// Scaled scores of a block over the prefix and `own` own keys, negative infinity where a query may not look.
    fn scores(&self, s: &mut [f32], (i, queries, own): (usize, usize, usize), head: usize) {
        let (p, d) = (self.prefix_len(), self.heads.head_dim);
        let width = p + own;
        let q = self.q(i, head);
        product(q, Mat::rows(self.prefix_k, d).t(), MatMut::rows(s, width), (queries, p, d), Write::Overwrite);
        if own > 0 {
            product(q, self.k().t(), MatMut::rows(&mut s[p..], width), (queries, own, d), Write::Overwrite);
        }
        let scale = self.scale();
        for (j, row) in s.chunks_exact_mut(width).take(queries).enumerate() {
            row.iter_mut().for_each(|x| *x *= scale);
            if own > 0 {
                self.mask(&mut row[p..], i + j);
            }
        }
    }

    fn mask(&self, own: &mut [f32], query: usize) {
        match self.keep {
            None => own[query + 1..].fill(f32::NEG_INFINITY),
            Some(keep) if self.prefix_k.is_empty() && !keep[query] => {}
            Some(keep) => own
                .iter_mut()
                .zip(keep)
                .enumerate()
                .filter(|(key, (_, keep))| *key > query || !**keep)
                .for_each(|(_, (x, _))| *x = f32::NEG_INFINITY),
        }
    }

    /// -> (output `[n, N/G, D]`, log-sum-exp `[n, N/G]`).
    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let (p, d, sharing) = (self.prefix_len(), self.heads.head_dim, self.heads.sharing());
        let mut out = vec![0f32; self.len * sharing * d];
        let mut lse = vec![0f32; self.len * sharing];
        let mut s = vec![0f32; BLOCK.min(self.len) * (p + self.len)];
        for head in 0..sharing {
            for (i, queries, own) in self.blocks() {
                let width = p + own;
                self.scores(&mut s, (i, queries, own), head);
                vectorize(|| {
                    for (j, row) in s.chunks_exact_mut(width).take(queries).enumerate() {
                        let shift = max(row);
                        let sum = exp_sum(row, shift);
                        let inv = 1.0 / sum;
                        row.iter_mut().for_each(|x| *x *= inv);
                        lse[(i + j) * sharing + head] = shift + sum.ln();
                    }
                });
                let at = (i * sharing + head) * d;
                let stride = sharing * d;
                product(
                    Mat::rows(&s, width),
                    Mat::rows(self.prefix_v, d),
                    MatMut::rows(&mut out[at..], stride),
                    (queries, d, p),
                    Write::Overwrite,
                );
                let write = if p == 0 { Write::Overwrite } else { Write::Add };
                product(Mat::rows(&s[p..], width), self.v(), MatMut::rows(&mut out[at..], stride), (queries, d, own), write);
            }
        }
        (out, lse)
    }

    fn backward(&self, dout: &[f32], out: &[f32], lse: &[f32], wanted: Wanted) -> TaskGrads {
        let (n, d, sharing) = (self.heads.num_heads, self.heads.head_dim, self.heads.sharing());
        let p = self.prefix_len();
        let all = wanted == Wanted::All;
        let (own_len, stride) = (if all { self.len } else { 0 }, n * d);
        let mut grads = TaskGrads {
            dq: vec![0f32; own_len * sharing * d],
            dk: vec![0f32; own_len * d],
            dv: vec![0f32; own_len * d],
            dpk: vec![0f32; p * d],
            dpv: vec![0f32; p * d],
        };
        if p + own_len == 0 {
            return grads;
        }
        let size = BLOCK.min(self.len) * (p + own_len);
        let (mut s, mut ds) = (vec![0f32; size], vec![0f32; size]);
        for head in 0..sharing {
            let column = (self.group * sharing + head) * d;
            for (i, queries, own) in self.blocks() {
                let own = if all { own } else { 0 };
                let width = p + own;
                let token = |j: usize| (self.start + i + j) * stride + column;
                let do_block = Mat::rows(&dout[token(0)..], stride);
                self.scores(&mut s, (i, queries, own), head);
                product(do_block, Mat::rows(self.prefix_v, d).t(), MatMut::rows(&mut ds, width), (queries, p, d), Write::Overwrite);
                if own > 0 {
                    product(do_block, self.v().t(), MatMut::rows(&mut ds[p..], width), (queries, own, d), Write::Overwrite);
                }
                let scale = self.scale();
                vectorize(|| {
                    for (j, (s, ds)) in s.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width)).take(queries).enumerate() {
                        let lse = lse[(self.start + i + j) * n + self.group * sharing + head];
                        let at = token(j);
                        let delta = dot(&dout[at..at + d], &out[at..at + d]);
                        for (s, ds) in s.iter_mut().zip(ds) {
                            *s = exp(*s - lse);
                            *ds = *s * (*ds - delta) * scale;
                        }
                    }
                });
                let (s_block, ds_block) = (Mat::rows(&s, width), Mat::rows(&ds, width));
                let q = self.q(i, head);
                product(s_block.t(), do_block, MatMut::rows(&mut grads.dpv, d), (p, d, queries), Write::Add);
                product(ds_block.t(), q, MatMut::rows(&mut grads.dpk, d), (p, d, queries), Write::Add);
                if own > 0 {
                    let dq = &mut grads.dq[(i * sharing + head) * d..];
                    let first = if p == 0 { Write::Overwrite } else { Write::Add };
                    product(ds_block, Mat::rows(self.prefix_k, d), MatMut::rows(dq, sharing * d), (queries, d, p), Write::Overwrite);
                    product(Mat::rows(&ds[p..], width), self.k(), MatMut::rows(dq, sharing * d), (queries, d, own), first);
                    product(Mat::rows(&s[p..], width).t(), do_block, MatMut::rows(&mut grads.dv, d), (own, d, queries), Write::Add);
                    product(Mat::rows(&ds[p..], width).t(), q, MatMut::rows(&mut grads.dk, d), (own, d, queries), Write::Add);
                }
            }
        }
        grads
    }
}
