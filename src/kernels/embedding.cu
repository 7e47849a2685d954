// Rows of the embedding by id, and the sum of their gradients; embedding.rs has the specification.
//
// Bytes: gather and put 2 H s a token of H values of s bytes, and its id, which every thread of a row asks for. scatter_add: H s a token (x), and
// 8 H for each id that occurs (the table's row, f32, in and out); a token's place is asked for by every thread.
// Operations a value: none, and 1: memory bounds both.
#include "device.cuh"

constexpr int THREADS = 256;

struct GatherArgs {
    const void* table;          // [V, H] of any type
    const unsigned* ids;        // [T]
    void* rows;                 // [T, H]
    unsigned long long* fault;  // lowest token whose id is not below V; its row is 0
    int64_t words;              // 16-byte words of a row
    unsigned vocabulary;        // V
    int tiles;                  // blocks a row
};

KERNEL(embedding_gather, GatherArgs, THREADS, 6) {
    const int64_t row = int(blockIdx.x) / args.tiles;
    const int64_t at = int(blockIdx.x) % args.tiles * THREADS + int(threadIdx.x);
    const unsigned id = args.ids[row];
    const bool is_there = id < args.vocabulary;
    if (!is_there && at == 0) report(args.fault, row);
    if (at >= args.words) return;
    Vec<uint32_t, 4> word = {{0, 0, 0, 0}};
    if (is_there) word = load<4>(static_cast<const uint32_t*>(args.table) + (id * args.words + at) * 4);
    store(static_cast<uint32_t*>(args.rows) + (row * args.words + at) * 4, word);
}

struct PutArgs {
    void* table;          // [V, H] of any type
    const unsigned* ids;  // [T], each below V once
    const void* rows;     // [T, H]
    int64_t words;        // 16-byte words of a row
    int tiles;            // blocks a row
    int padding;
};

KERNEL(embedding_put, PutArgs, THREADS, 6) {
    const int64_t row = int(blockIdx.x) / args.tiles;
    const int64_t at = int(blockIdx.x) % args.tiles * THREADS + int(threadIdx.x);
    const unsigned id = args.ids[row];
    if (at >= args.words) return;
    const auto word = load<4>(static_cast<const uint32_t*>(args.rows) + (row * args.words + at) * 4);
    store(static_cast<uint32_t*>(args.table) + (id * args.words + at) * 4, word);
}

// A segment are the tokens of one id, in their order.
struct ScatterArgs {
    float* table;           // [V, H], to which is added
    const void* x;          // [T, H]
    const unsigned* ids;    // [S], each below V once
    const unsigned* ends;   // [S], in `order`: a segment begins where the one before ends
    const unsigned* order;  // [T]: tokens, segment by segment
    int64_t columns;        // H, a multiple of 16 bytes of x
    int tiles;              // blocks a segment
    int padding;
};

template <typename T>
DEVICE void scatter_add(const ScatterArgs& args) {
    const int64_t segment = int(blockIdx.x) / args.tiles;
    const int64_t at = (int(blockIdx.x) % args.tiles * THREADS + int(threadIdx.x)) * WIDE<T>;
    if (at >= args.columns) return;
    float* table = args.table + args.ids[segment] * args.columns + at;
    const unsigned begin = segment == 0 ? 0 : args.ends[segment - 1], end = args.ends[segment];
    Vec<float, 4> sums[WIDE<T> / 4];
#pragma unroll
    for (int i = 0; i < WIDE<T> / 4; i++) sums[i] = load<4>(table + 4 * i);
    for (unsigned token = begin; token < end; token++) {
        const auto x = load<WIDE<T>>(static_cast<const T*>(args.x) + args.order[token] * args.columns + at);
#pragma unroll
        for (int j = 0; j < WIDE<T>; j++) sums[j / 4].v[j % 4] += to_f32(x.v[j]);
    }
#pragma unroll
    for (int i = 0; i < WIDE<T> / 4; i++) store(table + 4 * i, sums[i]);
}

KERNEL(embedding_scatter_add_f32, ScatterArgs, THREADS, 4) { scatter_add<float>(args); }
KERNEL(embedding_scatter_add_bf16, ScatterArgs, THREADS, 4) { scatter_add<bf16>(args); }
KERNEL(embedding_scatter_add_f16, ScatterArgs, THREADS, 4) { scatter_add<f16>(args); }
