// Additions and scalings; elementwise.rs has the specification. A thread takes 16 bytes of x.
//
// Bytes a value of s bytes: add s + 8 (x; the f32 sum in and out), add_same 3 s, scale 2 s, cast s + 4, scale_columns 2 s (and the 4 of a factor,
// from L2).
// Operations a value: 1, so memory bounds them.
#include "device.cuh"

constexpr int THREADS = 256;

struct AddArgs {
    float* sum;     // [n]
    const void* x;  // [n]
    int64_t n;
};

template <typename T>
DEVICE void add(const AddArgs& args) {
    const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * WIDE<T>;
    const T* x = static_cast<const T*>(args.x);
    if (at + WIDE<T> <= args.n) {
        const auto values = load<WIDE<T>>(x + at);
#pragma unroll
        for (int i = 0; i < WIDE<T> / 4; i++) {
            auto sum = load<4>(args.sum + at + 4 * i);
            for (int j = 0; j < 4; j++) sum.v[j] += to_f32(values.v[4 * i + j]);
            store(args.sum + at + 4 * i, sum);
        }
    } else {
        for (int64_t i = at; i < args.n; i++) args.sum[i] += to_f32(x[i]);
    }
}

KERNEL(add_f32, AddArgs, THREADS, 6) { add<float>(args); }
KERNEL(add_bf16, AddArgs, THREADS, 6) { add<bf16>(args); }
KERNEL(add_f16, AddArgs, THREADS, 6) { add<f16>(args); }

struct AddSameArgs {
    void* sum;      // [n]
    const void* x;  // [n]
    int64_t n;
};

// The sum of two 16-bit floats, rounded once.
template <typename T>
DEVICE void add_same(const AddSameArgs& args) {
    const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * WIDE<T>;
    T* sum = static_cast<T*>(args.sum);
    const T* x = static_cast<const T*>(args.x);
    if (at + WIDE<T> <= args.n) {
        auto sums = load<WIDE<T>>(sum + at);
        const auto values = load<WIDE<T>>(x + at);
#pragma unroll
        for (int i = 0; i < WIDE<T>; i++) sums.v[i] = from_f32<T>(to_f32(sums.v[i]) + to_f32(values.v[i]));
        store(sum + at, sums);
    } else {
        for (int64_t i = at; i < args.n; i++) sum[i] = from_f32<T>(to_f32(sum[i]) + to_f32(x[i]));
    }
}

KERNEL(add_same_bf16, AddSameArgs, THREADS, 6) { add_same<bf16>(args); }
KERNEL(add_same_f16, AddSameArgs, THREADS, 6) { add_same<f16>(args); }

struct ScaleArgs {
    void* x;  // [n]
    int64_t n;
    float factor;
    int padding;
};

template <typename T>
DEVICE void scale(const ScaleArgs& args) {
    const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * WIDE<T>;
    T* x = static_cast<T*>(args.x);
    if (at + WIDE<T> <= args.n) {
        auto values = load<WIDE<T>>(x + at);
#pragma unroll
        for (int i = 0; i < WIDE<T>; i++) values.v[i] = from_f32<T>(to_f32(values.v[i]) * args.factor);
        store(x + at, values);
    } else {
        for (int64_t i = at; i < args.n; i++) x[i] = from_f32<T>(to_f32(x[i]) * args.factor);
    }
}

KERNEL(scale_f32, ScaleArgs, THREADS, 6) { scale<float>(args); }
KERNEL(scale_bf16, ScaleArgs, THREADS, 6) { scale<bf16>(args); }
KERNEL(scale_f16, ScaleArgs, THREADS, 6) { scale<f16>(args); }

struct CastArgs {
    const float* x;  // [n]
    void* y;         // [n]
    int64_t n;
};

template <typename T>
DEVICE void cast(const CastArgs& args) {
    const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * WIDE<T>;
    T* y = static_cast<T*>(args.y);
    if (at + WIDE<T> <= args.n) {
        Vec<T, WIDE<T>> values;
#pragma unroll
        for (int i = 0; i < WIDE<T> / 4; i++) {
            const auto x = load<4>(args.x + at + 4 * i);
            for (int j = 0; j < 4; j++) values.v[4 * i + j] = from_f32<T>(x.v[j]);
        }
        store(y + at, values);
    } else {
        for (int64_t i = at; i < args.n; i++) y[i] = from_f32<T>(args.x[i]);
    }
}

KERNEL(cast_bf16, CastArgs, THREADS, 6) { cast<bf16>(args); }
KERNEL(cast_f16, CastArgs, THREADS, 6) { cast<f16>(args); }

struct ScaleColumnsArgs {
    const void* x;         // [T, n]
    const float* factors;  // [n]
    void* y;               // [T, n]
    int columns;           // n, a multiple of 16 bytes
    int tiles;             // blocks a row
};

template <typename T>
DEVICE void scale_columns(const ScaleColumnsArgs& args) {
    const int64_t row = int(blockIdx.x) / args.tiles;
    const int at = (int(blockIdx.x) % args.tiles * THREADS + int(threadIdx.x)) * WIDE<T>;
    if (at >= args.columns) return;
    auto x = load<WIDE<T>>(static_cast<const T*>(args.x) + row * args.columns + at);
#pragma unroll
    for (int i = 0; i < WIDE<T> / 4; i++) {
        const auto factors = load<4>(args.factors + at + 4 * i);
        for (int j = 0; j < 4; j++) x.v[4 * i + j] = from_f32<T>(to_f32(x.v[4 * i + j]) * factors.v[j]);
    }
    store(static_cast<T*>(args.y) + row * args.columns + at, x);
}

KERNEL(scale_columns_f32, ScaleColumnsArgs, THREADS, 6) { scale_columns<float>(args); }
KERNEL(scale_columns_bf16, ScaleColumnsArgs, THREADS, 6) { scale_columns<bf16>(args); }
KERNEL(scale_columns_f16, ScaleColumnsArgs, THREADS, 6) { scale_columns<f16>(args); }
