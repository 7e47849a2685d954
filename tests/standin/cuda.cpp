// A stand-in for NVIDIA's driver (libcuda.so.1): one GPU that is not there, whose memory is the host's and whose kernels are the host's build of
// src/kernels/*.cu, found by name. Enough of the driver's interface for glmddp and candle's CUDA device; everything is done when a call returns.
//
// It refuses what the driver refuses: unknown kernels, grids and blocks that no GPU has, shared memory that was not asked for, copies beyond an
// allocation, freeing what is not allocated. Tensor cores cut off what they align, as real ones do. Memory that was not written holds 0xcd bytes; freed memory is given back to the system.
//
// GLMDDP_STANDIN_BYTES      memory of the GPU (default 4 GiB); more is refused
// GLMDDP_STANDIN_FAULT      a launch of a kernel whose name contains this faults: from then on every call fails, as after an illegal address
// GLMDDP_STANDIN_HANG       a launch of a kernel whose name contains this never ends: the next wait for it hangs
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <string>

namespace {

typedef int Result;  // CUresult
typedef uint64_t Address;
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
};
struct Text {
    Result code;
    const char *name, *text;
};
const Text TEXTS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
};

// By the CUDA driver's header: CUdevice_attribute, CUfunction_attribute, CUmemPool_attribute.
enum { MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97, MEMORY_POOLS = 115, DYNAMIC_SHARED = 8, RELEASE_THRESHOLD = 4 };
// What a block gets without asking, and the most that sm_80, sm_89 and sm_90 all have.
const unsigned SHARED = 48 << 10, SHARED_MOST = 99 << 10;

struct Function {
    std::string name;
    void (*run)(const void*);
    int threads, args_bytes;
    unsigned shared;
};
struct Event {
    timespec at;
    bool is_recorded, is_waited_for;
};

std::recursive_mutex one_at_a_time;
std::map<Address, size_t> allocations;
std::map<std::string, Function*> functions;
size_t allocated;
Result fault = SUCCESS;
bool hangs;
int context, pool, module, num_streams;

bool is_named(const char* variable, const std::string& name) {
    const char* part = getenv(variable);
    return part && *part && name.find(part) != std::string::npos;
}

size_t memory_bytes() {
    const char* bytes = getenv("GLMDDP_STANDIN_BYTES");
    return bytes ? strtoull(bytes, nullptr, 10) : size_t(4) << 30;
}

// Says on stderr what was wrong: the driver's codes say little.
Result refuse(Result code, const std::string& why) {
    fprintf(stderr, "stand-in driver: %s\n", why.c_str());
    return code;
}

// Are `bytes` from `at` on within one allocation?
bool is_allocated(Address at, size_t bytes) {
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin()) return false;
    auto [start, size] = *--next;
    return at - start <= size && bytes <= size - (at - start);
}

Result copy(void* to, const void* from, size_t bytes, bool to_device, bool from_device) {
    if (fault) return fault;
    if (to_device && !is_allocated(Address(to), bytes)) return refuse(INVALID_VALUE, "a copy to memory that is not allocated");
    if (from_device && !is_allocated(Address(from), bytes)) return refuse(INVALID_VALUE, "a copy from memory that is not allocated");
    memmove(to, from, bytes);
    return SUCCESS;
}

Result wait() {
    while (hangs) pause();
    return fault;
}

// This library, in which the kernels are.
void* self() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&self), &info);
    return dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

template <typename T>
T symbol(const std::string& name) {
    return reinterpret_cast<T>(dlsym(self(), name.c_str()));
}

}  // namespace

extern "C" {

const char* shim_launch(void (*function)(const void*), const int* grid, int threads, size_t shared_bytes, const void* args, size_t args_bytes,
                        int order);

#define LOCKED std::lock_guard<std::recursive_mutex> guard(one_at_a_time)

Result cuInit(unsigned) { return SUCCESS; }
Result cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
Result cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
Result cuDeviceGetName(char* name, int length, int) { return snprintf(name, size_t(length), "stand-in"), SUCCESS; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = memory_bytes(), SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case MAJOR: return *value = 9, SUCCESS;
        case MINOR: return *value = 0, SUCCESS;
        case SHARED_OPTIN: return *value = int(SHARED_MOST), SUCCESS;
        case MEMORY_POOLS: return *value = 1, SUCCESS;
        default: return refuse(INVALID_VALUE, "it does not know device attribute " + std::to_string(attribute));
    }
}
Result cuDevicePrimaryCtxRetain(void** to, int) { return *to = &context, SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void*) { return fault; }
Result cuCtxGetCurrent(void** to) { return *to = &context, fault; }
Result cuCtxSynchronize() { return wait(); }

Result cuDeviceGetDefaultMemPool(void** to, int) { return *to = &pool, SUCCESS; }
Result cuMemPoolSetAttribute(void*, int attribute, void*) {
    return attribute == RELEASE_THRESHOLD ? SUCCESS : refuse(INVALID_VALUE, "it does not know pool attribute " + std::to_string(attribute));
}
Result cuMemAllocAsync(Address* to, size_t bytes, void*) {
    LOCKED;
    if (fault) return fault;
    if (bytes == 0) return refuse(INVALID_VALUE, "an allocation of 0 bytes");
    if (bytes > memory_bytes() - allocated) return OUT_OF_MEMORY;
    void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return OUT_OF_MEMORY;
    memset(memory, 0xcd, bytes);
    allocated += bytes;
    allocations[*to = Address(memory)] = bytes;
    return SUCCESS;
}
Result cuMemFreeAsync(Address at, void*) {
    LOCKED;
    auto found = allocations.find(at);
    if (found == allocations.end()) return refuse(INVALID_VALUE, "freeing what is not allocated");
    allocated -= found->second;
    allocations.erase(found);
    free(reinterpret_cast<void*>(at));
    return fault;
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void*) {
    LOCKED;
    return copy(reinterpret_cast<void*>(to), from, bytes, true, false);
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void*) {
    LOCKED;
    if (Result result = wait()) return result;
    return copy(to, reinterpret_cast<const void*>(from), bytes, false, true);
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void*) {
    LOCKED;
    return copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, true, true);
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void*) {
    LOCKED;
    if (fault) return fault;
    if (!is_allocated(to, bytes)) return refuse(INVALID_VALUE, "filling memory that is not allocated");
    memset(reinterpret_cast<void*>(to), value, bytes);
    return SUCCESS;
}

Result cuStreamCreate(void** to, unsigned) { return *to = reinterpret_cast<void*>(uintptr_t(++num_streams) * 256), fault; }
Result cuStreamDestroy_v2(void*) { return fault; }
Result cuStreamSynchronize(void*) { return wait(); }
Result cuStreamWaitEvent(void*, void*, unsigned) { return fault; }
Result cuEventCreate(void** to, unsigned) { return *to = new Event{}, fault; }
Result cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), fault; }
Result cuEventRecord(void* to, void*) {
    Event* event = static_cast<Event*>(to);
    event->is_recorded = true, event->is_waited_for = false;
    clock_gettime(CLOCK_MONOTONIC, &event->at);
    return fault;
}
// As on a GPU that is busy: not there before somebody has waited for it.
Result cuEventQuery(void* event) { return fault ? fault : static_cast<Event*>(event)->is_waited_for ? SUCCESS : NOT_READY; }
Result cuEventSynchronize(void* event) { return static_cast<Event*>(event)->is_waited_for = true, wait(); }
Result cuEventElapsedTime_v2(float* ms, void* start, void* end) {
    const Event &a = *static_cast<Event*>(start), &b = *static_cast<Event*>(end);
    if (!a.is_recorded || !b.is_recorded) return refuse(INVALID_VALUE, "the time of an event that was not recorded");
    *ms = float(double(b.at.tv_sec - a.at.tv_sec) * 1e3 + double(b.at.tv_nsec - a.at.tv_nsec) * 1e-6);
    return fault;
}

Result cuModuleLoadData(void** to, const void*) { return *to = &module, fault; }
Result cuModuleUnload(void*) { return SUCCESS; }
Result cuModuleGetFunction(void** to, void*, const char* name) {
    LOCKED;
    if (fault) return fault;
    Function*& function = functions[name];
    if (!function) {
        auto run = symbol<void (*)(const void*)>(name);
        auto threads = symbol<const int*>(std::string(name) + "_threads"), args_bytes = symbol<const int*>(std::string(name) + "_args_bytes");
        if (!run || !threads || !args_bytes) return refuse(NOT_FOUND, std::string("it has no kernel ") + name);
        function = new Function{name, run, *threads, *args_bytes, SHARED};
    }
    *to = function;
    return SUCCESS;
}
Result cuFuncSetAttribute(void* of, int attribute, int value) {
    Function& function = *static_cast<Function*>(of);
    if (attribute != DYNAMIC_SHARED) return refuse(INVALID_VALUE, "it does not know function attribute " + std::to_string(attribute));
    if (unsigned(value) > SHARED_MOST) return refuse(INVALID_VALUE, function.name + " asks for more shared memory than a block has");
    function.shared = unsigned(value);
    return fault;
}
Result cuLaunchKernel(void* of, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                      unsigned shared_bytes, void*, void** params, void**) {
    LOCKED;
    if (fault) return fault;
    const Function& function = *static_cast<Function*>(of);
    auto bad = [&](const char* why) { return refuse(INVALID_VALUE, function.name + ": " + why); };
    if (!grid_x || !grid_y || !grid_z) return bad("a grid without blocks");
    if (grid_x > 0x7fffffffu || grid_y > 65535 || grid_z > 65535) return bad("a grid of more blocks than a GPU allows");
    if (!block_x || block_y != 1 || block_z != 1 || block_x % 32) return bad("a block that is no row of whole warps");
    if (block_x > unsigned(function.threads)) return LAUNCH_OUT_OF_RESOURCES;
    if (shared_bytes > function.shared) return bad("more shared memory than it was allowed");
    if (is_named("GLMDDP_STANDIN_FAULT", function.name)) {
        // Seen by the next call, as on a GPU.
        fault = ILLEGAL_ADDRESS;
        return SUCCESS;
    }
    if (is_named("GLMDDP_STANDIN_HANG", function.name)) {
        hangs = true;
        return SUCCESS;
    }
    const int grid[3] = {int(grid_x), int(grid_y), int(grid_z)};
    const char* problem = shim_launch(function.run, grid, int(block_x), shared_bytes, params[0], size_t(function.args_bytes), 0);
    if (problem) {
        fault = ILLEGAL_ADDRESS;
        refuse(fault, function.name + ": " + problem);
    }
    return SUCCESS;
}

Result cuGetErrorName(Result code, const char** to) {
    for (const Text& text : TEXTS)
        if (text.code == code) return *to = text.name, SUCCESS;
    return *to = nullptr, INVALID_VALUE;
}
Result cuGetErrorString(Result code, const char** to) {
    for (const Text& text : TEXTS)
        if (text.code == code) return *to = text.text, SUCCESS;
    return *to = nullptr, INVALID_VALUE;
}
}
