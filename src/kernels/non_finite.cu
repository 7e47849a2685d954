// The lowest place of what is not finite; non_finite.rs has the specification. A thread looks at LOADS times 16 bytes.
//
// Bytes a value: 4, read. Operations a value: 2, so memory bounds it.
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int LOADS = 4;

struct NonFiniteArgs {
    const float* x;             // [n]
    unsigned long long* fault;  // lowest index of a NaN or an infinity
    int64_t n;
};

KERNEL(non_finite_f32, NonFiniteArgs, THREADS, 6) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int64_t at = ((int64_t(blockIdx.x) * LOADS + i) * THREADS + threadIdx.x) * 4;
        if (at + 4 <= args.n) {
            const auto x = load<4>(args.x + at);
            for (int j = 3; j >= 0; j--)
                if (!is_finite(x.v[j])) report(args.fault, at + j);
        } else {
            for (int64_t j = at; j < args.n; j++)
                if (!is_finite(args.x[j])) report(args.fault, j);
        }
    }
}
