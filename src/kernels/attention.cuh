// What the kernels of attention.cu and attention_f32.cu share: arguments, and where the values of a row are.
//
// Shapes: T tokens, R rows, N query heads, G groups, D head dim, P prefix length. A row's keys are counted from its prefix on: key j < P is the
// prefix's, key j >= P the row's own token j - P. Query i sees keys 0 to P + i.
#pragma once
#include "device.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
// Queries of a block (forward, dq) or keys of a block (dk, dv).
constexpr int TILE = 64;

struct Tile {
    int row, first;  // first query, or first key, in the row's count
};

struct AttentionArgs {
    const void* qkv;       // [T, N + 2 G, D], tokens qkv_stride apart
    const void* prefix_k;  // [G, P, D] for all rows, or prefix_stride apart
    const void* prefix_v;
    void* out;           // [T, N, D]
    float* lse;          // [T, N], of the scaled scores
    const void* dout;    // [T, N, D]
    float* delta;        // [T, N], sum of dout * out over D
    void* dqkv;          // as qkv, tokens dqkv_stride apart; null: not wanted
    float* dprefix_k;    // [R, G, P, D], each row's own
    float* dprefix_v;
    const Tile* tiles;   // [gridDim.y]
    const int* bounds;   // [R + 1]: row r is tokens bounds[r] to bounds[r + 1]
    int64_t qkv_stride;  // all strides in elements
    int64_t dqkv_stride;
    int64_t prefix_stride;
    int num_heads, num_groups, prefix_len, num_tokens;
    float scale;
    int padding;
};

// One row, its keys of one group.
template <typename T, int D>
struct Row {
    const T *qkv, *k, *v, *prefix_k, *prefix_v;
    int64_t stride, start;
    int len, prefix;

    DEVICE Row(const AttentionArgs& args, int row, int group) {
        start = args.bounds[row];
        len = args.bounds[row + 1] - int(start);
        prefix = args.prefix_len;
        stride = args.qkv_stride;
        qkv = static_cast<const T*>(args.qkv) + start * stride;
        k = qkv + (args.num_heads + group) * D;
        v = k + args.num_groups * D;
        const int64_t at = row * args.prefix_stride + int64_t(group) * prefix * D;
        prefix_k = static_cast<const T*>(args.prefix_k) + at;
        prefix_v = static_cast<const T*>(args.prefix_v) + at;
    }
    DEVICE const T* query(int i, int head) const { return qkv + i * stride + head * D; }
    DEVICE const T* key(int j) const { return j < prefix ? prefix_k + j * D : k + (j - prefix) * stride; }
    DEVICE const T* value(int j) const { return j < prefix ? prefix_v + j * D : v + (j - prefix) * stride; }
};

// delta [T, N] = sum of dout * out over D: D / WIDE neighbouring lanes a sum.
template <typename T, int D>
DEVICE void attention_delta(const AttentionArgs& args) {
    constexpr int LANES = D / WIDE<T>;
    const int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    const bool is_there = at / LANES < int64_t(args.num_tokens) * args.num_heads;
    float sum = 0.0f;
    if (is_there) {
        const auto dout = load<WIDE<T>>(static_cast<const T*>(args.dout) + at * WIDE<T>);
        const auto out = load<WIDE<T>>(static_cast<const T*>(args.out) + at * WIDE<T>);
        for (int i = 0; i < WIDE<T>; i++) sum += to_f32(dout.v[i]) * to_f32(out.v[i]);
    }
    for (int lane = LANES / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lane);
    if (is_there && at % LANES == 0) args.delta[at / LANES] = sum;
}
