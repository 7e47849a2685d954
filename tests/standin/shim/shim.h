// CUDA's words for the host's compiler: a block's threads are fibers, and every access to memory is checked by blocks.cpp. Kernels are
// compiled with -fsanitize=thread, whose callbacks (not its library) tell of their accesses.
// Without STANDIN_CHECKED nothing is checked and nothing is told: for whole programs, where speed counts.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

struct shim_index {
    int x, y, z;
};

extern "C" {
shim_index shim_thread_index();
shim_index shim_block_index();
shim_index shim_block_size();
shim_index shim_grid_size();
unsigned char* shim_shared_memory();
void shim_sync_block();
void shim_sync_warp(unsigned lanes);
uint64_t shim_shuffle(unsigned lanes, uint64_t value, int from);
unsigned shim_ballot(unsigned lanes, bool value);
#if defined(STANDIN_CHECKED)
void shim_load(void* to, const void* from, int bytes);
void shim_store(void* to, const void* from, int bytes);
void shim_copy_async(void* shared, const void* global, bool is_there);
void shim_copy_async_commit();
void shim_copy_async_wait(int open);
#endif
void shim_mma(float* c, const uint32_t* a, const uint32_t* b, bool is_bf16);
void shim_load_matrices(uint32_t* r, const void* row, bool transposed);
float shim_f16_to_f32(uint16_t bits);
uint16_t shim_f32_to_f16(float x);
uint16_t shim_f32_to_bf16(float x);
uint32_t shim_atomic_min(uint32_t* at, uint32_t value);
unsigned long long shim_atomic_min_64(unsigned long long* at, unsigned long long value);
}

#define DEVICE inline __attribute__((always_inline))
#if !defined(STANDIN_CHECKED)
DEVICE void shim_load(void* to, const void* from, int bytes) { memcpy(to, from, size_t(bytes)); }
DEVICE void shim_store(void* to, const void* from, int bytes) { memcpy(to, from, size_t(bytes)); }
DEVICE void shim_copy_async(void* shared, const void* global, bool is_there) {
    if (is_there) {
        memcpy(shared, global, 16);
    } else {
        memset(shared, 0, 16);
    }
}
DEVICE void shim_copy_async_commit() {}
DEVICE void shim_copy_async_wait(int) {}
#endif
#define threadIdx (shim_thread_index())
#define blockIdx (shim_block_index())
#define blockDim (shim_block_size())
#define gridDim (shim_grid_size())
#define __syncthreads() shim_sync_block()
#define __syncwarp() shim_sync_warp(0xffffffffu)
#define __restrict__

// Threads and bytes of shared memory that a kernel was compiled for are checked at the launch.
#define KERNEL(name, Args, threads, blocks_per_sm)                                     \
    static void name##_body(const Args& args);                                         \
    extern "C" const int name##_threads = threads;                                     \
    extern "C" const int name##_args_bytes = sizeof(Args);                             \
    extern "C" void name(const void* args) { name##_body(*static_cast<const Args*>(args)); } \
    static void name##_body(const Args& args)

DEVICE unsigned char* shared_memory() { return shim_shared_memory(); }

DEVICE float __uint_as_float(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
DEVICE uint32_t __float_as_uint(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
template <typename T>
DEVICE T __shfl_sync(unsigned lanes, T value, int from) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = shim_shuffle(lanes, bits, from);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
template <typename T>
DEVICE T __shfl_xor_sync(unsigned lanes, T value, int mask) {
    return __shfl_sync(lanes, value, (shim_thread_index().x % 32) ^ mask);
}
DEVICE unsigned __ballot_sync(unsigned lanes, bool value) { return shim_ballot(lanes, value); }
DEVICE bool __any_sync(unsigned lanes, bool value) { return shim_ballot(lanes, value) != 0; }
DEVICE uint32_t atomicMin(uint32_t* at, uint32_t value) { return shim_atomic_min(at, value); }
DEVICE unsigned long long atomicMin(unsigned long long* at, unsigned long long value) { return shim_atomic_min_64(at, value); }
