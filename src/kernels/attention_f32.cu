// Attention in f32 without tensor cores; attention.rs has the specification, attention.cuh the arguments and attention.cu the tiles and orders.
// A warp a query (dk, dv: a key) and head: a lane has the score of one of 32 keys at a time, then D / 32 neighbouring values of the result.
//
// Made for checks and small models: every operand comes from L1 or L2 again and again, 4 to 8 D operations a pair at half an operation a byte;
// no shared memory. bwd_rows reads 4 R bytes and writes 4 for each of 2 G P D values: a quarter of an operation a byte, memory bounds it.
#include "attention.cuh"

template <int D>
DEVICE float dot(const float* a, const float* b) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < D; i += 4) {
        const auto x = load<4>(a + i), y = load<4>(b + i);
        for (int j = 0; j < 4; j++) sum += x.v[j] * y.v[j];
    }
    return sum;
}

// A lane's part of a row of D values.
template <int D>
using Part = Vec<float, D / WARP>;

template <int D>
DEVICE void add_scaled(Part<D>& c, float weight, const float* row) {
    const auto x = load<D / WARP>(row + threadIdx.x % WARP * (D / WARP));
    for (int i = 0; i < D / WARP; i++) c.v[i] += weight * x.v[i];
}

template <int D>
DEVICE void store_scaled(float* to, Part<D> c, float factor) {
    for (int i = 0; i < D / WARP; i++) c.v[i] *= factor;
    store(to + threadIdx.x % WARP * (D / WARP), c);
}

template <int D>
DEVICE void forward(const AttentionArgs& args) {
    const int head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile = args.tiles[blockIdx.y];
    const Row<float, D> row(args, tile.row, head / (args.num_heads / args.num_groups));
    for (int i = tile.first + warp; i < min_of(tile.first + TILE, row.len); i += WARPS) {
        const float* q = row.query(i, head);
        const int num_keys = row.prefix + i + 1;
        Part<D> out = {};
        float max = NEG_INFINITY, sum = 0.0f;
        for (int first = 0; first < num_keys; first += WARP) {
            const int j = first + lane;
            const float s = j < num_keys ? dot<D>(q, row.key(j)) * args.scale : NEG_INFINITY;
            const float larger = fmaxf(max, warp_max(s)), factor = fast_exp(max - larger), p = fast_exp(s - larger);
            max = larger;
            sum = sum * factor + warp_sum(p);
            for (int c = 0; c < D / WARP; c++) out.v[c] *= factor;
            for (int l = 0; l < min_of(WARP, num_keys - first); l++) add_scaled<D>(out, __shfl_sync(ALL_LANES, p, l), row.value(first + l));
        }
        const int64_t at = (row.start + i) * args.num_heads + head;
        store_scaled<D>(static_cast<float*>(args.out) + at * D, out, 1.0f / sum);
        if (lane == 0) args.lse[at] = max + fast_log2(sum) * LN_2;
    }
}

// Probability and gradient of one score.
struct Score {
    float p, ds;
};

template <int D>
DEVICE Score score(const AttentionArgs& args, const Row<float, D>& row, int head, int i, int j) {
    const int64_t at = (row.start + i) * args.num_heads + head;
    const float p = fast_exp(dot<D>(row.query(i, head), row.key(j)) * args.scale - args.lse[at]);
    return {p, p * (dot<D>(static_cast<const float*>(args.dout) + at * D, row.value(j)) - args.delta[at])};
}

template <int D>
DEVICE void backward_query(const AttentionArgs& args) {
    const int head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile = args.tiles[blockIdx.y];
    const Row<float, D> row(args, tile.row, head / (args.num_heads / args.num_groups));
    for (int i = tile.first + warp; i < min_of(tile.first + TILE, row.len); i += WARPS) {
        const int num_keys = row.prefix + i + 1;
        Part<D> dq = {};
        for (int first = 0; first < num_keys; first += WARP) {
            const float ds = first + lane < num_keys ? score<D>(args, row, head, i, first + lane).ds : 0.0f;
            for (int l = 0; l < min_of(WARP, num_keys - first); l++) add_scaled<D>(dq, __shfl_sync(ALL_LANES, ds, l), row.key(first + l));
        }
        store_scaled<D>(static_cast<float*>(args.dqkv) + (row.start + i) * args.dqkv_stride + head * D, dq, args.scale);
    }
}

template <int D>
DEVICE void backward_key(const AttentionArgs& args) {
    const int group = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, sharing = args.num_heads / args.num_groups;
    const Tile tile = args.tiles[blockIdx.y];
    const Row<float, D> row(args, tile.row, group);
    const float* dout = static_cast<const float*>(args.dout);
    for (int j = tile.first + warp; j < min_of(tile.first + TILE, row.prefix + row.len); j += WARPS) {
        const int own = j - row.prefix;
        if (own >= 0 && !args.dqkv) continue;
        Part<D> dk = {}, dv = {};
        for (int head = group * sharing; head < (group + 1) * sharing; head++) {
            for (int first = max_of(own, 0); first < row.len; first += WARP) {
                const Score x = first + lane < row.len ? score<D>(args, row, head, first + lane, j) : Score{0.0f, 0.0f};
                for (int l = 0; l < min_of(WARP, row.len - first); l++) {
                    add_scaled<D>(dv, __shfl_sync(ALL_LANES, x.p, l), dout + ((row.start + first + l) * args.num_heads + head) * D);
                    add_scaled<D>(dk, __shfl_sync(ALL_LANES, x.ds, l), row.query(first + l, head));
                }
            }
        }
        const int64_t at = ((int64_t(tile.row) * args.num_groups + group) * row.prefix + j) * D;
        float* token = static_cast<float*>(args.dqkv) + (row.start + own) * args.dqkv_stride;
        store_scaled<D>(own < 0 ? args.dprefix_k + at : token + (args.num_heads + group) * D, dk, args.scale);
        store_scaled<D>(own < 0 ? args.dprefix_v + at : token + (args.num_heads + args.num_groups + group) * D, dv, 1.0f);
    }
}

struct AttentionRowsArgs {
    const float* dprefix_k;  // [R, size]
    const float* dprefix_v;
    float* dk;  // [size]
    float* dv;
    int64_t size;  // G P D, a multiple of 4
    int64_t num_rows;
};

// Sums each row's gradient of one prefix, in the order of rows; blockIdx.y chooses k or v.
KERNEL(attention_bwd_rows_f32, AttentionRowsArgs, THREADS, 8) {
    const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * 4;
    if (at >= args.size) return;
    const float* from = blockIdx.y == 0 ? args.dprefix_k : args.dprefix_v;
    Vec<float, 4> sum = load<4>(from + at);
    for (int64_t row = 1; row < args.num_rows; row++) {
        const auto x = load<4>(from + row * args.size + at);
        for (int i = 0; i < 4; i++) sum.v[i] += x.v[i];
    }
    store((blockIdx.y == 0 ? args.dk : args.dv) + at, sum);
}

KERNEL(attention_fwd_d64_f32, AttentionArgs, THREADS, 4) { forward<64>(args); }
KERNEL(attention_fwd_d128_f32, AttentionArgs, THREADS, 4) { forward<128>(args); }
KERNEL(attention_bwd_delta_d64_f32, AttentionArgs, THREADS, 8) { attention_delta<float, 64>(args); }
KERNEL(attention_bwd_delta_d128_f32, AttentionArgs, THREADS, 8) { attention_delta<float, 128>(args); }
KERNEL(attention_bwd_query_d64_f32, AttentionArgs, THREADS, 4) { backward_query<64>(args); }
KERNEL(attention_bwd_query_d128_f32, AttentionArgs, THREADS, 4) { backward_query<128>(args); }
KERNEL(attention_bwd_key_d64_f32, AttentionArgs, THREADS, 4) { backward_key<64>(args); }
KERNEL(attention_bwd_key_d128_f32, AttentionArgs, THREADS, 4) { backward_key<128>(args); }
