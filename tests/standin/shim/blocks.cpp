// Runs a kernel's blocks one after the other, a block's threads as fibers, and checks what they do: bounds of global and shared memory,
// alignment, reads of what nobody wrote, races within a block between barriers, races of blocks and of operations that nothing orders, barriers and
// warp operations that not all threads come to, asynchronous copies that nobody waits for. The first fault ends the launch with a message.
//
// Without STANDIN_CHECKED only barriers and warp operations are watched, not memory, and a tensor core adds as a real one does, which cuts off.
//
// Memory is watched in granules of two bytes. __syncthreads orders a block, __syncwarp a warp; shuffles and mma order nothing, as in CUDA.
// Not modelled: caches, bank conflicts, the order in which a tensor core adds, concurrent blocks (they must not depend on each other).
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "../driver/memory.h"
#include "half.h"
#include "shim.h"

namespace {

using memory::Cell, memory::GRANULE;

constexpr int MAX_THREADS = 1024, WARP = 32, MAX_COPIES = 256;
constexpr size_t STACK = 64 << 10, GUARD = 4096;
[[maybe_unused]] constexpr uint16_t MANY = 0xffff;

// A block's shared memory.
struct Shared {
    uintptr_t start;
    size_t bytes;
    unsigned char* memory;
    Cell* cells;
};

enum State { RUNNABLE, AT_BARRIER, IN_WARP, FINISHED };

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    bool is_there;
    int group;
};

// The asynchronous copies of a thread that it has not waited for.
struct Copies {
    Copy all[MAX_COPIES];
    int num, group;
};

enum Operation { SYNC, SHUFFLE, BALLOT, MMA, MATRICES };

struct Warp {
    int arrived;
    Operation operation;
    uint32_t epoch;
    uint64_t value[WARP];
    int from[WARP];
    float* c[WARP];
    const uint32_t *a[WARP], *b[WARP];
    uint32_t* r[WARP];
    const unsigned char* row[WARP];
    bool flag;
};

Shared shared;
// What every switch reads lies close together.
State states[MAX_THREADS];
#if defined(__x86_64__)
void* stack_pointers[MAX_THREADS];
#else
ucontext_t contexts[MAX_THREADS];
#endif
#if defined(STANDIN_CHECKED)
Copies copies[MAX_THREADS];
#endif
Warp warps[MAX_THREADS / WARP];
unsigned char* stacks;
void* scheduler_sp;
#if !defined(__x86_64__)
ucontext_t scheduler_context;
#endif

int current, num_threads;
bool failed;
char message[1024];
uint32_t epoch = 1, launch_epoch, block_epoch;
shim_index block, grid;
void (*kernel_function)(const void*);
const unsigned char* kernel_args;
size_t kernel_args_bytes;
[[maybe_unused]] uint64_t counts[4];

// ---- switching -----------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.globl shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, .-shim_switch
)");
#endif

unsigned char* stack_of(int thread) { return stacks + size_t(thread) * STACK; }

void to_scheduler() {
#if defined(__x86_64__)
    shim_switch(&stack_pointers[current], scheduler_sp);
#else
    swapcontext(&contexts[current], &scheduler_context);
#endif
}

void run(int thread) {
    current = thread;
#if defined(__x86_64__)
    shim_switch(&scheduler_sp, stack_pointers[thread]);
#else
    swapcontext(&scheduler_context, &contexts[thread]);
#endif
}

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    if (!failed) {
        failed = true;
        int n = snprintf(message, sizeof message, "block (%d, %d, %d), thread %d: ", block.x, block.y, block.z, current);
        va_list args;
        va_start(args, format);
        vsnprintf(message + n, sizeof message - n, format, args);
        va_end(args);
    }
    to_scheduler();
    abort();  // never resumed
}

void start() {
    kernel_function(kernel_args);
#if defined(STANDIN_CHECKED)
    if (copies[current].num > 0) fail("ends with %d asynchronous copies that it did not wait for", copies[current].num);
#endif
    states[current] = FINISHED;
    to_scheduler();
    abort();
}

void prepare(int thread) {
    states[thread] = RUNNABLE;
#if defined(STANDIN_CHECKED)
    copies[thread].num = copies[thread].group = 0;
#endif
#if defined(__x86_64__)
    // Tops that are not all a power of two apart: a processor's cache would have one place for them all.
    void** top = reinterpret_cast<void**>(stack_of(thread) + STACK - thread % 31 * 192);
    *--top = nullptr;  // the alignment that a call would leave
    *--top = reinterpret_cast<void*>(&start);
    top -= 6;
    memset(top, 0, 6 * sizeof(void*));
    stack_pointers[thread] = top;
#else
    getcontext(&contexts[thread]);
    contexts[thread].uc_stack.ss_sp = stack_of(thread);
    contexts[thread].uc_stack.ss_size = STACK;
    makecontext(&contexts[thread], start, 0);
#endif
}

// ---- memory --------------------------------------------------------------------------------------------------------------------------

#if !defined(STANDIN_CHECKED)
void access(const void*, size_t, bool) {}
void expect_shared(const void*, const char*) {}
template <typename T>
T atomic_min(T* at, T value) {
    T old = *at;
    if (value < old) *at = value;
    return old;
}
#else
// "byte 4 of shared memory", "byte 4 of allocation 1, which has 256".
std::string place(uintptr_t at) {
    if (shared.start && at + GUARD >= shared.start && at < shared.start + shared.bytes + GUARD)
        return "byte " + std::to_string(intptr_t(at - shared.start)) + " of shared memory, which has " + std::to_string(shared.bytes);
    return memory::describe(at);
}

bool is_shared(uintptr_t at) { return at - shared.start < shared.bytes; }

// `other` did something in this epoch of the block: is what this thread does now ordered behind it?
bool is_ordered(uint16_t other, uint8_t other_warp, uint32_t in_warp) {
    if (other == current) return true;
    return other_warp == current / WARP && in_warp < warps[current / WARP].epoch;
}

// `allocation_op` allocated global memory; 0 for shared memory.
void touch(Cell* cells, uint32_t allocation_op, uintptr_t at, size_t bytes, bool is_write) {
    const bool in_shared = allocation_op == 0;
    const char* what = is_write ? "write" : "read";
    uint8_t warp = uint8_t(current / WARP);
    const uintptr_t first = at / GRANULE;
    for (uintptr_t g = first; g <= (at + bytes - 1) / GRANULE; g++) {
        Cell& cell = cells[g - first];
        auto where = [&](const char* problem, int other) {
            const std::string text = place(g * GRANULE);
            if (other == MANY) fail("%s at %s: %s several threads", what, text.c_str(), problem);
            fail("%s at %s: %s thread %d", what, text.c_str(), problem, other);
        };
        if (const uint32_t other = in_shared ? 0 : memory::unordered(cell, allocation_op, is_write))
            fail("%s at %s: not ordered with %s", what, place(g * GRANULE).c_str(), streams::describe(other).c_str());
        if (!is_write && !cell.is_valid) fail("read at %s, which nobody wrote", place(g * GRANULE).c_str());
        if (cell.written == epoch && !is_ordered(cell.writer, uint8_t(cell.writer / WARP), cell.written_in_warp))
            where("a race with the write of", cell.writer);
        if (cell.written >= launch_epoch && cell.written < block_epoch && !in_shared) where("a race with another block's write, of its", cell.writer);
        if (is_write) {
            if (cell.read == epoch && !is_ordered(cell.reader, cell.reader_warp, cell.read_in_warp))
                where("a race with the read of", cell.reader);
            if (cell.read >= launch_epoch && cell.read < block_epoch && !in_shared) where("a race with another block's read, of its", cell.reader);
            cell.is_valid = true;
            cell.written = epoch;
            cell.written_in_warp = warps[warp].epoch;
            cell.writer = uint16_t(current);
        } else if (cell.read != epoch) {
            cell.read = epoch;
            cell.reader = uint16_t(current);
            cell.reader_warp = warp;
            cell.read_in_warp = warps[warp].epoch;
        } else if (cell.reader != current) {
            if (cell.reader_warp != warp) cell.reader_warp = 0xff;
            cell.reader = MANY;
            cell.read_in_warp = warps[warp].epoch;
        } else {
            cell.read_in_warp = warps[warp].epoch;
        }
        if (!in_shared) memory::mark(cell, is_write);
    }
    counts[(in_shared ? 2 : 0) + is_write] += bytes;
}

// The allocation of an access to global memory that is within its bounds.
const memory::Allocation& expect_allocated(uintptr_t at, size_t bytes, const char* what) {
    static const memory::Allocation* last;
    static uint32_t last_launch;
    if (last_launch != launch_epoch || !last || at - last->start >= last->bytes) last = memory::find(at);
    last_launch = launch_epoch;
    if (!last || last->freed_by || bytes > last->bytes - (at - last->start)) fail("%s of %zu bytes at %s", what, bytes, place(at).c_str());
    return *last;
}

void access(const void* pointer, size_t bytes, bool is_write) {
    uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (at - reinterpret_cast<uintptr_t>(stack_of(current)) < STACK) return;
    if (!is_write && at - reinterpret_cast<uintptr_t>(kernel_args) < kernel_args_bytes) return;
    const char* what = is_write ? "write" : "read";
    if (at % bytes) fail("%s of %zu bytes at %s, is not aligned", what, bytes, place(at).c_str());
    if (!is_shared(at)) return touch(memory::cells(at), expect_allocated(at, bytes, what).op, at, bytes, is_write);
    if (bytes > shared.bytes - (at - shared.start)) fail("%s of %zu bytes at %s", what, bytes, place(at).c_str());
    touch(shared.cells + (at - shared.start) / GRANULE, 0, at, bytes, is_write);
}

void expect_shared(const void* pointer, const char* what) {
    uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
    if (at % 16) fail("%s at an address that is not a multiple of 16", what);
    if (at - shared.start + 16 > shared.bytes) fail("%s of 16 bytes at %s", what, place(at).c_str());
}

template <typename T>
T atomic_min(T* at, T value) {
    uintptr_t address = reinterpret_cast<uintptr_t>(at);
    if (address % sizeof(T)) fail("an atomic of %zu bytes at %s, is not aligned", sizeof(T), place(address).c_str());
    const uint32_t allocation_op = expect_allocated(address, sizeof(T), "an atomic").op;
    Cell* cells = memory::cells(address);
    for (size_t i = 0; i < sizeof(T) / GRANULE; i++) {
        if (!cells[i].is_valid) fail("an atomic at %s, which nobody wrote", place(address).c_str());
        if (const uint32_t other = memory::unordered(cells[i], allocation_op, true))
            fail("an atomic at %s: not ordered with %s", place(address).c_str(), streams::describe(other).c_str());
        memory::mark(cells[i], true);
    }
    T old = *at;
    if (value < old) *at = value;
    return old;
}
#endif

// ---- warps ---------------------------------------------------------------------------------------------------------------------------

float half_value(uint32_t bits, bool is_bf16) {
    if (!is_bf16) return shim_f16_to_f32(uint16_t(bits));
    return __uint_as_float(bits << 16);
}

#if !defined(STANDIN_CHECKED)
uint64_t bits_of(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
double of_bits(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// As tensor cores add (measured by Fasi et al. 2021, doi:10.7717/peerj-cs.330): what is added is aligned to the largest of it, and bits below the
// last of 24 are cut off, as are those of the sum. Real ones keep 0 to 3 bits more.
float add_up(const double (&terms)[17]) {
    uint64_t exponent = 0;
    for (double term : terms) {
        const uint64_t own = bits_of(term) >> 52 & 0x7ff;
        exponent = own > exponent ? own : exponent;
    }
    // Infinities and NaN; and nothing but zeros, since what is multiplied has far smaller exponents than a double may.
    if (exponent == 0x7ff || exponent < 64) {
        float sum = 0.0f;
        for (double term : terms) sum += float(term);
        return sum;
    }
    const double unit = of_bits((exponent - 23) << 52), inverse = of_bits((2046 + 23 - exponent) << 52);
    int32_t units = 0;  // each below 2^24
    for (double term : terms) units += int32_t(term * inverse);
    const double sum = double(units) * unit;
    const float rounded = float(sum);
    return fabs(double(rounded)) > fabs(sum) ? __uint_as_float(__float_as_uint(rounded) - 1) : rounded;
}
#endif

void multiply(Warp& warp) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, place = lane % 4;
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[group + 8 * (i % 2)][2 * place + 8 * (i / 2) + half] = half_value(warp.a[lane][i] >> 16 * half & 0xffff, warp.flag);
        for (int i = 0; i < 2; i++)
            for (int half = 0; half < 2; half++) b[2 * place + 8 * i + half][group] = half_value(warp.b[lane][i] >> 16 * half & 0xffff, warp.flag);
    }
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, place = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = group + 8 * (i / 2), column = 2 * place + i % 2;
#if !defined(STANDIN_CHECKED)
            double terms[17] = {warp.c[lane][i]};
            for (int k = 0; k < 16; k++) terms[k + 1] = double(a[row][k]) * double(b[k][column]);
            warp.c[lane][i] = add_up(terms);
#else
            float sum = warp.c[lane][i];
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            warp.c[lane][i] = sum;
#endif
        }
    }
}

void spread(Warp& warp) {
    for (int lane = 0; lane < WARP; lane++) {
        int group = lane / 4, place = lane % 4;
        for (int m = 0; m < 4; m++) {
            auto element = [&](int row, int column) -> uint32_t {
                uint16_t bits;
                memcpy(&bits, warp.row[8 * m + row] + 2 * column, 2);
                return bits;
            };
            uint32_t lo = warp.flag ? element(2 * place, group) : element(group, 2 * place);
            uint32_t hi = warp.flag ? element(2 * place + 1, group) : element(group, 2 * place + 1);
            warp.r[lane][m] = lo | hi << 16;
        }
    }
}

// All lanes of the warp come here with the same operation; the last does it for all.
void in_warp(Operation operation, unsigned lanes) {
    Warp& warp = warps[current / WARP];
    if (lanes != 0xffffffffu) fail("a warp operation of some lanes (%08x) only", lanes);
    if (warp.arrived > 0 && warp.operation != operation) fail("lanes of a warp are at different operations (%d and %d)", warp.operation, operation);
    warp.operation = operation;
    if (++warp.arrived < WARP) {
        states[current] = IN_WARP;
        to_scheduler();
        return;
    }
    warp.arrived = 0;
    switch (operation) {
        case SYNC:
            warp.epoch++;
            break;
        case SHUFFLE: {
            uint64_t values[WARP];
            memcpy(values, warp.value, sizeof values);
            for (int lane = 0; lane < WARP; lane++) warp.value[lane] = values[warp.from[lane] & (WARP - 1)];
            break;
        }
        case BALLOT: {
            uint64_t bits = 0;
            for (int lane = 0; lane < WARP; lane++) bits |= uint64_t(warp.value[lane] != 0) << lane;
            for (int lane = 0; lane < WARP; lane++) warp.value[lane] = bits;
            break;
        }
        case MMA:
            multiply(warp);
            break;
        case MATRICES:
            spread(warp);
            break;
    }
    for (int lane = 0; lane < WARP; lane++) states[current / WARP * WARP + lane] = RUNNABLE;
}

// ---- blocks --------------------------------------------------------------------------------------------------------------------------

// Runs one block; `order` shuffles its threads.
void run_block(int order) {
    block_epoch = ++epoch;
    if (shared.cells) memset(static_cast<void*>(shared.cells), 0, (shared.bytes / GRANULE + 1) * sizeof(Cell));
    memset(shared.memory, 0xff, shared.bytes);
    static int sequence[MAX_THREADS];
    for (int i = 0; i < num_threads; i++) {
        prepare(i);
        sequence[i] = order == 0 ? i : order == 1 ? num_threads - 1 - i : (i * 389 + order) % num_threads;
    }
    for (Warp& warp : warps) warp.arrived = 0, warp.epoch = 1;
    int finished = 0;
    while (finished < num_threads) {
        bool moved = false;
        for (int i = 0; i < num_threads && !failed; i++) {
            const int thread = sequence[i];
            if (states[thread] != RUNNABLE) continue;
            run(thread);
            moved = true;
        }
        if (failed) return;
        int waiting = finished = 0;
        for (int i = 0; i < num_threads; i++) {
            waiting += states[i] == AT_BARRIER;
            finished += states[i] == FINISHED;
        }
        if (waiting == num_threads) {
            epoch++;
            for (int i = 0; i < num_threads; i++) states[i] = RUNNABLE;
            for (Warp& warp : warps) warp.epoch = 1;
        } else if (!moved && finished < num_threads) {
            failed = true;
            snprintf(message, sizeof message, "block (%d, %d, %d): %d of %d threads wait at a barrier and %d have ended: not all come to it",
                     block.x, block.y, block.z, waiting, num_threads, finished);
            return;
        }
    }
}

}  // namespace

// ---- what kernels call ---------------------------------------------------------------------------------------------------------------

extern "C" {

shim_index shim_thread_index() { return {current, 0, 0}; }
shim_index shim_block_index() { return block; }
shim_index shim_block_size() { return {num_threads, 1, 1}; }
shim_index shim_grid_size() { return grid; }
unsigned char* shim_shared_memory() { return shared.memory; }

void shim_sync_block() {
    states[current] = AT_BARRIER;
    to_scheduler();
}
void shim_sync_warp(unsigned lanes) { in_warp(SYNC, lanes); }
uint64_t shim_shuffle(unsigned lanes, uint64_t value, int from) {
    Warp& warp = warps[current / WARP];
    warp.value[current % WARP] = value;
    warp.from[current % WARP] = from;
    in_warp(SHUFFLE, lanes);
    return warp.value[current % WARP];
}
unsigned shim_ballot(unsigned lanes, bool value) {
    Warp& warp = warps[current / WARP];
    warp.value[current % WARP] = value;
    in_warp(BALLOT, lanes);
    return unsigned(warp.value[current % WARP]);
}
void shim_mma(float* c, const uint32_t* a, const uint32_t* b, bool is_bf16) {
    Warp& warp = warps[current / WARP];
    int lane = current % WARP;
    warp.c[lane] = c, warp.a[lane] = a, warp.b[lane] = b, warp.flag = is_bf16;
    in_warp(MMA, 0xffffffffu);
}
void shim_load_matrices(uint32_t* r, const void* row, bool transposed) {
    expect_shared(row, "a row of a matrix");
    access(row, 16, false);
    Warp& warp = warps[current / WARP];
    int lane = current % WARP;
    warp.r[lane] = r, warp.row[lane] = static_cast<const unsigned char*>(row), warp.flag = transposed;
    in_warp(MATRICES, 0xffffffffu);
}

#if defined(STANDIN_CHECKED)
void shim_load(void* to, const void* from, int bytes) {
    access(from, size_t(bytes), false);
    memcpy(to, from, size_t(bytes));
}
void shim_store(void* to, const void* from, int bytes) {
    access(to, size_t(bytes), true);
    memcpy(to, from, size_t(bytes));
}
// The data comes at the wait, and until then what is there may not be read.
void shim_copy_async(void* to, const void* global, bool is_there) {
    Copies& own = copies[current];
    expect_shared(to, "an asynchronous copy");
    if (is_there) access(global, 16, false);
    access(to, 16, true);
    counts[3] -= 16;
    for (int i = 0; i < 8; i++) shared.cells[(reinterpret_cast<uintptr_t>(to) - shared.start) / GRANULE + size_t(i)].is_valid = false;
    if (own.num == MAX_COPIES) fail("more than %d asynchronous copies", MAX_COPIES);
    own.all[own.num++] = {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(global), is_there, own.group};
}
void shim_copy_async_commit() { copies[current].group++; }
void shim_copy_async_wait(int open) {
    Copies& own = copies[current];
    int kept = 0;
    for (int i = 0; i < own.num; i++) {
        const Copy& copy = own.all[i];
        if (copy.group >= own.group - open) {
            own.all[kept++] = copy;
            continue;
        }
        access(copy.to, 16, true);
        if (copy.is_there) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    own.num = kept;
}
#endif
uint32_t shim_atomic_min(uint32_t* at, uint32_t value) { return atomic_min(at, value); }
unsigned long long shim_atomic_min_64(unsigned long long* at, unsigned long long value) { return atomic_min(at, value); }

float shim_f16_to_f32(uint16_t bits) { return half::from_f16(bits); }
uint16_t shim_f32_to_f16(float x) { return half::to_f16(x); }
uint16_t shim_f32_to_bf16(float x) { return half::to_bf16(x); }

#if defined(STANDIN_CHECKED)
// ---- what -fsanitize=thread calls ----------------------------------------------------------------------------------------------------

#define ACCESS(bytes)                                                      \
    void __tsan_read##bytes(void* at) { access(at, bytes, false); }        \
    void __tsan_write##bytes(void* at) { access(at, bytes, true); }        \
    void __tsan_unaligned_read##bytes(void* at) { access(at, bytes, false); } \
    void __tsan_unaligned_write##bytes(void* at) { access(at, bytes, true); } \
    void __tsan_read_write##bytes(void* at) {                              \
        access(at, bytes, false);                                          \
        access(at, bytes, true);                                           \
    }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// ---- what tests call -------------------------------------------------------------------------------------------------------------

// Bytes that kernels read and wrote in global memory, read and wrote in shared memory, since the last call.
void shim_take_counts(uint64_t* to) {
    memcpy(to, counts, sizeof counts);
    memset(counts, 0, sizeof counts);
}
#endif

// Null, or what went wrong.
const char* shim_launch(void (*function)(const void*), const int* grid_size, int threads, size_t shared_bytes, const void* args,
                        size_t args_bytes, int order) {
    if (!stacks)
        stacks = static_cast<unsigned char*>(
            mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    failed = false;
    kernel_function = function, kernel_args = static_cast<const unsigned char*>(args), kernel_args_bytes = args_bytes;
    num_threads = threads;
    grid = {grid_size[0], grid_size[1], grid_size[2]};
    unsigned char* all = static_cast<unsigned char*>(aligned_alloc(256, (shared_bytes + 2 * GUARD + 255) / 256 * 256));
    shared.memory = all + GUARD;
    shared.start = reinterpret_cast<uintptr_t>(shared.memory);
    shared.bytes = shared_bytes;
#if defined(STANDIN_CHECKED)
    shared.cells = static_cast<Cell*>(calloc(shared_bytes / GRANULE + 1, sizeof(Cell)));
#endif
    launch_epoch = ++epoch;
    long num_blocks = long(grid.x) * grid.y * grid.z;
    // A prime stride visits each block once, unless it divides their number.
    const long stride = num_blocks % 7919 ? 7919 : 1;
    for (long i = 0; i < num_blocks && !failed; i++) {
        const long at = order == 0 ? i : order == 1 ? num_blocks - 1 - i : (i * stride + order) % num_blocks;
        block = {int(at % grid.x), int(at / grid.x % grid.y), int(at / grid.x / grid.y)};
        run_block(order);
    }
    free(all);
    free(shared.cells);
    shared.start = 0, shared.bytes = 0;
    return failed ? message : nullptr;
}
}
