// tanh and its gradient; tanh.rs has the specification. A thread takes 4 values.
//
// Bytes a value: fwd 8, bwd 12. Operations a value: about 15 and 3, so memory bounds it.
#include "device.cuh"

constexpr int THREADS = 256;

struct TanhArgs {
    const float* x;   // [n]; backward y
    const float* dy;  // [n], backward
    float* out;       // [n]
    int64_t n;
};

// Near 0 the series that Cephes has (Moshier, tanhf), for 1 - 2 / (e^2x + 1) would cancel there.
DEVICE float tanh_of(float x) {
    const float size = fabsf(x), square = x * x;
    if (size < 0.625f) {
        float sum = -5.70498872745e-3f;
        sum = sum * square + 2.06390887954e-2f;
        sum = sum * square - 5.37397155531e-2f;
        sum = sum * square + 1.33314422036e-1f;
        sum = sum * square - 3.33332819422e-1f;
        return sum * square * x + x;
    }
    const float y = 1.0f - 2.0f * fast_reciprocal(fast_exp(2.0f * size) + 1.0f);
    return x < 0.0f ? -y : y;
}

template <typename F>
DEVICE void each(const TanhArgs& args, F value) {
    const int64_t first = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * 4;
    for (int64_t i = first; i < first + 4 && i < args.n; i++) args.out[i] = value(i);
}

KERNEL(tanh_fwd_f32, TanhArgs, THREADS, 6) {
    each(args, [&](int64_t i) { return tanh_of(args.x[i]); });
}
KERNEL(tanh_bwd_f32, TanhArgs, THREADS, 6) {
    each(args, [&](int64_t i) { return args.dy[i] * (1.0f - args.x[i] * args.x[i]); });
}
