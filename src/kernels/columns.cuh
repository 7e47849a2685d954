// Sums over rows, column by column, in an order that depends on the number of rows alone: a block adds up ROWS_OF_BLOCK rows of a tile of columns, a
// warp each of every WARPS-th, then the warps' sums in their order; column_sums.cu adds the blocks' sums in theirs.
#pragma once
#include "device.cuh"

constexpr int COLUMN_THREADS = 256;
constexpr int WARPS = COLUMN_THREADS / WARP;
constexpr int ROWS_OF_BLOCK = 128;

// `add(sums, row, column)` adds a row's WIDE<T> values from `column` on. partials [row blocks, columns]; `tiles` blocks a row block.
// Shared memory: WARPS * WARP * WIDE<T> floats.
template <typename T, typename Add>
DEVICE void column_partials(float* partials, int64_t rows, int columns, int tiles, Add add) {
    constexpr int WIDTH = WARP * WIDE<T>;
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
    const int first = int(blockIdx.x) % tiles * WIDTH, column = first + lane * WIDE<T>;
    const int64_t part = int(blockIdx.x) / tiles;
    const int64_t end = rows < (part + 1) * ROWS_OF_BLOCK ? rows : (part + 1) * ROWS_OF_BLOCK;
    float sums[WIDE<T>];
#pragma unroll
    for (int j = 0; j < WIDE<T>; j++) sums[j] = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (int64_t row = part * ROWS_OF_BLOCK + warp; row < end; row += WARPS) add(sums, row, column);
    }
#pragma unroll
    for (int i = 0; i < WIDE<T> / 4; i++) {
        const Vec<float, 4> four = {{sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]}};
        store(shared + warp * WIDTH + lane * WIDE<T> + 4 * i, four);
    }
    __syncthreads();
    const int mine = int(threadIdx.x);
    if (mine < WIDTH && first + mine < columns) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += shared[i * WIDTH + mine];
        partials[part * columns + first + mine] = sum;
    }
}
