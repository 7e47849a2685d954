//! The matrix product behind [`super::matmul`] on a CPU: C (+)= A B in f32.
//!
//! After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), cut down to what training has: C and A have long
//! rows, and the rows of A are few enough that a block of B is worth packing once. A task packs a block of B, `[DEPTH, BLOCK]`, to panels as
//! wide as two registers (the block stays in a core's second-level cache) and multiplies all of A with it in tiles of `ROWS` rows; the tile
//! is held in registers. A is read where it lies. One element of C is a chain of multiply-adds over k, cut at places that depend on k alone:
//! its bits hang neither on the other rows and columns nor on how tasks were dealt to threads.
#![allow(unsafe_code, reason = "tiles are read and written through pointers: a row of C is shared by tasks that own different columns")]

use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows of a tile: with two registers each, two for B and one for A, fifteen of AVX2's sixteen are used.
const ROWS: usize = 6;
/// Most steps of k in a block.
const DEPTH: usize = 512;
/// Columns of a block: 256 KiB at full depth, half of a small second-level cache.
const BLOCK: usize = 128;
/// Below so many rows B is read in place where its rows are contiguous: packing would cost as much as it saves.
const WORTH_PACKING: usize = 64;
/// Most lanes of a register.
const MAX_LANES: usize = 16;

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
    let run = |rows: Range<usize>, columns: Range<usize>| {
        SCRATCH.with_borrow_mut(|scratch| arch.dispatch(Task { a, b, c, rows, columns, k, add, scratch }));
    };
    if threads <= 1 {
        for start in (0..n).step_by(BLOCK) {
            run(0..m, start..(start + BLOCK).min(n));
        }
        return;
    }
    struct Shared<F>(F);
    // SAFETY: tasks write disjoint blocks of C and only read A and B.
    unsafe impl<F> Sync for Shared<F> {}
    impl<F: Fn(Range<usize>, Range<usize>)> Shared<F> {
        fn call(&self, rows: Range<usize>, columns: Range<usize>) {
            (self.0)(rows, columns);
        }
    }
    let shared = Shared(run);
    let (height, width) = block_shape(m, n, threads);
    let across = n.div_ceil(width);
    (0..across * m.div_ceil(height)).into_par_iter().with_max_len(1).for_each(|task| {
        let (i, j) = (task / across * height, task % across * width);
        shared.call(i..(i + height).min(m), j..(j + width).min(n));
    });
}

/// Rows and columns of a task: narrower blocks, then fewer rows, until each thread has a few tasks to even out what others lack.
fn block_shape(m: usize, n: usize, threads: usize) -> (usize, usize) {
    const TASKS_A_THREAD: usize = 3;
    let mut width = BLOCK;
    while width > 2 * MAX_LANES && n.div_ceil(width) < TASKS_A_THREAD * threads {
        width /= 2;
    }
    let pieces = (TASKS_A_THREAD * threads / n.div_ceil(width)).clamp(1, m.div_ceil(16 * ROWS));
    (m.div_ceil(pieces).next_multiple_of(ROWS), width)
}

#[derive(Default)]
struct Scratch {
    /// Panels of a block of B.
    panels: Vec<f32>,
    /// A tile's rows of A, where they are not contiguous.
    rows: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct Task<'a> {
    a: Source,
    b: Source,
    c: Target,
    rows: Range<usize>,
    columns: Range<usize>,
    k: usize,
    add: bool,
    scratch: &'a mut Scratch,
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let deepest = self.k.div_ceil(self.k.div_ceil(DEPTH));
        let panels = self.columns.len().next_multiple_of(2 * S::F32_LANES) * deepest;
        self.scratch.panels.resize(panels.max(self.scratch.panels.len()), 0.0);
        self.scratch.rows.resize(ROWS * DEPTH, 0.0);
        for start in (0..self.k).step_by(deepest) {
            let steps = start..(start + deepest).min(self.k);
            // SAFETY: the caller of `gemm` vouches for A, B and C inside rows, columns and steps of k; the scratch was sized above.
            unsafe {
                self.pack_panels(steps.clone(), 2 * S::F32_LANES);
                self.multiply(simd, steps);
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn reads_b_in_place(&self) -> bool {
        self.b.col_stride == 1 && self.rows.len() < WORTH_PACKING
    }

    /// The task's columns of B to panels, but for those that are read in place.
    #[inline(always)]
    unsafe fn pack_panels(&mut self, steps: Range<usize>, width: usize) {
        for (number, j) in self.columns.clone().step_by(width).enumerate() {
            let count = width.min(self.columns.end - j);
            if self.reads_b_in_place() && count == width {
                continue;
            }
            // SAFETY: the columns lie inside B, panel `number` inside the scratch.
            unsafe {
                let to = self.scratch.panels.as_mut_ptr().add(number * width * steps.len());
                pack(self.b.at(steps.start, j), steps.len(), count, width, to);
            }
        }
    }

    /// All tiles of the task, over some steps of k.
    #[inline(always)]
    unsafe fn multiply<S: Simd>(&mut self, simd: S, steps: Range<usize>) {
        let (width, depth) = (2 * S::F32_LANES, steps.len());
        let add = self.add || steps.start > 0;
        for i in self.rows.clone().step_by(ROWS) {
            let height = ROWS.min(self.rows.end - i);
            // SAFETY: rows, columns and steps lie inside A, B and C, panels inside the scratch; `edge` holds a whole tile.
            unsafe {
                let left = self.contiguous_rows(self.a.at(i, steps.start), height, depth);
                for (number, j) in self.columns.clone().step_by(width).enumerate() {
                    let count = width.min(self.columns.end - j);
                    let to = Target { start: self.c.start.add(i * self.c.row_stride + j), ..self.c };
                    if count == width && self.reads_b_in_place() {
                        tile_of(simd, height, left, self.b.at(steps.start, j), to, depth, add);
                        continue;
                    }
                    let start = self.scratch.panels.as_ptr().add(number * width * depth);
                    let panel = Source { start, row_stride: width, col_stride: 1 };
                    if count == width {
                        tile_of(simd, height, left, panel, to, depth, add);
                        continue;
                    }
                    let mut edge = [0f32; ROWS * 2 * MAX_LANES];
                    tile_of(simd, height, left, panel, Target { start: edge.as_mut_ptr(), row_stride: width }, depth, false);
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

    /// `rows` themselves where they are contiguous, or a copy in the scratch.
    #[inline(always)]
    unsafe fn contiguous_rows(&mut self, rows: Source, height: usize, depth: usize) -> Source {
        if rows.col_stride == 1 {
            return rows;
        }
        let copy = &mut self.scratch.rows;
        for p in 0..depth {
            for r in 0..height {
                // SAFETY: the caller vouches for height x depth elements of `rows`.
                copy[r * depth + p] = unsafe { *rows.at(r, p).start };
            }
        }
        Source { start: copy.as_ptr(), row_stride: depth, col_stride: 1 }
    }
}

/// `count` columns of `depth` rows of B to a panel: row after row of `width` elements, the missing ones 0.
#[inline(always)]
unsafe fn pack(from: Source, depth: usize, count: usize, width: usize, to: *mut f32) {
    // SAFETY: `from` holds depth x count elements, `to` depth x width.
    unsafe {
        if count == width && from.col_stride == 1 {
            for p in 0..depth {
                std::ptr::copy_nonoverlapping(from.start.add(p * from.row_stride), to.add(p * width), width);
            }
            return;
        }
        let whole = if count == width && width.is_multiple_of(8) && from.row_stride == 1 { depth / 8 * 8 } else { 0 };
        for p in (0..whole).step_by(8) {
            for x in (0..width).step_by(8) {
                transpose_8x8(from.start.add(p + x * from.col_stride), from.col_stride, to.add(p * width + x), width);
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

/// Eight rows of eight elements, `from_stride` apart, to eight columns.
#[inline(always)]
unsafe fn transpose_8x8(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    // SAFETY: the caller owns both blocks; SSE2 is part of x86-64.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
            for (x, p) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
                let row = |r: usize| _mm_loadu_ps(from.add((x + r) * from_stride + p));
                let (r0, r1, r2, r3) = (row(0), row(1), row(2), row(3));
                let (low01, high01) = (_mm_unpacklo_ps(r0, r1), _mm_unpackhi_ps(r0, r1));
                let (low23, high23) = (_mm_unpacklo_ps(r2, r3), _mm_unpackhi_ps(r2, r3));
                let at = |q: usize| to.add((p + q) * to_stride + x);
                _mm_storeu_ps(at(0), _mm_movelh_ps(low01, low23));
                _mm_storeu_ps(at(1), _mm_movehl_ps(low23, low01));
                _mm_storeu_ps(at(2), _mm_movelh_ps(high01, high23));
                _mm_storeu_ps(at(3), _mm_movehl_ps(high23, high01));
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        for p in 0..8 {
            for x in 0..8 {
                *to.add(p * to_stride + x) = *from.add(x * from_stride + p);
            }
        }
    }
}

#[inline(always)]
unsafe fn tile_of<S: Simd>(simd: S, height: usize, a: Source, b: Source, c: Target, depth: usize, add: bool) {
    // SAFETY: as `tile`.
    unsafe {
        match height {
            6 => tile::<S, 6>(simd, a, b, c, depth, add),
            5 => tile::<S, 5>(simd, a, b, c, depth, add),
            4 => tile::<S, 4>(simd, a, b, c, depth, add),
            3 => tile::<S, 3>(simd, a, b, c, depth, add),
            2 => tile::<S, 2>(simd, a, b, c, depth, add),
            _ => tile::<S, 1>(simd, a, b, c, depth, add),
        }
    }
}

/// `HEIGHT` rows of A by two registers' columns of B.
#[inline(always)]
unsafe fn tile<S: Simd, const HEIGHT: usize>(simd: S, a: Source, b: Source, c: Target, depth: usize, add: bool) {
    /// Steps written out one after another, so that addresses are constants.
    const UNROLL: usize = 4;
    // SAFETY: the caller vouches for HEIGHT x depth elements of A, depth x two registers of B and HEIGHT x two registers of C.
    unsafe {
        let mut sums = [[simd.splat_f32s(0.0); 2]; HEIGHT];
        let load = |at: *const f32| std::ptr::read_unaligned(at.cast::<S::f32s>());
        let step = |sums: &mut [[S::f32s; 2]; HEIGHT], left: *const f32, right: *const f32| {
            let (b0, b1) = (load(right), load(right.add(S::F32_LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = simd.splat_f32s(*left.add(r * a.row_stride));
                sums[0] = simd.mul_add_e_f32s(x, b0, sums[0]);
                sums[1] = simd.mul_add_e_f32s(x, b1, sums[1]);
            }
        };
        let (mut left, mut right) = (a.start, b.start);
        for _ in 0..depth / UNROLL {
            for u in 0..UNROLL {
                step(&mut sums, left.add(u), right.add(u * b.row_stride));
            }
            (left, right) = (left.add(UNROLL), right.add(UNROLL * b.row_stride));
        }
        for u in 0..depth % UNROLL {
            step(&mut sums, left.add(u), right.add(u * b.row_stride));
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, &sum) in sums.iter().enumerate() {
                let at = c.start.add(r * c.row_stride + half * S::F32_LANES);
                let value = if add { simd.add_f32s(load(at), sum) } else { sum };
                std::ptr::write_unaligned(at.cast::<S::f32s>(), value);
            }
        }
    }
}
