// Attention on tensor cores, bf16 and f16; attention.rs has the specification, attention.cuh the arguments. After FlashAttention-2
// (Dao 2023, arXiv:2307.08691), without atomics: dq and dk, dv are sums of different blocks, each in an order that depends on sizes alone.
//
// A row's keys are its prefix's and then its own in one sequence, so that a short prefix costs no tile of its own, and one comparison is
// the mask. Blocks of 4 warps; a warp has 16 queries (dk, dv: 16 keys) in the rows of its fragments, sums in f32 registers. Probabilities
// and their gradients are rounded to the type for the second product, as a tensor core wants. Tiles are copied one stage ahead, swizzled.
//
// kernel      grid              loop over                              operations a pair       shared memory (D = 64, 128)
// fwd         N x query tiles   keys, 64 or 32 a stage                 4 D                     40, 48 KiB
// bwd_delta   T N D             -                                      2 D a query and head    -
// bwd_query   N x query tiles   keys, 64 or 32 a stage                 6 D                     40, 48 KiB
// bwd_key     G x key tiles     heads of the group, in them queries    8 D                     41, 48.5 KiB
// A pair is a query, a head and a key that it sees; a row of L tokens has N L (P + (L + 1) / 2). Masked tiles are skipped by warp.
//
// Bytes, of values of s bytes, if what blocks share stays in L2. fwd: s D (N + 2 G) + s D N + 4 N a token; prefix: 2 s G P D once.
// bwd_delta: 2 s D N + 4 N. bwd_query: s D (3 N + 2 G) + 8 N. bwd_key: s D (2 N + 4 G) + 8 N; prefix: 2 s G P D, and 8 G P D a row for
// its gradient. For D = 128, N = 32, G = 2, s = 2, P = 128, L = 512 fwd has 360 operations a byte, bwd_query 365, bwd_key 670: arithmetic
// bounds them. From L2 a block of fwd takes 2 s D bytes a key for 4 D TILE operations: 64 a byte. bwd_delta has half an operation a byte:
// memory bounds it.
//
// shared: attention_bwd_key_d64_* 128 * 64 + 32768 + 1024
// shared: attention_bwd_key_d128_* 128 * 128 + 32768 + 512
// shared: *_d64_* 128 * 64 + 32768
// shared: *_d128_* 128 * 128 + 32768
#include "attention.cuh"

// Keys (fwd, bwd_query) or queries (bwd_key) of one stage: 8 KiB a tensor, so that two blocks fit an SM with 100 KiB.
template <int D>
constexpr int STAGE = 4096 / D;

// Where 8 elements are in a tile of shared memory: eight rows' chunks of one column lie in different banks.
template <int D>
DEVICE int swizzled(int row, int chunk) {
    return row * D + (chunk ^ (row & 7)) * 8;
}

// Starts to copy ROWS rows of D elements from source(first) on; zeros from `end` on.
template <int D, int ROWS, typename T, typename Source>
DEVICE void copy_rows(T* to, int first, int end, Source source) {
    constexpr int CHUNKS = D / 8;
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        const int row = (i * THREADS + threadIdx.x) / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const bool is_there = first + row < end;
        copy_async(to + swizzled<D>(row, chunk), source(is_there ? first + row : first) + chunk * 8, is_there);
    }
}

// Starts to copy ROWS keys and behind them their values.
template <int D, int ROWS, typename T>
DEVICE void copy_keys(T* to, const Row<T, D>& row, int first, int end) {
    copy_rows<D, ROWS>(to, first, end, [&](int j) { return row.key(j); });
    copy_rows<D, ROWS>(to + ROWS * D, first, end, [&](int j) { return row.value(j); });
    copy_async_commit();
}

// All copies that the block has started are there, and all warps are done with what they read before.
DEVICE void wait_for_copies() {
    copy_async_wait<0>();
    __syncthreads();
}

// Lane's row of: fragment a of rows `row` to row + 15 and columns 8 chunk to 8 chunk + 15; transposed, two fragments b of 16 rows and
// 8 columns.
template <int D, typename T>
DEVICE const T* fragment_row(const T* tile, int row, int chunk) {
    const int lane = threadIdx.x % WARP;
    return tile + swizzled<D>(row + lane % 16, chunk + lane / 16);
}

// Fragments a of a tile's rows `row` to row + 15 that is being copied; then its memory is free.
template <int D, typename T>
DEVICE void take_fragments(uint32_t (&fragments)[D / 16][4], const T* tile, int row) {
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < D / 16; i++) load_matrices(fragments[i], fragment_row<D>(tile, row, 2 * i));
    __syncthreads();
}

// c [16, COLUMNS] += a [16, D] b [COLUMNS, D]^T, b in shared memory; a(chunk, fragment) gives columns from 8 chunk on.
template <int D, int COLUMNS, typename T, typename A>
DEVICE void multiply_transposed(float (&c)[COLUMNS / 8][4], A a, const T* b) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int chunk = 0; chunk < D / 8; chunk += 2) {
        uint32_t left[4];
        a(chunk, left);
#pragma unroll
        for (int n = 0; n < COLUMNS; n += 16) {
            uint32_t right[4];
            load_matrices(right, b + swizzled<D>(n + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
            const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
            mma_16_8_16<T>(c[n / 8], left, even);
            mma_16_8_16<T>(c[n / 8 + 1], left, odd);
        }
    }
}

// c [16, D] += a [16, ROWS] b [ROWS, D], a rounded from f32, b in shared memory.
template <int D, int ROWS, typename T>
DEVICE void multiply(float (&c)[D / 8][4], const float (&a)[ROWS / 8][4], const T* b) {
#pragma unroll
    for (int k = 0; k < ROWS / 8; k += 2) {
        const uint32_t left[4] = {pack<T>(a[k][0], a[k][1]), pack<T>(a[k][2], a[k][3]), pack<T>(a[k + 1][0], a[k + 1][1]),
                                  pack<T>(a[k + 1][2], a[k + 1][3])};
#pragma unroll
        for (int chunk = 0; chunk < D / 8; chunk += 2) {
            uint32_t right[4];
            load_matrices_transposed(right, fragment_row<D>(b, k * 8, chunk));
            const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
            mma_16_8_16<T>(c[chunk], left, even);
            mma_16_8_16<T>(c[chunk + 1], left, odd);
        }
    }
}

// Writes c [16, D], upper and lower half times their `factor`, row r to target(r) where that is not null: 16 bytes at a time by way of
// `staging` [16, D], shared memory that this warp alone uses.
template <int D, typename T, typename Target>
DEVICE void store_rows(T* staging, const float (&c)[D / 8][4], const float (&factor)[2], Target target) {
    const int lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < D / 8; chunk++) {
        for (int half = 0; half < 2; half++) {
            const uint32_t pair = pack<T>(c[chunk][2 * half] * factor[half], c[chunk][2 * half + 1] * factor[half]);
            T* to = staging + swizzled<D>(lane / 4 + 8 * half, chunk) + lane % 4 * 2;
            store(reinterpret_cast<uint32_t*>(to), Vec<uint32_t, 1>{{pair}});
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * D / 8 / WARP; i++) {
        const int row = (i * WARP + lane) / (D / 8), chunk = lane % (D / 8);
        T* to = target(row);
        const T* from = staging + swizzled<D>(row, chunk);
        if (to) store(reinterpret_cast<uint32_t*>(to + chunk * 8), load<4>(reinterpret_cast<const uint32_t*>(from)));
    }
}

// Over the four lanes that share a fragment's row.
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}
DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Scores of keys from `first` on in the columns: the fragment's first row sees keys up to `last`, each other one more.
template <int KEYS>
DEVICE void mask(float (&s)[KEYS / 8][4], int first, int last) {
    if (first + KEYS - 1 <= last) return;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
        for (int i = 0; i < 4; i++) {
            const int key = first + n * 8 + lane % 4 * 2 + i % 2;
            if (key > last + lane / 4 + i / 2 * 8) s[n][i] = NEG_INFINITY;
        }
    }
}

// Output and log-sum-exp of a tile of queries of one head.
template <typename T, int D>
DEVICE void attention_forward(const AttentionArgs& args) {
    constexpr int KEYS = STAGE<D>;
    T* q = reinterpret_cast<T*>(shared_memory());
    T* stages = q + TILE * D;
    const int head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile = args.tiles[blockIdx.y];
    const Row<T, D> row(args, tile.row, head / (args.num_heads / args.num_groups));
    const int num_keys = row.prefix + min_of(tile.first + TILE, row.len);
    copy_rows<D, TILE>(q, tile.first, row.len, [&](int i) { return row.query(i, head); });
    copy_keys<D, KEYS>(stages, row, 0, num_keys);
    // The warp's first query, and the last key that it sees.
    const int query = tile.first + warp * 16, last = row.prefix + query;
    const float scale = args.scale * LOG2_E;
    float out[D / 8][4] = {}, max[2] = {NEG_INFINITY, NEG_INFINITY}, sum[2] = {};
    for (int first = 0, stage = 0; first < num_keys; first += KEYS, stage ^= 1) {
        wait_for_copies();
        const T* k = stages + stage * 2 * KEYS * D;
        if (first + KEYS < num_keys) copy_keys<D, KEYS>(stages + (stage ^ 1) * 2 * KEYS * D, row, first + KEYS, num_keys);
        if (first > last + 15) continue;
        float s[KEYS / 8][4] = {};
        multiply_transposed<D, KEYS>(s, [&](int chunk, uint32_t(&a)[4]) { load_matrices(a, fragment_row<D>(q, warp * 16, chunk)); }, k);
        mask<KEYS>(s, first, last);
        float larger[2];
        for (int half = 0; half < 2; half++) {
            float x = max[half];
            for (int n = 0; n < KEYS / 8; n++) x = fmaxf(x, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            larger[half] = row_max(x);
        }
        if (__any_sync(ALL_LANES, larger[0] > max[0] || larger[1] > max[1])) {
            for (int half = 0; half < 2; half++) {
                const float factor = fast_exp2((max[half] - larger[half]) * scale);
                max[half] = larger[half];
                sum[half] *= factor;
                for (int n = 0; n < D / 8; n++) out[n][2 * half] *= factor, out[n][2 * half + 1] *= factor;
            }
        }
        for (int n = 0; n < KEYS / 8; n++) {
            for (int i = 0; i < 4; i++) {
                s[n][i] = fast_exp2((s[n][i] - max[i / 2]) * scale);
                sum[i / 2] += s[n][i];
            }
        }
        multiply<D, KEYS>(out, s, k + KEYS * D);
    }
    float factor[2];
    for (int half = 0; half < 2; half++) {
        sum[half] = row_sum(sum[half]);
        factor[half] = 1.0f / sum[half];
        const int i = query + lane / 4 + 8 * half;
        if (lane % 4 == 0 && i < row.len)
            args.lse[(row.start + i) * args.num_heads + head] = max[half] * args.scale + fast_log2(sum[half]) * LN_2;
    }
    T* to = static_cast<T*>(args.out);
    store_rows<D>(q + warp * 16 * D, out, factor, [&](int r) -> T* {
        return query + r < row.len ? to + ((row.start + query + r) * args.num_heads + head) * D : nullptr;
    });
}

// dq of a tile of queries of one head.
template <typename T, int D>
DEVICE void attention_backward_query(const AttentionArgs& args) {
    constexpr int KEYS = STAGE<D>;
    T* q = reinterpret_cast<T*>(shared_memory());
    T* stages = q + TILE * D;
    const int head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile = args.tiles[blockIdx.y];
    const Row<T, D> row(args, tile.row, head / (args.num_heads / args.num_groups));
    const int num_keys = row.prefix + min_of(tile.first + TILE, row.len);
    const T* dout = static_cast<const T*>(args.dout);
    copy_rows<D, TILE>(q, tile.first, row.len, [&](int i) { return row.query(i, head); });
    copy_rows<D, TILE>(stages, tile.first, row.len, [&](int i) { return dout + ((row.start + i) * args.num_heads + head) * D; });
    copy_async_commit();
    uint32_t dout_fragments[D / 16][4];
    take_fragments<D>(dout_fragments, stages, warp * 16);
    copy_keys<D, KEYS>(stages, row, 0, num_keys);
    const int query = tile.first + warp * 16, last = row.prefix + query;
    const float scale = args.scale * LOG2_E;
    // A query behind the row's end has probability 0 everywhere.
    float lse[2], delta[2];
    for (int half = 0; half < 2; half++) {
        const int i = query + lane / 4 + 8 * half;
        const int64_t at = (row.start + i) * args.num_heads + head;
        lse[half] = i < row.len ? args.lse[at] * LOG2_E : -NEG_INFINITY;
        delta[half] = i < row.len ? args.delta[at] : 0.0f;
    }
    float dq[D / 8][4] = {};
    for (int first = 0, stage = 0; first < num_keys; first += KEYS, stage ^= 1) {
        wait_for_copies();
        const T* k = stages + stage * 2 * KEYS * D;
        if (first + KEYS < num_keys) copy_keys<D, KEYS>(stages + (stage ^ 1) * 2 * KEYS * D, row, first + KEYS, num_keys);
        if (first > last + 15) continue;
        float s[KEYS / 8][4] = {}, ds[KEYS / 8][4] = {};
        multiply_transposed<D, KEYS>(s, [&](int chunk, uint32_t(&a)[4]) { load_matrices(a, fragment_row<D>(q, warp * 16, chunk)); }, k);
        mask<KEYS>(s, first, last);
        multiply_transposed<D, KEYS>(
            ds,
            [&](int chunk, uint32_t(&a)[4]) {
                for (int i = 0; i < 4; i++) a[i] = dout_fragments[chunk / 2][i];
            },
            k + KEYS * D);
        for (int n = 0; n < KEYS / 8; n++) {
            for (int i = 0; i < 4; i++) ds[n][i] = fast_exp2(s[n][i] * scale - lse[i / 2]) * (ds[n][i] - delta[i / 2]);
        }
        multiply<D, KEYS>(dq, ds, k);
    }
    const float factor[2] = {args.scale, args.scale};
    T* to = static_cast<T*>(args.dqkv);
    store_rows<D>(q + warp * 16 * D, dq, factor, [&](int r) -> T* {
        return query + r < row.len ? to + (row.start + query + r) * args.dqkv_stride + head * D : nullptr;
    });
}

// Writes c [16, D] times `factor`, rows of a prefix's gradient from `first` on.
template <int D>
DEVICE void store_prefix(float* to, const float (&c)[D / 8][4], float factor, int first, int end) {
    const int lane = threadIdx.x % WARP;
    for (int half = 0; half < 2; half++) {
        const int row = first + lane / 4 + 8 * half;
        if (row >= end) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            store(to + int64_t(row) * D + n * 8 + lane % 4 * 2, Vec<float, 2>{{c[n][2 * half] * factor, c[n][2 * half + 1] * factor}});
    }
}

// dk and dv of a tile of keys of one group; scores are transposed, a warp's fragments have keys in their rows.
template <typename T, int D>
DEVICE void attention_backward_key(const AttentionArgs& args) {
    constexpr int QUERIES = STAGE<D>;
    T* k = reinterpret_cast<T*>(shared_memory());
    T* stages = k + TILE * D;
    float* numbers = reinterpret_cast<float*>(stages + 4 * QUERIES * D);  // [2 stages] of lse, delta [QUERIES]
    const int group = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile = args.tiles[blockIdx.y];
    const Row<T, D> row(args, tile.row, group);
    const int num_keys = row.prefix + row.len, sharing = args.num_heads / args.num_groups;
    const T* dout = static_cast<const T*>(args.dout);
    copy_keys<D, TILE>(k, row, tile.first, num_keys);  // the values into the stages
    uint32_t v_fragments[D / 16][4];
    take_fragments<D>(v_fragments, stages, warp * 16);
    // The first query that sees a key of the tile, and steps over the heads' tiles of queries from there on.
    const int begin = max_of(tile.first - row.prefix, 0), tiles = div_up(row.len - begin, QUERIES), steps = sharing * tiles;
    auto copy_queries = [&](int step) {
        const int head = group * sharing + step / tiles, first = begin + step % tiles * QUERIES;
        T* to = stages + step % 2 * 2 * QUERIES * D;
        copy_rows<D, QUERIES>(to, first, row.len, [&](int i) { return row.query(i, head); });
        copy_rows<D, QUERIES>(to + QUERIES * D, first, row.len,
                              [&](int i) { return dout + ((row.start + i) * args.num_heads + head) * D; });
        copy_async_commit();
    };
    // A thread's one of a step's lse and delta; a query behind the row's end has probability 0 everywhere.
    auto number_of = [&](int step) {
        const int head = group * sharing + step / tiles, i = begin + step % tiles * QUERIES + threadIdx.x % QUERIES;
        const int64_t at = (row.start + i) * args.num_heads + head;
        if (threadIdx.x < QUERIES) return i < row.len ? args.lse[at] * LOG2_E : -NEG_INFINITY;
        return i < row.len ? args.delta[at] : 0.0f;
    };
    if (steps > 0) {
        copy_queries(0);
        if (threadIdx.x < 2 * QUERIES) numbers[threadIdx.x] = number_of(0);
    }
    const int key = tile.first + warp * 16;
    const bool is_wanted = args.dqkv || key < row.prefix;
    const float scale = args.scale * LOG2_E;
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    for (int step = 0; step < steps; step++) {
        wait_for_copies();
        float next = 0.0f;
        if (step + 1 < steps) {
            copy_queries(step + 1);
            if (threadIdx.x < 2 * QUERIES) next = number_of(step + 1);
        }
        const int first = begin + step % tiles * QUERIES;
        const T* q = stages + step % 2 * 2 * QUERIES * D;
        const float* lse = numbers + step % 2 * 2 * QUERIES;
        if (is_wanted && row.prefix + first + QUERIES - 1 >= key) {
            float s[QUERIES / 8][4] = {}, ds[QUERIES / 8][4] = {};
            multiply_transposed<D, QUERIES>(
                s, [&](int chunk, uint32_t(&a)[4]) { load_matrices(a, fragment_row<D>(k, warp * 16, chunk)); }, q);
            multiply_transposed<D, QUERIES>(
                ds,
                [&](int chunk, uint32_t(&a)[4]) {
                    for (int i = 0; i < 4; i++) a[i] = v_fragments[chunk / 2][i];
                },
                q + QUERIES * D);
            const bool all_seen = key + 15 <= row.prefix + first;
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++) {
                const auto lse_of = load<2>(lse + n * 8 + lane % 4 * 2), delta_of = load<2>(lse + QUERIES + n * 8 + lane % 4 * 2);
                for (int i = 0; i < 4; i++) {
                    const int last = row.prefix + first + n * 8 + lane % 4 * 2 + i % 2;
                    const bool is_seen = all_seen || key + lane / 4 + i / 2 * 8 <= last;
                    s[n][i] = is_seen ? fast_exp2(s[n][i] * scale - lse_of.v[i % 2]) : 0.0f;
                    ds[n][i] = s[n][i] * (ds[n][i] - delta_of.v[i % 2]);
                }
            }
            multiply<D, QUERIES>(dv, s, q + QUERIES * D);
            multiply<D, QUERIES>(dk, ds, q);
        }
        if (step + 1 < steps && threadIdx.x < 2 * QUERIES) numbers[(step + 1) % 2 * 2 * QUERIES + threadIdx.x] = next;
    }
    if (key < row.prefix) {
        const int64_t at = (int64_t(tile.row) * args.num_groups + group) * row.prefix * D;
        store_prefix<D>(args.dprefix_k + at, dk, args.scale, key, row.prefix);
        store_prefix<D>(args.dprefix_v + at, dv, 1.0f, key, row.prefix);
    }
    if (!args.dqkv) return;
    T* to = static_cast<T*>(args.dqkv);
    auto store_own = [&](const float(&c)[D / 8][4], float by, int column) {
        const float factor[2] = {by, by};
        store_rows<D>(k + warp * 16 * D, c, factor, [&](int r) -> T* {
            const int own = key + r - row.prefix;
            return own >= 0 && own < row.len ? to + (row.start + own) * args.dqkv_stride + column * D : nullptr;
        });
    };
    store_own(dk, args.scale, args.num_heads + group);
    store_own(dv, 1.0f, args.num_heads + args.num_groups + group);
}

#define ATTENTION_KERNELS(suffix, T, D)                                                                               \
    KERNEL(attention_fwd_##suffix, AttentionArgs, THREADS, 3) { attention_forward<T, D>(args); }                      \
    KERNEL(attention_bwd_delta_##suffix, AttentionArgs, THREADS, 8) { attention_delta<T, D>(args); }                  \
    KERNEL(attention_bwd_query_##suffix, AttentionArgs, THREADS, 2) { attention_backward_query<T, D>(args); }         \
    KERNEL(attention_bwd_key_##suffix, AttentionArgs, THREADS, 2) { attention_backward_key<T, D>(args); }
ATTENTION_KERNELS(d64_bf16, bf16, 64)
ATTENTION_KERNELS(d64_f16, f16, 64)
ATTENTION_KERNELS(d128_bf16, bf16, 128)
ATTENTION_KERNELS(d128_f16, f16, 128)
