// From a gradient to changed parameters without the host: square sums, norm and factor of clipping, AdamW; adamw.rs has the specification,
// and every result has its bits: square sums are added in its order, and of AdamW's operations those alone are fused that it fuses.
//
// Bytes a value: square_sums 4; adamw_step 28 (p, m, v, g; p, m, v), with masters 30 (and the parameter in bf16).
// Operations a value: square_sums 2 in double (and a conversion), which a GPU with few double units does about as fast as its memory gives
// values; adamw_step 14 with a root and two divisions, below 1 a byte: memory bounds it. norm adds one double a 16384 values, one by one.
//
// shared: norm_f64 1024 * 8
#include "device.cuh"

constexpr int CHUNK = 16384;
// Sums side by side in a chunk, a thread each: 32 bytes of neighbours, a sector of memory.
constexpr int LANES = 8;
constexpr int SUM_THREADS = 128;

struct SquareSumsArgs {
    const float* x;  // [n]
    double* sums;    // [chunks]
    int64_t n;
};

KERNEL(square_sums_f32, SquareSumsArgs, SUM_THREADS, 8) {
    const int64_t chunk = (int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x) / LANES;
    const int lane = int(threadIdx.x) % LANES;
    const int64_t start = chunk * CHUNK, left = args.n - start;
    const int len = left < CHUNK ? int(left) : CHUNK;  // not above 0 behind the last chunk
    const float* x = args.x + start;
    double sum = 0.0;
#pragma unroll 8
    for (int i = lane; i < len / LANES * LANES; i += LANES) {
        const float value = x[i];
        sum += double(value) * double(value);
    }
    double total = 0.0;
    for (int i = 0; i < LANES; i++) total += __shfl_sync(ALL_LANES, sum, int(threadIdx.x) % WARP / LANES * LANES + i);
    if (lane == 0 && len > 0) {
        double rest = 0.0;
        for (int i = len / LANES * LANES; i < len; i++) rest += double(x[i]) * double(x[i]);
        args.sums[chunk] = total + rest;
    }
}

constexpr int NORM_THREADS = 256;
constexpr int STAGED = 1024;

struct NormArgs {
    const double* sums;  // [chunks], in their order; of all shards
    double* norm;        // [1]
    float* factor;       // [1]: what the gradient is to be multiplied by, at most 1; NaN where the norm is not finite
    int64_t chunks;
    double max_norm;     // infinity: no clipping
};

KERNEL(norm_f64, NormArgs, NORM_THREADS, 1) {
    double* staged = reinterpret_cast<double*>(shared_memory());
    double total = 0.0;
    for (int64_t first = 0; first < args.chunks; first += STAGED) {
        const int len = args.chunks - first < STAGED ? int(args.chunks - first) : STAGED;
        for (int i = int(threadIdx.x); i < len; i += NORM_THREADS) staged[i] = args.sums[first + i];
        __syncthreads();  // staged is there
        if (threadIdx.x == 0) {
            for (int i = 0; i < len; i++) total += staged[i];
        }
        __syncthreads();  // staged is free again
    }
    if (threadIdx.x == 0) {
        const double norm = sqrt_exact(total);
        const double factor = div_exact(args.max_norm, norm + 1e-6);
        *args.norm = norm;
        *args.factor = norm < double(INFINITY) ? (factor < 1.0 ? float(factor) : 1.0f) : not_a_number();
    }
}

constexpr int STEP_THREADS = 256;

struct AdamWArgs {
    float* p;             // [n], the masters where there are
    float* m;             // [n]
    float* v;             // [n]
    const float* g;       // [n], not yet clipped
    bf16* rounded;        // [n]: the masters rounded; null in adamw_step_f32
    const float* factor;  // [1], of clipping; where it is NaN nothing changes
    int64_t n;
    float weight1, keep2, weight2, keep, step_size, correction, epsilon;
    uint32_t padding;
};

DEVICE void adamw_element(const AdamWArgs& args, float factor, float& p, float& m, float& v, float g) {
    g = mul_exact(g, factor);
    const float away = add_exact(g, -m);
    m = args.weight1 < 0.5f ? fma_exact(args.weight1, away, m) : fma_exact(args.weight1 - 1.0f, away, g);
    v = fma_exact(mul_exact(args.weight2, g), g, mul_exact(v, args.keep2));
    const float size = add_exact(div_exact(sqrt_exact(v), args.correction), args.epsilon);
    p = add_exact(mul_exact(p, args.keep), div_exact(mul_exact(args.step_size, m), size));
}

template <bool MASTERS>
DEVICE void adamw_step(const AdamWArgs& args) {
    const float factor = *args.factor;
    if (!is_finite(factor)) return;
    const int64_t at = (int64_t(blockIdx.x) * STEP_THREADS + threadIdx.x) * 4;
    if (at + 4 <= args.n) {
        auto p = load<4>(args.p + at), m = load<4>(args.m + at), v = load<4>(args.v + at);
        const auto g = load<4>(args.g + at);
#pragma unroll
        for (int j = 0; j < 4; j++) adamw_element(args, factor, p.v[j], m.v[j], v.v[j], g.v[j]);
        store(args.p + at, p);
        store(args.m + at, m);
        store(args.v + at, v);
        if (MASTERS) {
            Vec<bf16, 4> rounded;
            for (int j = 0; j < 4; j++) rounded.v[j] = from_f32<bf16>(p.v[j]);
            store(args.rounded + at, rounded);
        }
    } else {
        for (int64_t i = at; i < args.n; i++) {
            float p = args.p[i], m = args.m[i], v = args.v[i];
            adamw_element(args, factor, p, m, v, args.g[i]);
            args.p[i] = p;
            args.m[i] = m;
            args.v[i] = v;
            if (MASTERS) args.rounded[i] = from_f32<bf16>(p);
        }
    }
}

KERNEL(adamw_step_f32, AdamWArgs, STEP_THREADS, 4) { adamw_step<false>(args); }
KERNEL(adamw_step_bf16, AdamWArgs, STEP_THREADS, 4) { adamw_step<true>(args); }
