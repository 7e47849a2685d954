// Rotary position embedding in place; rotary.rs has the specification. A thread turns 16 bytes of a head: WIDE / 2 pairs of neighbours.
//
// Bytes a token with K heads of D values of s bytes: s K D (the first half of each head, in and out), and its 2 D of cosines and sines (f32),
// which all heads ask for (2 K D) and memory gives once; each thread asks for the token's position. The second halves and the values are not
// touched.
// Operations a value: 3, below 1 a byte, so memory bounds it.
#include "device.cuh"

constexpr int THREADS = 256;

struct RotaryArgs {
    void* x;                    // [T, n], rows `stride` elements apart, that begin with K heads of D values
    const unsigned* positions;  // [T], below P
    const float* cos;           // [P, D/4]
    const float* sin;           // [P, D/4]
    int64_t stride;             // a multiple of 16 bytes, as D/2 is
    int rows;                   // T
    int heads;                  // K
    int head_dim;               // D
    float sign;                 // -1: by the opposite angles
};

template <typename T>
DEVICE void rotary(const RotaryArgs& args) {
    constexpr int PAIRS = WIDE<T> / 2;
    const int of_head = args.head_dim / 2 / WIDE<T>, of_row = args.heads * of_head;
    const unsigned at = blockIdx.x * unsigned(THREADS) + threadIdx.x;
    const unsigned row = at / unsigned(of_row), in_row = at % unsigned(of_row);
    if (row >= unsigned(args.rows)) return;
    const int head = int(in_row) / of_head, place = int(in_row) % of_head;
    T* x = static_cast<T*>(args.x) + row * args.stride + head * args.head_dim + place * WIDE<T>;
    const int64_t angle = int64_t(args.positions[row]) * (args.head_dim / 4) + place * PAIRS;
    const auto cos = load<PAIRS>(args.cos + angle), sin = load<PAIRS>(args.sin + angle);
    auto values = load<WIDE<T>>(x);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        const float a = to_f32(values.v[2 * i]), b = to_f32(values.v[2 * i + 1]), s = sin.v[i] * args.sign;
        values.v[2 * i] = from_f32<T>(a * cos.v[i] - b * s);
        values.v[2 * i + 1] = from_f32<T>(b * cos.v[i] + a * s);
    }
    store(x, values);
}

KERNEL(rotary_f32, RotaryArgs, THREADS, 6) { rotary<float>(args); }
KERNEL(rotary_bf16, RotaryArgs, THREADS, 6) { rotary<bf16>(args); }
KERNEL(rotary_f16, RotaryArgs, THREADS, 6) { rotary<f16>(args); }
