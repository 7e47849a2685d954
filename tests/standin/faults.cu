// Kernels with one fault each, which the shim must name; and one without.
#include "device.cuh"

struct FaultArgs {
    float* x;  // 64 values, the first 32 of them written
    float* y;  // 64 values
};

DEVICE float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

KERNEL(good, FaultArgs, 64, 1) {
    shared_floats()[threadIdx.x] = args.x[threadIdx.x % 32];
    __syncthreads();
    args.y[threadIdx.x] = shared_floats()[63 - threadIdx.x];
}
KERNEL(read_behind_the_end, FaultArgs, 64, 1) { args.y[threadIdx.x] = args.x[threadIdx.x + 1 == 64 ? 64 : 0]; }
KERNEL(write_before_the_start, FaultArgs, 64, 1) { args.y[int(threadIdx.x) - 1] = 1.0f; }
KERNEL(shared_behind_the_end, FaultArgs, 64, 1) { shared_floats()[threadIdx.x + 1] = 1.0f; }
KERNEL(read_of_nothing, FaultArgs, 64, 1) { args.y[threadIdx.x] = args.x[threadIdx.x]; }
KERNEL(read_of_nothing_shared, FaultArgs, 64, 1) { args.y[threadIdx.x] = shared_floats()[threadIdx.x]; }
KERNEL(read_before_the_barrier, FaultArgs, 64, 1) {
    shared_floats()[threadIdx.x] = 0.0f;
    __syncthreads();
    shared_floats()[threadIdx.x] = 1.0f;
    args.y[threadIdx.x] = shared_floats()[63 - threadIdx.x];
}
KERNEL(write_after_others_read, FaultArgs, 64, 1) {
    shared_floats()[threadIdx.x] = 1.0f;
    __syncthreads();
    const float x = shared_floats()[63 - threadIdx.x];
    shared_floats()[threadIdx.x] = x;
}
KERNEL(two_write_one, FaultArgs, 64, 1) { args.y[threadIdx.x / 2] = 1.0f; }
KERNEL(warp_without_sync, FaultArgs, 64, 1) {
    shared_floats()[threadIdx.x] = 1.0f;
    __shfl_xor_sync(ALL_LANES, 1.0f, 1);
    args.y[threadIdx.x] = shared_floats()[threadIdx.x ^ 1];
}
KERNEL(warp_with_sync, FaultArgs, 64, 1) {
    shared_floats()[threadIdx.x] = 1.0f;
    __syncwarp();
    args.y[threadIdx.x] = shared_floats()[threadIdx.x ^ 1];
}
KERNEL(blocks_share, FaultArgs, 64, 1) {
    if (blockIdx.x == 0) args.y[threadIdx.x] = 1.0f;
    if (blockIdx.x == 1 && args.y[threadIdx.x] > 0.0f) args.y[threadIdx.x] = 2.0f;
}
KERNEL(barrier_of_some, FaultArgs, 64, 1) {
    if (threadIdx.x < 32) __syncthreads();
}
KERNEL(shuffle_of_some, FaultArgs, 64, 1) {
    if (threadIdx.x % 32 < 16) args.y[threadIdx.x] = warp_sum(1.0f);
}
KERNEL(load_between_bounds, FaultArgs, 64, 1) { args.y[threadIdx.x] = load<4>(args.x + 1).v[0]; }
KERNEL(copy_without_wait, FaultArgs, 64, 1) {
    if (threadIdx.x == 0) {
        copy_async(shared_memory(), args.x, true);
        copy_async_commit();
    }
}
KERNEL(copy_read_too_early, FaultArgs, 64, 1) {
    if (threadIdx.x == 0) {
        copy_async(shared_memory(), args.x, true);
        copy_async_commit();
        args.y[0] = shared_floats()[0];
        copy_async_wait<0>();
    }
}
KERNEL(copy_without_barrier, FaultArgs, 64, 1) {
    if (threadIdx.x == 0) {
        copy_async(shared_memory(), args.x, true);
        copy_async_commit();
        copy_async_wait<0>();
    }
    __syncwarp();
    if (threadIdx.x == 32) args.y[0] = shared_floats()[0];
}
