// A stand-in for NVIDIA's driver (libcuda.so.1): GPUs that are not there, whose memory is the host's and whose kernels are the host's build of
// src/kernels/*.cu, found by name in libglmddp_kernels.so beside this library. Enough of the driver's interface for glmddp and candle's CUDA device.
//
// Work is queued and runs late (streams.h), memory is watched (memory.h), what is asked for is counted (counts.h). Copies are as the driver has them:
// from pageable memory the source is read when the call returns, to pageable memory the call returns when the bytes are there, and with pinned
// memory neither is so. It refuses what the driver refuses: unknown kernels, grids and blocks that no GPU has, shared memory that was not asked for,
// copies beyond an allocation, freeing what is not allocated, a thread without a context.
//
// GLMDDP_STANDIN_SEED       which of the orders that are allowed is taken, of operations, blocks and threads; 0: that of the calls (default 1)
// GLMDDP_STANDIN_DEVICES    the GPUs, as NAME,CAPABILITY,BYTES;... (default one: stand-in,9.0 with GLMDDP_STANDIN_BYTES)
// GLMDDP_STANDIN_BYTES      memory of that one GPU (default 4 GiB); more is refused
// GLMDDP_STANDIN_FAULT      a launch of a kernel whose name contains this faults: every call fails from when that is noticed
// GLMDDP_STANDIN_HANG       a launch of a kernel whose name contains this never ends: who waits for it hangs
// GLMDDP_STANDIN_FAIL       calls that fail, as CALL:NUMBER:CODE;...: the NUMBER-th call (from 1) of this function returns CODE, and so do all
//                           calls behind it if the driver says of the code that the process must end
// GLMDDP_STANDIN_COUNTS     a folder for what is asked for (counts.h)
// GLMDDP_STANDIN_PLANT      an error of the host, made in its place (plant.h)
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <vector>

#include "counts.h"
#include "memory.h"
#include "plant.h"
#include "streams.h"

extern "C" const char* shim_launch(void (*function)(const void*), const int* grid, int threads, size_t shared_bytes, const void* args,
                                   size_t args_bytes, int order);

namespace {

struct Text {
    Result code;
    const char *name, *text;
    // Whether every call fails from then on (CUDA Driver API, CUresult: "the process must be terminated and relaunched").
    bool is_sticky;
};
const Text TEXTS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error", false},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument", false},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory", false},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable", false},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal", false},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context", false},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered", true},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle", false},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found", false},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready", false},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered", true},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch", false},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure", true},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error", true},
};

const Text* text_of(Result code) {
    for (const Text& text : TEXTS)
        if (text.code == code) return &text;
    return nullptr;
}

// By the CUDA driver's header: CUdevice_attribute, CUfunction_attribute, CUmemPool_attribute, CUstream_flags.
enum { MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97, MEMORY_POOLS = 115, DYNAMIC_SHARED = 8, RELEASE_THRESHOLD = 4, NON_BLOCKING = 1 };
// What a block gets without asking, and the most that sm_80, sm_89 and sm_90 all have.
const unsigned SHARED = 48 << 10, SHARED_MOST = 99 << 10;
// Memory of operations that have not run yet may be held beyond what is allocated.
const size_t HELD_MOST = size_t(512) << 20, QUEUED_MOST = 20000;

struct Device {
    std::string name;
    int major, minor;
    size_t bytes, allocated;
};
struct Function {
    std::string name;
    void (*run)(const void*);
    int threads, args_bytes;
    unsigned shared;
};
struct Event {
    std::shared_ptr<Op> op;
};

std::map<std::string, Function*> functions;
// Of threads and blocks: below 0, drawn for each launch.
int thread_order = -1;
int pool, module;
thread_local Device* current;

const char* variable(const char* name) {
    const char* text = getenv(name);
    return text ? text : "";
}

bool is_named(const char* of, const std::string& name) {
    const char* part = variable(of);
    return *part && name.find(part) != std::string::npos;
}

std::vector<Device>& devices() {
    static std::vector<Device>* const all = [] {
        auto* list = new std::vector<Device>;
        std::string left = variable("GLMDDP_STANDIN_DEVICES");
        const char* bytes = variable("GLMDDP_STANDIN_BYTES");
        if (left.empty()) left = "stand-in,9.0," + std::string(*bytes ? bytes : "4294967296");
        while (!left.empty()) {
            const size_t end = left.find(';');
            char name[64];
            Device device = {"", 0, 0, 0, 0};
            if (sscanf(left.substr(0, end).c_str(), "%63[^,],%d.%d,%zu", name, &device.major, &device.minor, &device.bytes) != 4) {
                fprintf(stderr, "stand-in driver: GLMDDP_STANDIN_DEVICES: expected NAME,CAPABILITY,BYTES;..., found %s\n", left.c_str());
                exit(1);
            }
            device.name = name;
            list->push_back(device);
            left = end == std::string::npos ? "" : left.substr(end + 1);
        }
        return list;
    }();
    return *all;
}

// Says at the end which failures were asked for and did not come: a misspelt name would let a test pass for nothing.
struct Asked {
    std::string text = variable("GLMDDP_STANDIN_FAIL");
    size_t num_asked = text.empty() ? 0 : size_t(1 + std::count(text.begin(), text.end(), ';')), num_given = 0;
    ~Asked() {
        if (num_given < num_asked)
            fprintf(stderr, "stand-in driver: %zu of %zu failures came of GLMDDP_STANDIN_FAIL=%s\n", num_given, num_asked, text.c_str());
    }
} asked;

// What a call begins with: the error that it was told to give, or that of a context that is lost.
Result begin(const char* call, bool needs_context = true) {
    static std::map<std::string, unsigned long> calls;
    if (fault) return fault;
    calls[call]++;
    std::string left = variable("GLMDDP_STANDIN_FAIL");
    while (!left.empty()) {
        const size_t end = left.find(';');
        char name[64];
        unsigned long number;
        Result code;
        if (sscanf(left.substr(0, end).c_str(), "%63[^:]:%lu:%d", name, &number, &code) != 3 || !text_of(code)) {
            fprintf(stderr, "stand-in driver: GLMDDP_STANDIN_FAIL: expected CALL:NUMBER:CODE;..., found %s\n", left.c_str());
            exit(1);
        }
        if (call == std::string(name) && calls[call] == number) {
            if (text_of(code)->is_sticky) fault = code;
            asked.num_given++;
            return code;
        }
        left = end == std::string::npos ? "" : left.substr(end + 1);
    }
    if (needs_context && !current) return refuse(201, std::string(call) + " in a thread without a context");
    return SUCCESS;
}
#define CALL                                          \
    LOCKED;                                           \
    if (const Result early = begin(__func__)) return early
#define CALL_WITHOUT_CONTEXT                          \
    LOCKED;                                           \
    if (const Result early = begin(__func__, false)) return early

// An operation, if its stream is there; keeps the queue from growing without end.
Result queue(void* stream, const std::string& what, std::function<std::string()> run, std::shared_ptr<Op>* to = nullptr) {
    if (streams::num_queued() > QUEUED_MOST) streams::progress();
    auto op = streams::queue(stream, what, std::move(run));
    if (!op) return INVALID_HANDLE;
    if (to) *to = op;
    return SUCCESS;
}

std::string size_of(size_t bytes) { return " of " + std::to_string(bytes) + " bytes"; }

// The library with the kernels, beside this one.
void* kernels() {
    static void* const library = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&kernels), &info);
        std::string path = info.dli_fname;
        path = path.substr(0, path.rfind('/') + 1) + "libglmddp_kernels.so";
        void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!opened) fprintf(stderr, "stand-in driver: %s\n", dlerror());
        return opened;
    }();
    return library;
}

template <typename T>
T symbol(const std::string& name) {
    return kernels() ? reinterpret_cast<T>(dlsym(kernels(), name.c_str())) : nullptr;
}

Result up(void* stream, Address to, const void* from, size_t bytes) {
    if (!memory::is_allocated(to, bytes)) return refuse(INVALID_VALUE, "a copy to memory that is not allocated: " + memory::describe(to));
    const bool is_pinned = memory::is_pinned(from, bytes);
    counts::copy(is_pinned ? counts::UP_PINNED : counts::UP_PAGEABLE, bytes);
    const plant::Error& error = plant::at(is_pinned ? "send" : "up");
    if (error.is("leave_out")) return SUCCESS;
    if (error.is("elsewhere")) stream = plant::elsewhere();
    if (error.is("short")) bytes -= std::min(bytes, size_t(error.a));
    // Pageable memory is read now. Pinned memory is read when the copy runs: the host may not write to it before, but a copy may.
    const auto* first = static_cast<const unsigned char*>(from);
    auto source = std::make_shared<std::vector<unsigned char>>(first, is_pinned ? first : first + bytes);
    void* host = const_cast<void*>(from);
    std::shared_ptr<Op> op;
    const auto run = [=]() -> std::string {
        std::string problem = memory::touch(to, bytes, true);
        if (!problem.empty()) return problem;
        if (is_pinned) {
            memory::copy_from_host(reinterpret_cast<void*>(to), host, bytes);
        } else {
            memcpy(reinterpret_cast<void*>(to), source->data(), bytes);
        }
        return "";
    };
    if (Result result = queue(stream, "copy to the GPU" + size_of(bytes), run, &op)) return result;
    if (is_pinned) memory::lend_host(host, bytes, op->id, false);
    if (error.is("touched")) ++*static_cast<volatile unsigned char*>(host);
    return SUCCESS;
}

Result down(void* stream, void* to, Address from, size_t bytes, const char* call) {
    if (!memory::is_allocated(from, bytes)) return refuse(INVALID_VALUE, "a copy from memory that is not allocated: " + memory::describe(from));
    const bool is_pinned = memory::is_pinned(to, bytes);
    counts::copy(is_pinned ? counts::DOWN_PINNED : counts::DOWN_PAGEABLE, bytes);
    if (plant::at("down").is("early")) return memset(to, 0xff, bytes), SUCCESS;
    std::shared_ptr<Op> op;
    const auto run = [=]() -> std::string {
        std::string problem = memory::touch(from, bytes, false);
        if (!problem.empty()) return problem;
        if (is_pinned) {
            memory::copy_to_host(to, reinterpret_cast<const void*>(from), bytes);
        } else {
            memcpy(to, reinterpret_cast<const void*>(from), bytes);
        }
        return "";
    };
    if (Result result = queue(stream, "copy to the host" + size_of(bytes), run, &op)) return result;
    if (is_pinned) {
        memory::lend_host(to, bytes, op->id, true);
        return SUCCESS;
    }
    counts::wait(call);
    return streams::complete(op);
}

Result on_device(void* stream, Address to, Address from, size_t bytes) {
    for (const Address at : {to, from})
        if (!memory::is_allocated(at, bytes)) return refuse(INVALID_VALUE, "a copy of memory that is not allocated: " + memory::describe(at));
    counts::copy(counts::ON_DEVICE, bytes);
    const plant::Error& error = plant::at("copy");
    if (error.is("leave_out")) return SUCCESS;
    if (error.is("elsewhere")) stream = plant::elsewhere();
    return queue(stream, "copy on the GPU" + size_of(bytes), [=]() -> std::string {
        std::string problem = memory::touch(from, bytes, false);
        if (problem.empty()) problem = memory::touch(to, bytes, true);
        if (problem.empty()) memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
        return problem;
    });
}

Result allocate(Address* to, size_t bytes, void* stream) {
    Device& device = *current;
    if (bytes == 0) return refuse(INVALID_VALUE, "an allocation of 0 bytes");
    if (bytes > device.bytes - device.allocated) return OUT_OF_MEMORY;
    while (memory::num_held() > device.allocated + HELD_MOST && !fault && streams::progress()) {
    }
    const Address at = memory::allocate(bytes);
    if (!at) return refuse(OUT_OF_MEMORY, "its addresses are used up, not the device's memory");
    std::shared_ptr<Op> op;
    if (Result result = queue(stream, "allocation" + size_of(bytes), nullptr, &op)) return result;
    memory::allocated_by(at, op->id, &device);
    device.allocated += bytes;
    counts::allocation(bytes, device.allocated);
    *to = at;
    return SUCCESS;
}

Result release(Address at, void* stream) {
    memory::Allocation* found = memory::find(at);
    if (!found || found->start != at || found->free_is_queued) return refuse(INVALID_VALUE, "freeing what is not allocated: " + memory::describe(at));
    found->free_is_queued = true;
    Device& device = *static_cast<Device*>(found->device);
    device.allocated -= found->bytes;
    counts::release(device.allocated);
    if (plant::at("free").is("elsewhere")) stream = plant::elsewhere();
    return queue(stream, "free of allocation " + std::to_string(found->number), [=] { return memory::release(at); });
}

}  // namespace

extern "C" {

Result cuInit(unsigned) { CALL_WITHOUT_CONTEXT; return SUCCESS; }
Result cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
Result cuDeviceGetCount(int* count) { return *count = int(devices().size()), SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, size_t(ordinal) < devices().size() ? SUCCESS : INVALID_DEVICE; }
Result cuDeviceGetName(char* name, int length, int device) {
    return snprintf(name, size_t(length), "%s", devices()[size_t(device)].name.c_str()), SUCCESS;
}
Result cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = devices()[size_t(device)].bytes, SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case MAJOR: return *value = devices()[size_t(device)].major, SUCCESS;
        case MINOR: return *value = devices()[size_t(device)].minor, SUCCESS;
        case SHARED_OPTIN: return *value = int(SHARED_MOST), SUCCESS;
        case MEMORY_POOLS: return *value = 1, SUCCESS;
        default: return refuse(INVALID_VALUE, "it does not know device attribute " + std::to_string(attribute));
    }
}
Result cuDevicePrimaryCtxRetain(void** to, int device) {
    CALL_WITHOUT_CONTEXT;
    return *to = &devices()[size_t(device)], SUCCESS;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void* context) {
    CALL_WITHOUT_CONTEXT;
    return current = static_cast<Device*>(context), SUCCESS;
}
Result cuCtxGetCurrent(void** to) { return *to = current, fault; }
Result cuCtxSynchronize() {
    CALL;
    counts::wait(__func__);
    return streams::complete_all();
}

Result cuDeviceGetDefaultMemPool(void** to, int) { return *to = &pool, SUCCESS; }
Result cuMemPoolSetAttribute(void*, int attribute, void*) {
    return attribute == RELEASE_THRESHOLD ? SUCCESS : refuse(INVALID_VALUE, "it does not know pool attribute " + std::to_string(attribute));
}
Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    CALL;
    return *total = current->bytes, *free = current->bytes - current->allocated, SUCCESS;
}
Result cuMemAllocAsync(Address* to, size_t bytes, void* stream) {
    CALL;
    return allocate(to, bytes, stream);
}
Result cuMemFreeAsync(Address at, void* stream) {
    CALL;
    return release(at, stream);
}
Result cuMemHostAlloc(void** to, size_t bytes, unsigned) {
    CALL;
    if (bytes == 0) return refuse(INVALID_VALUE, "pinned memory of 0 bytes");
    return (*to = memory::pin(bytes)) ? SUCCESS : OUT_OF_MEMORY;
}
Result cuMemFreeHost(void* at) {
    CALL;
    return memory::unpin(at);
}
Result cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
    CALL;
    return bytes == 0 ? SUCCESS : up(stream, to, from, bytes);
}
Result cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
    CALL;
    return bytes == 0 ? SUCCESS : down(stream, to, from, bytes, __func__);
}
Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
    CALL;
    return bytes == 0 ? SUCCESS : on_device(stream, to, from, bytes);
}
Result cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* stream) {
    CALL;
    if (bytes == 0) return SUCCESS;
    if (!memory::is_allocated(to, bytes)) return refuse(INVALID_VALUE, "filling memory that is not allocated: " + memory::describe(to));
    counts::fill(bytes);
    const plant::Error& error = plant::at("fill");
    if (error.is("leave_out")) return SUCCESS;
    if (error.is("elsewhere")) stream = plant::elsewhere();
    return queue(stream, "fill" + size_of(bytes), [=]() -> std::string {
        std::string problem = memory::touch(to, bytes, true);
        if (problem.empty()) memset(reinterpret_cast<void*>(to), value, bytes);
        return problem;
    });
}

Result cuStreamCreate(void** to, unsigned flags) {
    CALL;
    return *to = streams::create(flags != NON_BLOCKING), SUCCESS;
}
Result cuStreamDestroy_v2(void* stream) {
    CALL;
    return streams::destroy(stream);
}
Result cuStreamSynchronize(void* stream) {
    CALL;
    counts::wait(__func__);
    return streams::complete_stream(stream);
}
Result cuStreamWaitEvent(void* stream, void* event, unsigned) {
    CALL;
    return streams::wait_for(stream, static_cast<Event*>(event)->op);
}
Result cuEventCreate(void** to, unsigned) {
    CALL;
    return *to = new Event{}, SUCCESS;
}
Result cuEventDestroy_v2(void* event) {
    LOCKED;
    return delete static_cast<Event*>(event), fault;
}
Result cuEventRecord(void* to, void* stream) {
    CALL;
    if (plant::at("record").is("leave_out")) return SUCCESS;
    return queue(stream, "event", nullptr, &static_cast<Event*>(to)->op);
}
// As on a GPU that is busy: who asks again and again sees it go on, who asks once does not.
Result cuEventQuery(void* event) {
    CALL;
    static unsigned asked;
    const auto& op = static_cast<Event*>(event)->op;
    if (++asked % 8 == 0) streams::progress();
    if (fault) return fault;
    if (op && !op->is_done) return NOT_READY;
    if (op) streams::host_knows(*op);
    return SUCCESS;
}
Result cuEventSynchronize(void* event) {
    CALL;
    counts::wait(__func__);
    return streams::complete(static_cast<Event*>(event)->op);
}
Result cuEventElapsedTime_v2(float* ms, void* start, void* end) {
    CALL;
    const auto &first = static_cast<Event*>(start)->op, &last = static_cast<Event*>(end)->op;
    if (!first || !last) return refuse(INVALID_HANDLE, "the time of an event that was not recorded");
    if (!first->is_done || !last->is_done) return NOT_READY;
    const timespec &a = first->ended, &b = last->ended;
    *ms = float(double(b.tv_sec - a.tv_sec) * 1e3 + double(b.tv_nsec - a.tv_nsec) * 1e-6);
    return SUCCESS;
}

Result cuModuleLoadData(void** to, const void*) {
    CALL;
    return *to = &module, SUCCESS;
}
Result cuModuleUnload(void*) { return SUCCESS; }
Result cuModuleGetFunction(void** to, void*, const char* name) {
    CALL;
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
    CALL;
    Function& function = *static_cast<Function*>(of);
    if (attribute != DYNAMIC_SHARED) return refuse(INVALID_VALUE, "it does not know function attribute " + std::to_string(attribute));
    if (unsigned(value) > SHARED_MOST) return refuse(INVALID_VALUE, function.name + " asks for more shared memory than a block has");
    return function.shared = unsigned(value), SUCCESS;
}
Result cuLaunchKernel(void* of, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                      unsigned shared_bytes, void* stream, void** params, void**) {
    CALL;
    const Function& function = *static_cast<Function*>(of);
    auto bad = [&](const char* why) { return refuse(INVALID_VALUE, function.name + ": " + why); };
    if (!grid_x || !grid_y || !grid_z) return bad("a grid without blocks");
    if (grid_x > 0x7fffffffu || grid_y > 65535 || grid_z > 65535) return bad("a grid of more blocks than a GPU allows");
    if (!block_x || block_y != 1 || block_z != 1 || block_x % 32) return bad("a block that is no row of whole warps");
    if (block_x > unsigned(function.threads)) return LAUNCH_OUT_OF_RESOURCES;
    if (shared_bytes > function.shared) return bad("more shared memory than it was allowed");
    counts::launch(function.name);
    const auto* first = static_cast<const unsigned char*>(params[0]);
    // Arguments are copied when the call returns, to where words may lie.
    auto args = std::make_shared<std::vector<uint64_t>>((size_t(function.args_bytes) + 7) / 8);
    memcpy(args->data(), first, size_t(function.args_bytes));
    const plant::Error& error = plant::at("launch " + function.name);
    if (error.is("leave_out")) return SUCCESS;
    if (error.is("elsewhere")) stream = plant::elsewhere();
    if (error.is("swapped")) std::swap(args->at(0), args->at(1));
    if (error.is("grid")) grid_x += unsigned(error.a);
    static std::map<std::string, std::vector<uint64_t>> firsts;
    const std::vector<uint64_t>& first_args = firsts.emplace(function.name, *args).first->second;
    if (error.is("stale")) args->at(size_t(error.a) / 8) = first_args.at(size_t(error.a) / 8);
    if (error.is("add")) args->at(size_t(error.a) / 8) += uint64_t(error.b) << error.a % 8 * 8;
    if (error.is("freed"))
        if (memory::Allocation* found = memory::find(args->at(size_t(error.a) / 8))) release(found->start, stream);
    const bool faults = is_named("GLMDDP_STANDIN_FAULT", function.name);
    const int drawn = streams::draw(3) < 2 ? int(streams::draw(2)) : int(2 + streams::draw(1000));
    const int order = thread_order >= 0 ? thread_order : drawn;
    std::shared_ptr<Op> op;
    const auto run = [=]() -> std::string {
        if (faults) return "GLMDDP_STANDIN_FAULT asks for a fault";
        const int grid[3] = {int(grid_x), int(grid_y), int(grid_z)};
        const char* problem = shim_launch(function.run, grid, int(block_x), shared_bytes, args->data(), size_t(function.args_bytes), order);
        return problem ? problem : "";
    };
    if (error.is("twice")) queue(stream, "kernel `" + function.name + "`", run);
    if (Result result = queue(stream, "kernel `" + function.name + "`", run, &op)) return result;
    op->never_ends = is_named("GLMDDP_STANDIN_HANG", function.name);
    return SUCCESS;
}

Result standin_begin(const char* call) { return begin(call); }

// Not of the driver: for tests. 0 ascending, 1 descending, more shuffled.
void standin_set_thread_order(int order) {
    LOCKED;
    thread_order = order;
}

Result cuGetErrorName(Result code, const char** to) {
    const Text* text = text_of(code);
    return *to = text ? text->name : nullptr, text ? SUCCESS : INVALID_VALUE;
}
Result cuGetErrorString(Result code, const char** to) {
    const Text* text = text_of(code);
    return *to = text ? text->text : nullptr, text ? SUCCESS : INVALID_VALUE;
}
}
