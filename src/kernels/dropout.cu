// Keyed dropout of packed rows, and a trainable prefix with it; dropout.rs and prefix.rs have the specification. The masks have the bits of the CPU's.
//
// Shapes: T packed tokens, R rows, C channels, P prefix length, L layers, G groups, D head dim. A table row is [layer 0 K | layer 0 V | ...], G D each.
// Bytes a value of s bytes: dropout 2 s (and each thread asks for its row's bounds, log2 R of them); prefix_expand 4 (the table) + s; prefix_sum 4 a
// row's value, and 8 (the gradient in and out).
// Operations a value: 10 rounds of Philox for 4 of them, about 25 each.
#include "philox.cuh"

constexpr int THREADS = 256;

struct DropoutArgs {
    const void* x;              // [T, C], C a multiple of 16 bytes
    void* y;                    // [T, C], may be x
    const unsigned* bounds;     // [R + 1]
    const uint64_t* positions;  // [R] of the rows in the training stream
    int64_t words;              // 16-byte words in all
    int columns;                // C
    int rows;                   // R
    Key key;
    unsigned stream;
    unsigned place;  // below 2^12, joined to a position
    float p, kept;
};

template <typename T>
DEVICE void dropout(const DropoutArgs& args) {
    const int64_t word = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (word >= args.words) return;
    const int a_row = args.columns / WIDE<T>;
    const unsigned token = unsigned(word / a_row);
    const int channel = int(word % a_row) * WIDE<T>;
    int lo = 0, hi = args.rows;  // bounds[lo] <= token < bounds[hi]
    while (hi - lo > 1) {
        const int middle = (lo + hi) / 2;
        if (args.bounds[middle] <= token) {
            lo = middle;
        } else {
            hi = middle;
        }
    }
    const uint64_t index = (args.positions[lo] << 12) + args.place;
    const unsigned blocks = unsigned(args.columns) / 4, first = (token - args.bounds[lo]) * blocks + unsigned(channel) / 4;
    auto x = load<WIDE<T>>(static_cast<const T*>(args.x) + word * WIDE<T>);
#pragma unroll
    for (int i = 0; i < WIDE<T> / 4; i++) {
        const auto bits = philox(first + unsigned(i), args.stream, uint32_t(index), uint32_t(index >> 32), args.key);
        for (int j = 0; j < 4; j++) x.v[4 * i + j] = from_f32<T>(to_f32(x.v[4 * i + j]) * multiplier(bits.v[j], args.p, args.kept));
    }
    store(static_cast<T*>(args.y) + word * WIDE<T>, x);
}

KERNEL(dropout_f32, DropoutArgs, THREADS, 4) { dropout<float>(args); }
KERNEL(dropout_bf16, DropoutArgs, THREADS, 4) { dropout<bf16>(args); }
KERNEL(dropout_f16, DropoutArgs, THREADS, 4) { dropout<f16>(args); }

struct PrefixArgs {
    float* table;               // [P, 2 L G D], or its gradient
    void* k;                    // [R, G, P, D]; f32 where gradients are summed
    void* v;                    // as k
    const uint64_t* positions;  // [R] of the rows in the training stream; null: nothing is dropped
    int rows;                   // R
    int groups;                 // G
    int length;                 // P
    int head_dim;               // D, a multiple of 16 bytes
    int layers;                 // L
    int layer;
    Key key;
    unsigned stream;
    float p, kept;
    int padding;
};

// Where 4 values of the table lie that a thread takes: blockIdx.y is 0 for keys and 1 for values.
DEVICE int64_t in_table(const PrefixArgs& args, int group, int p, int d) {
    const int slot = 2 * args.layer + int(blockIdx.y);
    return ((int64_t(p) * 2 * args.layers + slot) * args.groups + group) * args.head_dim + d;
}

// Multiplies 4 values of the table at `at` with what row `row` keeps of them.
DEVICE void drop(const PrefixArgs& args, int row, int64_t at, Vec<float, 4>& x) {
    if (!args.positions) return;
    const uint64_t index = args.positions[row];
    const auto bits = philox(uint32_t(at / 4), args.stream, uint32_t(index), uint32_t(index >> 32), args.key);
    for (int j = 0; j < 4; j++) x.v[j] = mul_exact(x.v[j], multiplier(bits.v[j], args.p, args.kept));
}

template <typename T>
DEVICE void prefix_expand(const PrefixArgs& args) {
    const int words = args.head_dim / WIDE<T>;
    const int64_t word = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (word >= int64_t(args.rows) * args.groups * args.length * words) return;
    const int d = int(word % words) * WIDE<T>, p = int(word / words % args.length);
    const int group = int(word / words / args.length % args.groups), row = int(word / words / args.length / args.groups);
    const int64_t at = in_table(args, group, p, d);
    Vec<T, WIDE<T>> y;
#pragma unroll
    for (int i = 0; i < WIDE<T> / 4; i++) {
        auto x = load<4>(args.table + at + 4 * i);
        drop(args, row, at + 4 * i, x);
        for (int j = 0; j < 4; j++) y.v[4 * i + j] = from_f32<T>(x.v[j]);
    }
    store(static_cast<T*>(blockIdx.y ? args.v : args.k) + word * WIDE<T>, y);
}

KERNEL(prefix_expand_f32, PrefixArgs, THREADS, 4) { prefix_expand<float>(args); }
KERNEL(prefix_expand_bf16, PrefixArgs, THREADS, 4) { prefix_expand<bf16>(args); }
KERNEL(prefix_expand_f16, PrefixArgs, THREADS, 4) { prefix_expand<f16>(args); }

// Rows are added in their order, each product rounded before it is added: the bits of the CPU's code.
KERNEL(prefix_sum_f32, PrefixArgs, THREADS, 4) {
    const int words = args.head_dim / 4, a_row = args.groups * args.length * words;
    const int word = int(blockIdx.x) * THREADS + int(threadIdx.x);
    if (word >= a_row) return;
    const int d = word % words * 4, p = word / words % args.length, group = word / words / args.length;
    const int64_t at = in_table(args, group, p, d);
    const float* grads = static_cast<const float*>(blockIdx.y ? args.v : args.k);
    auto sum = load<4>(args.table + at);
    for (int row = 0; row < args.rows; row++) {
        auto grad = load<4>(grads + (int64_t(row) * a_row + word) * 4);
        drop(args, row, at, grad);
        for (int j = 0; j < 4; j++) sum.v[j] = add_exact(sum.v[j], grad.v[j]);
    }
    store(args.table + at, sum);
}
