//! The matrix product behind [`super::matmul`] on a CPU: C (+)= A B in f32.
//!
//! After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008). k is cut to slabs of at most `DEPTH` steps. Of a
//! slab, A is packed once to tiles of rows, step after step, so that a tile is read front to back whatever its strides were; then a task packs
//! a block of B, `[DEPTH, BLOCK]`, to panels as wide as two registers (the block stays in a core's second-level cache) and multiplies its
//! tiles of A with it, each held in registers. Where C has few columns, A is read where it lies. One element of C is a chain of multiply-adds
//! over k, cut at places that depend on k alone: its bits hang neither on the other rows and columns nor on tiles, packing or threads.
#![allow(unsafe_code, reason = "tiles are read and written through pointers: a row of C is shared by tasks that own different columns")]

use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Most rows of a tile that is as wide as two of `lanes`: with two registers each, two for B and one for A, 27 of AVX-512's 32 registers are
/// used, and 15 of AVX2's 16.
const fn tile_rows(lanes: usize) -> usize {
    if lanes >= MAX_LANES { MAX_ROWS } else { ROWS_IN_PLACE }
}

const MAX_ROWS: usize = 12;
/// Most rows of a tile that is read where it lies: more would fall on the same lines of a first-level cache when rows are a power of two long.
const ROWS_IN_PLACE: usize = 6;
/// Most steps of k in a slab.
const DEPTH: usize = 512;
/// Columns of a block: 256 KiB at full depth, half of a small second-level cache.
const BLOCK: usize = 128;
/// Below so many columns of C, A is read in place where its rows are contiguous: packing would cost more than it saves.
const WORTH_PACKING_A: usize = 768;
/// Below so many rows of C, B is read in place where its rows are contiguous.
const WORTH_PACKING_B: usize = 64;
/// Most lanes of a register.
const MAX_LANES: usize = 16;
/// Tiles of A that a task packs together: of a transposed A, they read whole cache lines.
const TILES_PACKED: usize = 8;

/// A matrix to read: element (i, j) is at `start + i * row_stride + j * col_stride`; one of the strides is 1.
#[derive(Clone, Copy)]
pub(super) struct Source {
    pub start: *const f32,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl Source {
    /// The part that begins at element (i, j).
    #[inline(always)]
    unsafe fn at(self, i: usize, j: usize) -> Self {
        // SAFETY: the caller vouches for the element.
        Self { start: unsafe { self.start.add(i * self.row_stride + j * self.col_stride) }, ..self }
    }
}

/// A matrix to write: rows of contiguous elements, `row_stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub start: *mut f32,
    pub row_stride: usize,
}

/// C (+)= A B for A `[m, k]` and B `[k, n]`, by `threads` threads of the current pool.
///
/// # Safety
/// All elements of A, B and C that the sizes name can be read or written, nobody else writes them meanwhile, and with `add` C is initialised.
/// k is not 0.
pub(super) unsafe fn gemm(a: Source, b: Source, c: Target, (m, n, k): (usize, usize, usize), add: bool, threads: usize) {
    let arch = Arch::new();
    let packs_a = a.col_stride != 1 || n >= WORTH_PACKING_A;
    let tallest = if packs_a { tile_rows(arch.dispatch(Lanes)) } else { ROWS_IN_PLACE };
    let tiles = Tiles::new(m, tallest, if tallest.is_multiple_of(4) { 4 } else { 1 });
    // Taken, and not borrowed: while it waits, this thread may begin another product.
    let mut packed = PACKED_A.take();
    let deepest = k.div_ceil(k.div_ceil(DEPTH));
    for start in (0..k).step_by(deepest) {
        let depth = deepest.min(k - start);
        // SAFETY: the caller vouches for A, B and C at all steps of k.
        unsafe {
            let (a, b) = (a.at(0, start), b.at(start, 0));
            let left = if packs_a {
                pack_a(a, tiles, depth, threads, &mut packed);
                Left::Packed(packed.as_ptr())
            } else {
                Left::InPlace(a)
            };
            Slab { arch, left, tiles, b, c, n, depth, add: add || start > 0 }.run(threads);
        }
    }
    PACKED_A.set(packed);
}

/// Lanes of a register here.
struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

/// Rows dealt to tiles that differ by at most one unit.
#[derive(Clone, Copy)]
struct Tiles {
    rows: usize,
    count: usize,
    /// Tiles begin at multiples of it.
    unit: usize,
}

impl Tiles {
    fn new(rows: usize, tallest: usize, unit: usize) -> Self {
        Self { rows, count: rows.div_ceil(unit).div_ceil(tallest / unit), unit }
    }

    /// The first row of a tile.
    #[inline(always)]
    fn row(self, tile: usize) -> usize {
        (tile * self.rows.div_ceil(self.unit) / self.count * self.unit).min(self.rows)
    }
}

/// Pointers that threads share.
struct Shared<T>(T);
// SAFETY: tasks read what nobody writes and write disjoint parts.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(&self) -> &T {
        &self.0
    }
}

/// A's rows at `depth` steps to tiles: the tile that begins at row i begins at i * depth, step after step of its rows.
///
/// # Safety
/// `a` holds the tiles' rows at `depth` steps.
unsafe fn pack_a(a: Source, tiles: Tiles, depth: usize, threads: usize, packed: &mut Vec<f32>) {
    let needed = tiles.rows * depth;
    packed.clear();
    packed.reserve(needed);
    let shared = Shared((a, packed.as_mut_ptr()));
    let pack = |group: usize| {
        let (a, start) = *shared.get();
        let group = group * TILES_PACKED..((group + 1) * TILES_PACKED).min(tiles.count);
        // SAFETY: each tile's rows lie inside `a`, and its part of `packed` is its own.
        unsafe {
            if a.col_stride == 1 {
                for tile in group {
                    let (row, height) = (tiles.row(tile), tiles.row(tile + 1) - tiles.row(tile));
                    transpose(a.at(row, 0).start, a.row_stride, (height, depth), start.add(row * depth));
                }
                return;
            }
            for p in 0..depth {
                for tile in group.clone() {
                    let (row, height) = (tiles.row(tile), tiles.row(tile + 1) - tiles.row(tile));
                    std::ptr::copy_nonoverlapping(a.at(row, p).start, start.add(row * depth + p * height), height);
                }
            }
        }
    };
    let groups = tiles.count.div_ceil(TILES_PACKED);
    if threads <= 1 {
        (0..groups).for_each(pack);
    } else {
        (0..groups).into_par_iter().for_each(pack);
    }
    // SAFETY: the tiles' parts make up all of it.
    unsafe { packed.set_len(needed) };
}

/// `height` rows of `width` elements to `width` rows of `height`.
#[inline(always)]
unsafe fn transpose(from: *const f32, stride: usize, (height, width): (usize, usize), to: *mut f32) {
    let whole = (height / 4 * 4, width / 4 * 4);
    // SAFETY: the caller owns both.
    unsafe {
        for x in (0..whole.1).step_by(4) {
            for r in (0..whole.0).step_by(4) {
                transpose_4x4(from.add(r * stride + x), stride, to.add(x * height + r), height);
            }
        }
        for r in 0..height {
            for x in if r < whole.0 { whole.1 } else { 0 }..width {
                *to.add(x * height + r) = *from.add(r * stride + x);
            }
        }
    }
}

/// A slab of A: packed to tiles, or rows that are contiguous.
#[derive(Clone, Copy)]
enum Left {
    Packed(*const f32),
    InPlace(Source),
}

/// The product at the steps of k of one slab.
#[derive(Clone, Copy)]
struct Slab {
    arch: Arch,
    left: Left,
    tiles: Tiles,
    b: Source,
    c: Target,
    /// Columns of C.
    n: usize,
    depth: usize,
    add: bool,
}

impl Slab {
    /// # Safety
    /// As [`gemm`].
    unsafe fn run(self, threads: usize) {
        let run = |slab: Self, tiles: Range<usize>, columns: Range<usize>| {
            PANELS.with_borrow_mut(|panels| slab.arch.dispatch(Task { slab, tiles, columns, panels }));
        };
        if threads <= 1 {
            for start in (0..self.n).step_by(BLOCK) {
                run(self, 0..self.tiles.count, start..(start + BLOCK).min(self.n));
            }
            return;
        }
        let shared = Shared(self);
        let (height, width) = block_shape(self.tiles, self.n, threads);
        let across = self.n.div_ceil(width);
        (0..across * self.tiles.count.div_ceil(height)).into_par_iter().with_max_len(1).for_each(|task| {
            let slab = *shared.get();
            let (i, j) = (task / across * height, task % across * width);
            run(slab, i..(i + height).min(slab.tiles.count), j..(j + width).min(slab.n));
        });
    }
}

/// Tiles and columns of a task: narrower blocks, then fewer tiles, until each thread has a few tasks to even out what others lack.
fn block_shape(tiles: Tiles, n: usize, threads: usize) -> (usize, usize) {
    const TASKS_A_THREAD: usize = 3;
    /// Below so many rows a block of B is not worth packing twice.
    const FEWEST_ROWS: usize = 96;
    let mut width = BLOCK;
    while width > 2 * MAX_LANES && n.div_ceil(width) < TASKS_A_THREAD * threads {
        width /= 2;
    }
    let pieces = (TASKS_A_THREAD * threads / n.div_ceil(width)).clamp(1, tiles.rows.div_ceil(FEWEST_ROWS));
    (tiles.count.div_ceil(pieces), width)
}

thread_local! {
    /// Panels of a block of B.
    static PANELS: RefCell<Vec<f32>> = RefCell::default();
    /// Tiles of a slab of A.
    static PACKED_A: RefCell<Vec<f32>> = RefCell::default();
}

/// Some tiles by some columns of a slab.
struct Task<'a> {
    slab: Slab,
    tiles: Range<usize>,
    columns: Range<usize>,
    panels: &'a mut Vec<f32>,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Slab { tiles, depth, .. } = self.slab;
        let panels = self.columns.len().next_multiple_of(2 * S::F32_LANES) * depth;
        self.panels.resize(panels.max(self.panels.len()), 0.0);
        let rows = tiles.row(self.tiles.end) - tiles.row(self.tiles.start);
        let in_place = self.slab.b.col_stride == 1 && rows < WORTH_PACKING_B;
        // SAFETY: the caller of `gemm` vouches for A, B and C inside rows, columns and steps of k; the panels were sized above.
        unsafe {
            self.pack_panels(2 * S::F32_LANES, in_place);
            match self.slab.left {
                Left::Packed(_) => self.multiply::<S, true>(simd, in_place),
                Left::InPlace(_) => self.multiply::<S, false>(simd, in_place),
            }
        }
    }
}

impl Task<'_> {
    /// The task's columns of B to panels; where B is read in place, only those that do not fill one.
    #[inline(always)]
    unsafe fn pack_panels(&mut self, width: usize, in_place: bool) {
        let Slab { b, depth, .. } = self.slab;
        for (number, j) in self.columns.clone().step_by(width).enumerate() {
            let count = width.min(self.columns.end - j);
            if in_place && count == width {
                continue;
            }
            // SAFETY: the columns lie inside B, panel `number` inside the scratch.
            unsafe { pack_b(b.at(0, j), depth, count, width, self.panels.as_mut_ptr().add(number * width * depth)) };
        }
    }

    #[inline(always)]
    unsafe fn multiply<S: Simd, const PACKED: bool>(self, simd: S, in_place: bool) {
        let Slab { left, tiles, b, c, depth, add, .. } = self.slab;
        let width = 2 * S::F32_LANES;
        for tile in self.tiles {
            let (i, height) = (tiles.row(tile), tiles.row(tile + 1) - tiles.row(tile));
            // SAFETY: rows and columns lie inside A, B and C, panels inside the scratch; `edge` holds a whole tile.
            unsafe {
                let left = match left {
                    Left::Packed(start) => Source { start: start.add(i * depth), row_stride: 1, col_stride: height },
                    Left::InPlace(a) => a.at(i, 0),
                };
                for (number, j) in self.columns.clone().step_by(width).enumerate() {
                    let count = width.min(self.columns.end - j);
                    let right = if in_place && count == width {
                        b.at(0, j)
                    } else {
                        Source { start: self.panels.as_ptr().add(number * width * depth), row_stride: width, col_stride: 1 }
                    };
                    let to = Target { start: c.start.add(i * c.row_stride + j), ..c };
                    if count == width {
                        tile_of::<S, PACKED>(simd, height, left, right, to, depth, add);
                        continue;
                    }
                    let mut edge = [0f32; MAX_ROWS * 2 * MAX_LANES];
                    tile_of::<S, PACKED>(simd, height, left, right, Target { start: edge.as_mut_ptr(), row_stride: width }, depth, false);
                    for r in 0..height {
                        for x in 0..count {
                            let (to, value) = (to.start.add(r * to.row_stride + x), edge[r * width + x]);
                            *to = if add { *to + value } else { value };
                        }
                    }
                }
            }
        }
    }
}

/// `count` columns of `depth` rows of B to a panel: row after row of `width` elements, the missing ones 0.
#[inline(always)]
unsafe fn pack_b(from: Source, depth: usize, count: usize, width: usize, to: *mut f32) {
    // SAFETY: `from` holds depth x count elements, `to` depth x width.
    unsafe {
        if count == width && from.col_stride == 1 {
            for p in 0..depth {
                std::ptr::copy_nonoverlapping(from.start.add(p * from.row_stride), to.add(p * width), width);
            }
            return;
        }
        let whole = if count == width && width.is_multiple_of(4) && from.row_stride == 1 { depth / 4 * 4 } else { 0 };
        for p in (0..whole).step_by(4) {
            for x in (0..width).step_by(4) {
                transpose_4x4(from.start.add(p + x * from.col_stride), from.col_stride, to.add(p * width + x), width);
            }
        }
        for p in whole..depth {
            for x in 0..width {
                let value = if x < count { *from.start.add(p * from.row_stride + x * from.col_stride) } else { 0.0 };
                *to.add(p * width + x) = value;
            }
        }
    }
}

/// Four rows of four elements, `from_stride` apart, to four columns.
#[inline(always)]
unsafe fn transpose_4x4(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller owns both blocks; SSE2 is part of x86-64.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
            let row = |r: usize| _mm_loadu_ps(from.add(r * from_stride));
            let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
            let (low01, high01) = (_mm_unpacklo_ps(r0, r1), _mm_unpackhi_ps(r0, r1));
            let (low23, high23) = (_mm_unpacklo_ps(r2, r3), _mm_unpackhi_ps(r2, r3));
            let at = |q: usize| to.add(q * to_stride);
            _mm_storeu_ps(at(0), _mm_movelh_ps(low01, low23));
            _mm_storeu_ps(at(1), _mm_movehl_ps(low23, low01));
            _mm_storeu_ps(at(2), _mm_movelh_ps(high01, high23));
            _mm_storeu_ps(at(3), _mm_movehl_ps(high23, high01));
        }
        #[cfg(not(target_arch = "x86_64"))]
        for p in 0..4 {
            for x in 0..4 {
                *to.add(p * to_stride + x) = *from.add(x * from_stride + p);
            }
        }
    }
}

#[inline(always)]
unsafe fn tile_of<S: Simd, const PACKED: bool>(simd: S, height: usize, a: Source, b: Source, c: Target, depth: usize, add: bool) {
    // SAFETY: as `tile`.
    unsafe {
        if PACKED && tile_rows(S::F32_LANES) > ROWS_IN_PLACE {
            match height {
                12 => return tile::<S, 12, PACKED>(simd, a, b, c, depth, add),
                11 => return tile::<S, 11, PACKED>(simd, a, b, c, depth, add),
                10 => return tile::<S, 10, PACKED>(simd, a, b, c, depth, add),
                9 => return tile::<S, 9, PACKED>(simd, a, b, c, depth, add),
                8 => return tile::<S, 8, PACKED>(simd, a, b, c, depth, add),
                7 => return tile::<S, 7, PACKED>(simd, a, b, c, depth, add),
                _ => {}
            }
        }
        match height {
            6 => tile::<S, 6, PACKED>(simd, a, b, c, depth, add),
            5 => tile::<S, 5, PACKED>(simd, a, b, c, depth, add),
            4 => tile::<S, 4, PACKED>(simd, a, b, c, depth, add),
            3 => tile::<S, 3, PACKED>(simd, a, b, c, depth, add),
            2 => tile::<S, 2, PACKED>(simd, a, b, c, depth, add),
            _ => tile::<S, 1, PACKED>(simd, a, b, c, depth, add),
        }
    }
}

/// `HEIGHT` rows of A by two registers' columns of B. `PACKED` says that A's strides are (1, `HEIGHT`), and else that they are (any, 1).
#[inline(always)]
unsafe fn tile<S: Simd, const HEIGHT: usize, const PACKED: bool>(simd: S, a: Source, b: Source, c: Target, depth: usize, add: bool) {
    /// Steps written out one after another, so that addresses are constants.
    const UNROLL: usize = 4;
    let (row_stride, col_stride) = if PACKED { (1, HEIGHT) } else { (a.row_stride, 1) };
    // SAFETY: the caller vouches for HEIGHT x depth elements of A, depth x two registers of B and HEIGHT x two registers of C.
    unsafe {
        let mut sums = [[simd.splat_f32s(0.0); 2]; HEIGHT];
        let (mut left, mut right) = (a.start, b.start);
        for _ in 0..depth / UNROLL {
            for u in 0..UNROLL {
                multiply_add(simd, &mut sums, left.add(u * col_stride), row_stride, right.add(u * b.row_stride));
            }
            (left, right) = (left.add(UNROLL * col_stride), right.add(UNROLL * b.row_stride));
        }
        for u in 0..depth % UNROLL {
            multiply_add(simd, &mut sums, left.add(u * col_stride), row_stride, right.add(u * b.row_stride));
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, &sum) in sums.iter().enumerate() {
                let at = c.start.add(r * c.row_stride + half * S::F32_LANES);
                let value = if add { simd.add_f32s(load::<S>(at), sum) } else { sum };
                std::ptr::write_unaligned(at.cast::<S::f32s>(), value);
            }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd>(at: *const f32) -> S::f32s {
    // SAFETY: the caller vouches for a register's elements.
    unsafe { std::ptr::read_unaligned(at.cast()) }
}

/// One step of k: `HEIGHT` elements of A, `row_stride` apart, times two registers of B. A function, since closures are not always inlined.
#[inline(always)]
unsafe fn multiply_add<S: Simd, const HEIGHT: usize>(
    simd: S,
    sums: &mut [[S::f32s; 2]; HEIGHT],
    left: *const f32,
    row_stride: usize,
    right: *const f32,
) {
    // SAFETY: the caller vouches for these elements of A and B.
    unsafe {
        let (b0, b1) = (load::<S>(right), load::<S>(right.add(S::F32_LANES)));
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = simd.splat_f32s(*left.add(r * row_stride));
            sums[0] = simd.mul_add_e_f32s(x, b0, sums[0]);
            sums[1] = simd.mul_add_e_f32s(x, b1, sums[1]);
        }
    }
}
