#include "memory.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <vector>

namespace memory {
namespace {

constexpr size_t ARENA = size_t(32) << 30, STEP = 256;
constexpr int POISON = 0xff;
#if defined(STANDIN_CHECKED)
// Freed memory that is not given out again: who still uses it is found.
constexpr size_t KEPT = size_t(64) << 20;
#else
constexpr size_t KEPT = 0;
#endif

unsigned char* reserve(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        fprintf(stderr, "stand-in driver: the system does not let it reserve %zu bytes of addresses\n", bytes);
        _exit(1);
    }
    return static_cast<unsigned char*>(at);
}

struct Arena {
    unsigned char* memory = reserve(ARENA);
    // By STEP: the number of the allocation, 0 for none.
    uint32_t* owners = reinterpret_cast<uint32_t*>(reserve(ARENA / STEP * sizeof(uint32_t)));
#if defined(STANDIN_CHECKED)
    Cell* cells = reinterpret_cast<Cell*>(reserve(ARENA / GRANULE * sizeof(Cell)));
#endif
    size_t used = GAP, held = 0, kept = 0;
    std::deque<Allocation> allocations = std::deque<Allocation>(1);
    // By size, what may be given out again; in the order in which it was freed, what may not yet.
    std::map<size_t, std::vector<Address>> free;
    std::deque<std::pair<Address, size_t>> quarantine;

    Address start() const { return Address(memory); }
};

Arena& arena() {
    static Arena* the = new Arena;
    return *the;
}

size_t rounded(size_t bytes) { return (bytes + STEP - 1) / STEP * STEP; }

}  // namespace

Address allocate(size_t bytes) {
    Arena& a = arena();
    const size_t size = rounded(bytes);
    Address at = 0;
    auto& free = a.free[size];
    if (!free.empty()) {
        at = free.back();
        free.pop_back();
    } else {
        if (a.used + size + GAP > ARENA) return 0;
        at = a.start() + a.used;
        a.used += size + GAP;
        memset(reinterpret_cast<void*>(at), POISON, size + GAP);
    }
    const uint32_t number = uint32_t(a.allocations.size());
    a.allocations.push_back({number, at, bytes, 0, 0, false, nullptr});
    for (size_t i = 0; i < size / STEP; i++) a.owners[(at - a.start()) / STEP + i] = number;
    a.held += size;
    return at;
}

void allocated_by(Address at, uint32_t op, void* device) {
    find(at)->op = op;
    find(at)->device = device;
}

Allocation* find(Address at) {
    Arena& a = arena();
    if (at - a.start() >= ARENA) return nullptr;
    const uint32_t number = a.owners[(at - a.start()) / STEP];
    if (!number) return nullptr;
    Allocation& found = a.allocations[number];
    return at - found.start < found.bytes ? &found : nullptr;
}

std::string describe(Address at) {
    Arena& a = arena();
    // The bytes of an allocation, then those behind it, then those before one.
    for (Address back = 0; at - a.start() < ARENA && back <= GAP; back += STEP) {
        for (const Address near : {at - back, at + back}) {
            const uint32_t number = near - a.start() < ARENA ? a.owners[(near - a.start()) / STEP] : 0;
            if (!number) continue;
            const Allocation& found = a.allocations[number];
            std::string text = "byte " + std::to_string(int64_t(at - found.start)) + " of allocation " + std::to_string(number) + ", which has " +
                               std::to_string(found.bytes);
            if (found.freed_by) text += " and was freed by " + streams::describe(found.freed_by);
            return text;
        }
    }
    char text[64];
    snprintf(text, sizeof text, "%p, which is in no allocation", reinterpret_cast<void*>(at));
    return text;
}

bool is_allocated(Address at, size_t bytes) {
    const Allocation* found = find(at);
    return found && !found->free_is_queued && bytes <= found->bytes - (at - found->start);
}

size_t num_held() { return arena().held; }

std::string release(Address at) {
    Arena& a = arena();
    Allocation& allocation = *find(at);
    const size_t size = rounded(allocation.bytes);
#if defined(STANDIN_CHECKED)
    Cell* first = cells(at);
    for (size_t i = 0; i * GRANULE < allocation.bytes; i++)
        if (const uint32_t other = unordered(first[i], allocation.op, true))
            return "frees " + describe(at + i * GRANULE) + ", not ordered with " + streams::describe(other);
    memset(static_cast<void*>(first), 0, size / GRANULE * sizeof(Cell));
#endif
    allocation.freed_by = streams::running()->id;
    memset(reinterpret_cast<void*>(at), POISON, size);
    a.held -= size;
    a.kept += size;
    a.quarantine.push_back({at, size});
    while (a.kept > KEPT) {
        auto [start, bytes] = a.quarantine.front();
        a.quarantine.pop_front();
        a.kept -= bytes;
        a.free[bytes].push_back(start);
    }
    return "";
}

std::string touch(Address at, size_t bytes, bool is_write) {
    if (bytes == 0) return "";
    const char* what = is_write ? "writes " : "reads ";
    const Allocation* allocation = find(at);
    if (!allocation || allocation->freed_by || bytes > allocation->bytes - (at - allocation->start))
        return what + std::to_string(bytes) + " bytes from " + describe(at);
#if defined(STANDIN_CHECKED)
    Cell* first = cells(at);
    const size_t count = (at % GRANULE + bytes + GRANULE - 1) / GRANULE;
    for (size_t i = 0; i < count; i++) {
        Cell& cell = first[i];
        if (const uint32_t other = unordered(cell, allocation->op, is_write))
            return what + describe(at + i * GRANULE) + ", not ordered with " + streams::describe(other);
        if (!is_write && !cell.is_valid) return "reads what nobody wrote: " + describe(at + i * GRANULE);
        mark(cell, is_write);
    }
#endif
    return "";
}

#if defined(STANDIN_CHECKED)
Cell* cells(Address at) { return arena().cells + (at - arena().start()) / GRANULE; }

void mark(Cell& cell, bool is_write) {
    const Op& op = *streams::running();
    if (is_write) {
        cell.writer_op = op.id;
        cell.is_valid = true;
    } else if (cell.reader_op != op.id) {
        if (!streams::is_before_running(cell.reader_op)) cell.other_reader_op = cell.reader_op;
        cell.reader_op = op.id;
    }
}
#endif

// ---- pinned memory of the host -------------------------------------------------------------------------------------------------------

namespace {

struct Lent {
    unsigned char* at;
    size_t bytes;
    uint32_t op;
    bool is_written;
};

std::map<uintptr_t, size_t> pinned;
// Read by the handler of a signal, which may come while it is written: only if the driver itself touches what it has lent.
std::vector<Lent> lent;
struct sigaction before;
const uintptr_t PAGE = 4096;

bool overlap(const Lent& range, uintptr_t at, size_t bytes) { return uintptr_t(range.at) < at + bytes && at < uintptr_t(range.at) + range.bytes; }

// Calls `of` with each page that holds a part of these bytes.
template <typename F>
void each_page(const void* at, size_t bytes, F of) {
    for (uintptr_t page = uintptr_t(at) / PAGE * PAGE; page < uintptr_t(at) + bytes; page += PAGE) of(page);
}

void set(uintptr_t page, int access) { mprotect(reinterpret_cast<void*>(page), PAGE, access); }

// What the host may do with these bytes' pages, as far as pages can say it.
void protect(const void* at, size_t bytes) {
    each_page(at, bytes, [](uintptr_t page) {
        int access = PROT_READ | PROT_WRITE;
        for (const Lent& range : lent)
            if (overlap(range, page, PAGE)) access &= range.is_written ? PROT_NONE : PROT_READ;
        set(page, access);
    });
}

void unprotect(const void* at, size_t bytes) {
    each_page(at, bytes, [](uintptr_t page) { set(page, PROT_READ | PROT_WRITE); });
}

void on_fault(int signal, siginfo_t* info, void* context) {
    const uintptr_t at = uintptr_t(info->si_addr);
    bool is_page = false;
    for (const Lent& range : lent) {
        if (overlap(range, at, 1)) {
            const std::string text = "stand-in driver: the host touches byte " + std::to_string(at - uintptr_t(range.at)) +
                                     " of pinned memory before it waited for " + streams::describe(range.op) + "\n";
            if (write(2, text.data(), text.size()) < 0) _exit(3);
            _exit(3);
        }
        is_page |= overlap(range, at / PAGE * PAGE, PAGE);
    }
    // Something else on the same page: until the page's next copy it is not watched.
    if (is_page) return set(at / PAGE * PAGE, PROT_READ | PROT_WRITE);
    if (before.sa_flags & SA_SIGINFO && before.sa_sigaction) return before.sa_sigaction(signal, info, context);
    sigaction(signal, &before, nullptr);
}

}  // namespace

void* pin(size_t bytes) {
    static const bool is_watched = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        return sigaction(SIGSEGV, &action, &before) == 0;
    }();
    if (!is_watched) return nullptr;
    void* at = reserve((bytes + PAGE - 1) / PAGE * PAGE);
    memset(at, POISON, bytes);
    pinned[uintptr_t(at)] = bytes;
    return at;
}

Result unpin(void* at) {
    auto found = pinned.find(uintptr_t(at));
    if (found == pinned.end()) return refuse(INVALID_VALUE, "freeing pinned memory that is not there");
    for (const Lent& range : lent)
        if (uintptr_t(range.at) - found->first < found->second) {
            fault = ILLEGAL_ADDRESS;
            return refuse(fault, "pinned memory is freed before the host waited for " + streams::describe(range.op));
        }
    munmap(at, (found->second + PAGE - 1) / PAGE * PAGE);
    pinned.erase(found);
    return SUCCESS;
}

bool is_pinned(const void* at, size_t bytes) {
    auto next = pinned.upper_bound(uintptr_t(at));
    if (next == pinned.begin()) return false;
    auto [start, size] = *--next;
    return uintptr_t(at) - start <= size && bytes <= size - (uintptr_t(at) - start);
}

void lend_host(void* at, size_t bytes, uint32_t op, bool is_written) {
    if (is_written) {
        unprotect(at, bytes);
        memset(at, POISON, bytes);
    }
    lent.push_back({static_cast<unsigned char*>(at), bytes, op, is_written});
    protect(at, bytes);
}

void copy_to_host(void* to, const void* from, size_t bytes) {
    unprotect(to, bytes);
    memcpy(to, from, bytes);
    protect(to, bytes);
}

void copy_from_host(void* to, const void* from, size_t bytes) {
    unprotect(from, bytes);
    memcpy(to, from, bytes);
    protect(from, bytes);
}

void take_back() {
    for (size_t i = lent.size(); i-- > 0;) {
        const Lent range = lent[i];
        if (!streams::host_knows_of(range.op)) continue;
        lent.erase(lent.begin() + long(i));
        protect(range.at, range.bytes);
    }
}

}  // namespace memory
