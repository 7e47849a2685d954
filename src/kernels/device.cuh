// What kernels are written with: types, loads, reductions, tensor-core fragments. Compiled by nvcc for a GPU, and by the host's compiler with
// the shim of tests/standin, which checks every access. Kernels use nothing of CUDA beyond this file.
//
// Rules: accumulation in f32 (or double where said), no float atomics, sums in an order that depends on sizes alone; every load and store of
// more than one element through load/store, which want alignment; shared memory through shared_memory() alone; no library function.
#pragma once

#ifdef GLMDDP_SHIM
#include "shim.h"
#else
#include <stdint.h>
#define DEVICE __device__ __forceinline__
// One by-value struct of arguments a kernel, mirrored in Rust with repr(C).
#define KERNEL(name, Args, threads, blocks_per_sm) \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(const __grid_constant__ Args args)
extern __shared__ __align__(128) unsigned char glmddp_shared[];
DEVICE unsigned char* shared_memory() { return glmddp_shared; }
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float NEG_INFINITY = -INFINITY;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---- 16-bit floats -------------------------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

DEVICE float to_f32(float x) { return x; }

// Rounded to nearest even.
template <typename T>
DEVICE T from_f32(float x);
template <>
DEVICE float from_f32<float>(float x) {
    return x;
}

#ifdef GLMDDP_SHIM
DEVICE float to_f32(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float to_f32(f16 x) { return shim_f16_to_f32(x.bits); }
template <>
DEVICE bf16 from_f32<bf16>(float x) {
    return {shim_f32_to_bf16(x)};
}
template <>
DEVICE f16 from_f32<f16>(float x) {
    return {shim_f32_to_f16(x)};
}
// Of two neighbours: the first in the low half.
template <typename T>
DEVICE uint32_t pack(float lo, float hi) {
    return uint32_t(from_f32<T>(lo).bits) | uint32_t(from_f32<T>(hi).bits) << 16;
}
#else
DEVICE float to_f32(bf16 x) {
    float y;
    asm("mov.b32 %0, {0, %1};" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
template <>
DEVICE bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
DEVICE f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <typename T>
DEVICE uint32_t pack(float lo, float hi);
template <>
DEVICE uint32_t pack<bf16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <>
DEVICE uint32_t pack<f16>(float lo, float hi) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
#endif

// ---- arithmetic ----------------------------------------------------------------------------------------------------------------------

#ifdef GLMDDP_SHIM
DEVICE float fast_exp2(float x) { return exp2f(x); }
DEVICE float fast_rsqrt(float x) { return 1.0f / sqrtf(x); }
DEVICE float fast_log2(float x) { return log2f(x); }
DEVICE float fast_reciprocal(float x) { return 1.0f / x; }
#else
// 2 ulp; -inf gives 0.
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_rsqrt(float x) { return rsqrtf(x); }
// Within 2^-22, relative outside of (0.5, 2).
DEVICE float fast_log2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 ulp; of infinity 0.
DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
DEVICE float fast_exp(float x) { return fast_exp2(x * LOG2_E); }

DEVICE int div_up(int a, int b) { return (a + b - 1) / b; }
DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }

// Each rounded once, to nearest even, and never fused with another: the bits of the host's code.
#ifdef GLMDDP_SHIM
DEVICE float mul_exact(float a, float b) { return a * b; }
DEVICE float add_exact(float a, float b) { return a + b; }
DEVICE float div_exact(float a, float b) { return a / b; }
DEVICE double div_exact(double a, double b) { return a / b; }
DEVICE float sqrt_exact(float x) { return sqrtf(x); }
DEVICE double sqrt_exact(double x) { return sqrt(x); }
DEVICE float fma_exact(float a, float b, float c) { return fmaf(a, b, c); }
#else
DEVICE float mul_exact(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_exact(float a, float b) { return __fadd_rn(a, b); }
DEVICE float div_exact(float a, float b) { return __fdiv_rn(a, b); }
DEVICE double div_exact(double a, double b) { return __ddiv_rn(a, b); }
DEVICE float sqrt_exact(float x) { return __fsqrt_rn(x); }
DEVICE double sqrt_exact(double x) { return __dsqrt_rn(x); }
DEVICE float fma_exact(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#endif

// ---- faults --------------------------------------------------------------------------------------------------------------------------
// What a kernel cannot go on with is told by the lowest position of it, in 8 bytes that the host set to NO_FAULT. Nobody waits for them.

constexpr unsigned long long NO_FAULT = ~0ull;

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }
// A minimum of integers, so the order of threads does not show. Null: nobody asks.
DEVICE void report(unsigned long long* fault, int64_t at) {
    if (fault) atomicMin(fault, static_cast<unsigned long long>(at));
}

// ---- memory --------------------------------------------------------------------------------------------------------------------------

// N elements that lie one behind the other, aligned to their size (at most 16 bytes).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
    static_assert(sizeof(T) * N <= 16, "no wider loads");
    T v[N];
};

// Elements of 16 bytes.
template <typename T>
constexpr int WIDE = 16 / sizeof(T);

// From global or shared memory; `p` is aligned to sizeof(T) * N.
template <int N, typename T>
DEVICE Vec<T, N> load(const T* p) {
#ifdef GLMDDP_SHIM
    Vec<T, N> x;
    shim_load(&x, p, sizeof(x));
    return x;
#else
    return *reinterpret_cast<const Vec<T, N>*>(p);
#endif
}

template <int N, typename T>
DEVICE void store(T* p, const Vec<T, N>& x) {
#ifdef GLMDDP_SHIM
    shim_store(p, &x, sizeof(x));
#else
    *reinterpret_cast<Vec<T, N>*>(p) = x;
#endif
}

// Copies 16 bytes from global to shared memory beside the computation, or zeros where `is_there` is false (then `global` is not read).
DEVICE void copy_async(void* shared, const void* global, bool is_there) {
#ifdef GLMDDP_SHIM
    shim_copy_async(shared, global, is_there);
#else
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    int bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(bytes) : "memory");
#endif
}
// Closes a group of this thread's copies.
DEVICE void copy_async_commit() {
#ifdef GLMDDP_SHIM
    shim_copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until no more than the N newest groups of this thread are open; the others' copies are seen by the block after a barrier.
template <int N>
DEVICE void copy_async_wait() {
#ifdef GLMDDP_SHIM
    shim_copy_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- reductions ----------------------------------------------------------------------------------------------------------------------

// Over the lanes of a warp, in a fixed tree; all lanes get the same bits.
DEVICE float warp_sum(float x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}
DEVICE double warp_sum(double x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}
DEVICE float warp_max(float x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lane));
    return x;
}

// Over all threads of a block (a multiple of 32, at most 1024), the same bits on each. `scratch` is shared, one element a warp, and free again
// when this returns.
template <typename T>
DEVICE T block_sum(T x, T* scratch) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? scratch[lane] : T(0));
    __syncthreads();
    return x;
}
DEVICE float block_max(float x, float* scratch) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = warp_max(lane < warps ? scratch[lane] : NEG_INFINITY);
    __syncthreads();
    return x;
}

// ---- tensor cores --------------------------------------------------------------------------------------------------------------------
// Fragments as the PTX manual lays them out (9.7.14.5.8, mma.m16n8k16 with .f16/.bf16; group = lane / 4, place = lane % 4):
//   a[0] (row group, columns 2 place, +1)   a[1] (row group + 8, ...)   a[2] (row group, columns 2 place + 8, +9)   a[3] (row group + 8, ...)
//   b[0] (rows 2 place, +1, column group)   b[1] (rows 2 place + 8, +9, column group)
//   c[0], c[1] (row group, columns 2 place, +1)   c[2], c[3] (row group + 8, ...)

// c += a b of 16 x 16 by 16 x 8, by a whole warp.
template <typename T>
DEVICE void mma_16_8_16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned), and
// gets in r[m] columns 2 place and 2 place + 1 of row `group` of matrix m; transposed: rows 2 place and 2 place + 1 of column `group`.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row);
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row);

#ifdef GLMDDP_SHIM
template <>
DEVICE void mma_16_8_16<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim_mma(c, a, b, true);
}
template <>
DEVICE void mma_16_8_16<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim_mma(c, a, b, false);
}
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { shim_load_matrices(r, row, false); }
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) { shim_load_matrices(r, row, true); }
#else
#define GLMDDP_MMA(T, NAME)                                                                                                      \
    template <>                                                                                                                  \
    DEVICE void mma_16_8_16<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                                  \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                     \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                                 \
    }
GLMDDP_MMA(bf16, "bf16")
GLMDDP_MMA(f16, "f16")
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
#endif
