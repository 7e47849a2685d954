// RMSNorm; rms_norm.rs has the specification. A block a row, the row in registers: each value is read once.
//
// Bytes a row of H values of s bytes: forward 2 s H + 4 (x; y, rstd) and w once for all rows; backward 4 s H + 4 (dy, x, dx in and out) and w;
// weight gradient 2 s H + 4 (dy, x, rstd), and 8 H of partial sums for each 128 rows. Every row asks for w (backward twice), which L2 has.
// Operations a value: 4 forward, 7 backward, 3 for the weight; 1 to 2 a byte at most, so memory bounds it.
//
// shared: rms_norm_weight_f32 256 * 4 * 4
// shared: rms_norm_weight_* 256 * 8 * 4
// shared: rms_norm_* 8 * 4
#include "columns.cuh"

constexpr int THREADS = 256;
// Loads of 16 bytes that a thread keeps: rows of up to THREADS * WIDE * LOADS values.
constexpr int LOADS = 8;

struct RmsNormArgs {
    const void* x;    // [T, H]
    const void* w;    // [H]
    void* y;          // [T, H]; backward: dx, to which is added
    float* rstd;      // [T]; backward: read
    const void* dy;   // [T, H], backward alone
    int64_t columns;  // H, a multiple of 16 bytes
    float eps;
    int padding;
};

template <typename T>
DEVICE void rms_norm_forward(const RmsNormArgs& args) {
    float* scratch = reinterpret_cast<float*>(shared_memory());
    const int columns = int(args.columns);
    const int64_t row = blockIdx.x;
    const T* x = static_cast<const T*>(args.x) + row * columns;
    Vec<T, WIDE<T>> values[LOADS];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int at = (i * THREADS + threadIdx.x) * WIDE<T>;
        if (at < columns) {
            values[i] = load<WIDE<T>>(x + at);
            for (int j = 0; j < WIDE<T>; j++) squares += to_f32(values[i].v[j]) * to_f32(values[i].v[j]);
        }
    }
    const float rstd = fast_rsqrt(block_sum(squares, scratch) / float(columns) + args.eps);
    T* y = static_cast<T*>(args.y) + row * columns;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int at = (i * THREADS + threadIdx.x) * WIDE<T>;
        if (at < columns) {
            const auto w = load<WIDE<T>>(static_cast<const T*>(args.w) + at);
            Vec<T, WIDE<T>> out;
            for (int j = 0; j < WIDE<T>; j++) out.v[j] = from_f32<T>(to_f32(w.v[j]) * (to_f32(values[i].v[j]) * rstd));
            store(y + at, out);
        }
    }
    if (threadIdx.x == 0) args.rstd[row] = rstd;
}

template <typename T>
DEVICE void rms_norm_backward(const RmsNormArgs& args) {
    float* scratch = reinterpret_cast<float*>(shared_memory());
    const int columns = int(args.columns);
    const int64_t row = blockIdx.x;
    const T* x = static_cast<const T*>(args.x) + row * columns;
    const T* dy = static_cast<const T*>(args.dy) + row * columns;
    Vec<T, WIDE<T>> values[LOADS], grads[LOADS];
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int at = (i * THREADS + threadIdx.x) * WIDE<T>;
        if (at < columns) {
            values[i] = load<WIDE<T>>(x + at);
            grads[i] = load<WIDE<T>>(dy + at);
            const auto w = load<WIDE<T>>(static_cast<const T*>(args.w) + at);
            for (int j = 0; j < WIDE<T>; j++) dot += to_f32(values[i].v[j]) * (to_f32(w.v[j]) * to_f32(grads[i].v[j]));
        }
    }
    const float rstd = args.rstd[row];
    const float c = rstd * rstd * rstd * (block_sum(dot, scratch) / float(columns));
    T* dx = static_cast<T*>(args.y) + row * columns;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int at = (i * THREADS + threadIdx.x) * WIDE<T>;
        if (at < columns) {
            const auto w = load<WIDE<T>>(static_cast<const T*>(args.w) + at);
            auto out = load<WIDE<T>>(dx + at);
            for (int j = 0; j < WIDE<T>; j++) {
                const float step = rstd * (to_f32(w.v[j]) * to_f32(grads[i].v[j])) - to_f32(values[i].v[j]) * c;
                out.v[j] = from_f32<T>(to_f32(out.v[j]) + step);
            }
            store(dx + at, out);
        }
    }
}

KERNEL(rms_norm_fwd_f32, RmsNormArgs, THREADS, 2) { rms_norm_forward<float>(args); }
KERNEL(rms_norm_fwd_bf16, RmsNormArgs, THREADS, 4) { rms_norm_forward<bf16>(args); }
KERNEL(rms_norm_fwd_f16, RmsNormArgs, THREADS, 4) { rms_norm_forward<f16>(args); }
KERNEL(rms_norm_bwd_f32, RmsNormArgs, THREADS, 2) { rms_norm_backward<float>(args); }
KERNEL(rms_norm_bwd_bf16, RmsNormArgs, THREADS, 2) { rms_norm_backward<bf16>(args); }
KERNEL(rms_norm_bwd_f16, RmsNormArgs, THREADS, 2) { rms_norm_backward<f16>(args); }

// The weight's gradient: sums over rows of dy x rstd, block by block; column_sums_add adds these.
struct RmsNormWeightArgs {
    const void* x;      // [T, H]
    const void* dy;     // [T, H]
    const float* rstd;  // [T]
    float* partials;    // [row blocks, H]
    int64_t rows;       // T
    int columns;        // H, a multiple of 16 bytes
    int tiles;          // of columns
};

template <typename T>
DEVICE void rms_norm_weight(const RmsNormWeightArgs& args) {
    const T *xs = static_cast<const T*>(args.x), *dys = static_cast<const T*>(args.dy);
    column_partials<T>(args.partials, args.rows, args.columns, args.tiles, [&](float(&sums)[WIDE<T>], int64_t row, int column) {
        const auto x = load<WIDE<T>>(xs + row * args.columns + column), dy = load<WIDE<T>>(dys + row * args.columns + column);
        const float rstd = args.rstd[row];
        for (int j = 0; j < WIDE<T>; j++) sums[j] += to_f32(dy.v[j]) * (to_f32(x.v[j]) * rstd);
    });
}

KERNEL(rms_norm_weight_f32, RmsNormWeightArgs, COLUMN_THREADS, 4) { rms_norm_weight<float>(args); }
KERNEL(rms_norm_weight_bf16, RmsNormWeightArgs, COLUMN_THREADS, 4) { rms_norm_weight<bf16>(args); }
KERNEL(rms_norm_weight_f16, RmsNormWeightArgs, COLUMN_THREADS, 4) { rms_norm_weight<f16>(args); }
