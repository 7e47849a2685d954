// Sums over rows of x, or of a times b, and the last step of all such sums; elementwise.rs has the specification, columns.cuh the order.
//
// Bytes of T rows of n values of s bytes: s n T (dots: 2 s n T), and for each 128 rows 8 n of partial sums, out and in; 8 n for the result.
// Operations a value: 1 or 2, at most 1 a byte, so memory bounds it.
//
// shared: *_f32 256 * 4 * 4
// shared: * 256 * 8 * 4
#include "columns.cuh"

struct ColumnSumsArgs {
    const void* a;    // [T, n]
    const void* b;    // [T, n], of dots alone
    float* partials;  // [row blocks, n]
    int64_t rows;     // T
    int columns;      // n, a multiple of 16 bytes
    int tiles;        // of columns
};

template <typename T>
DEVICE void row_sum(const ColumnSumsArgs& args) {
    const T* a = static_cast<const T*>(args.a);
    column_partials<T>(args.partials, args.rows, args.columns, args.tiles, [&](float(&sums)[WIDE<T>], int64_t row, int column) {
        const auto x = load<WIDE<T>>(a + row * args.columns + column);
        for (int j = 0; j < WIDE<T>; j++) sums[j] += to_f32(x.v[j]);
    });
}

template <typename T>
DEVICE void dots(const ColumnSumsArgs& args) {
    const T *a = static_cast<const T*>(args.a), *b = static_cast<const T*>(args.b);
    column_partials<T>(args.partials, args.rows, args.columns, args.tiles, [&](float(&sums)[WIDE<T>], int64_t row, int column) {
        const auto x = load<WIDE<T>>(a + row * args.columns + column), y = load<WIDE<T>>(b + row * args.columns + column);
        for (int j = 0; j < WIDE<T>; j++) sums[j] += to_f32(x.v[j]) * to_f32(y.v[j]);
    });
}

KERNEL(row_sum_f32, ColumnSumsArgs, COLUMN_THREADS, 4) { row_sum<float>(args); }
KERNEL(row_sum_bf16, ColumnSumsArgs, COLUMN_THREADS, 4) { row_sum<bf16>(args); }
KERNEL(row_sum_f16, ColumnSumsArgs, COLUMN_THREADS, 4) { row_sum<f16>(args); }
KERNEL(column_dots_f32, ColumnSumsArgs, COLUMN_THREADS, 4) { dots<float>(args); }
KERNEL(column_dots_bf16, ColumnSumsArgs, COLUMN_THREADS, 4) { dots<bf16>(args); }
KERNEL(column_dots_f16, ColumnSumsArgs, COLUMN_THREADS, 4) { dots<f16>(args); }

constexpr int TOTAL_THREADS = 64;

struct PartialsArgs {
    const float* partials;  // [row blocks, n]
    float* sums;            // [n], to which is added
    int64_t parts;          // row blocks
    int64_t columns;        // n, a multiple of 4
};

KERNEL(column_sums_add, PartialsArgs, TOTAL_THREADS, 8) {
    const int64_t column = (int64_t(blockIdx.x) * TOTAL_THREADS + threadIdx.x) * 4;
    if (column >= args.columns) return;
    Vec<float, 4> total = {{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll 8
    for (int64_t part = 0; part < args.parts; part++) {
        const auto x = load<4>(args.partials + part * args.columns + column);
        for (int j = 0; j < 4; j++) total.v[j] += x.v[j];
    }
    auto sums = load<4>(args.sums + column);
    for (int j = 0; j < 4; j++) sums.v[j] += total.v[j];
    store(args.sums + column, sums);
}
