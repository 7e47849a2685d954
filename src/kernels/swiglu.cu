// SwiGLU; swiglu.rs has the specification. A thread takes 16 bytes of the gate and the same of the up half.
//
// Bytes a row of F values of s bytes: forward 3 s F (gate, up; act), backward 5 s F (gate, up, dact; both halves again, in place).
// Operations a value: forward 4, an exponential and a reciprocal; backward 10 and these: about 2 a byte, so memory bounds it.
#include "device.cuh"

constexpr int THREADS = 256;

struct SwigluArgs {
    void* gate_up;   // [T, 2F], rows `stride` elements apart; backward: dgate_up takes its place
    void* act;       // [T, F]; backward: dact, read
    int64_t stride;  // at least 2F, a multiple of 16 bytes as F is
    int columns;     // F
    int tiles;       // blocks a row
};

// 1 / (1 + e^-x)
DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }

template <typename T>
DEVICE void swiglu_forward(const SwigluArgs& args) {
    const int64_t row = int(blockIdx.x) / args.tiles;
    const int at = (int(blockIdx.x) % args.tiles * THREADS + int(threadIdx.x)) * WIDE<T>;
    if (at >= args.columns) return;
    const T* gate_up = static_cast<const T*>(args.gate_up) + row * args.stride + at;
    const auto gate = load<WIDE<T>>(gate_up), up = load<WIDE<T>>(gate_up + args.columns);
    Vec<T, WIDE<T>> act;
#pragma unroll
    for (int j = 0; j < WIDE<T>; j++) {
        const float g = to_f32(gate.v[j]);
        act.v[j] = from_f32<T>(g * sigmoid(g) * to_f32(up.v[j]));
    }
    store(static_cast<T*>(args.act) + row * args.columns + at, act);
}

template <typename T>
DEVICE void swiglu_backward(const SwigluArgs& args) {
    const int64_t row = int(blockIdx.x) / args.tiles;
    const int at = (int(blockIdx.x) % args.tiles * THREADS + int(threadIdx.x)) * WIDE<T>;
    if (at >= args.columns) return;
    T* gate_up = static_cast<T*>(args.gate_up) + row * args.stride + at;
    auto gate = load<WIDE<T>>(gate_up), up = load<WIDE<T>>(gate_up + args.columns);
    const auto dact = load<WIDE<T>>(static_cast<const T*>(args.act) + row * args.columns + at);
#pragma unroll
    for (int j = 0; j < WIDE<T>; j++) {
        const float g = to_f32(gate.v[j]), d = to_f32(dact.v[j]);
        const float s = sigmoid(g);
        gate.v[j] = from_f32<T>(d * to_f32(up.v[j]) * (s * (1.0f + g * (1.0f - s))));
        up.v[j] = from_f32<T>(d * (g * s));
    }
    store(gate_up, gate);
    store(gate_up + args.columns, up);
}

KERNEL(swiglu_fwd_f32, SwigluArgs, THREADS, 6) { swiglu_forward<float>(args); }
KERNEL(swiglu_fwd_bf16, SwigluArgs, THREADS, 6) { swiglu_forward<bf16>(args); }
KERNEL(swiglu_fwd_f16, SwigluArgs, THREADS, 6) { swiglu_forward<f16>(args); }
KERNEL(swiglu_bwd_f32, SwigluArgs, THREADS, 6) { swiglu_backward<float>(args); }
KERNEL(swiglu_bwd_bf16, SwigluArgs, THREADS, 6) { swiglu_backward<bf16>(args); }
KERNEL(swiglu_bwd_f16, SwigluArgs, THREADS, 6) { swiglu_backward<f16>(args); }
