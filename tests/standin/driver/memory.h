// The memory of a GPU that is not there, and the host's memory that the driver has pinned.
//
// Device memory is the host's, in one arena: fresh and freed memory is filled with 0xff bytes, which are NaN in every type of floats and no index.
// In the checked build (STANDIN_CHECKED) each two bytes have a cell that says who wrote and read them last, so that an access is held against the
// bounds of its allocation, against what nobody wrote, and against the operations with which it is not ordered.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>

#include "streams.h"

namespace memory {

constexpr size_t GRANULE = 2;
// Memory behind an allocation that belongs to none.
constexpr size_t GAP = 4096;

// What is known of a granule. Epochs and threads are those of blocks.cpp, operations those of streams.h; 0 is none.
struct Cell {
    uint32_t written, written_in_warp, read, read_in_warp;
    // The last that wrote, the last that read, and the last of another stream that read.
    uint32_t writer_op, reader_op, other_reader_op;
    uint16_t writer, reader;
    uint8_t reader_warp;
    bool is_valid;
};

struct Allocation {
    // From 1, in the order of allocation.
    uint32_t number;
    Address start;
    size_t bytes;
    // The operations that allocated and freed it; the latter once it has run.
    uint32_t op, freed_by;
    bool free_is_queued;
    // Of which device.
    void* device;
};

// Memory that nobody has written, multiples of 256 bytes apart; 0 when the arena is full.
Address allocate(size_t bytes);
// Whose operation allocates it.
void allocated_by(Address at, uint32_t op, void* device);
// The allocation that `at` lies in, or, freed but not used again, did; null if in none.
Allocation* find(Address at);
// "allocation 3, of 256 bytes", with where `at` is in it, or where it would be.
std::string describe(Address at);
// Are `bytes` from `at` within an allocation that no queued operation frees?
bool is_allocated(Address at, size_t bytes);
// Frees what starts at `at`, for the operation that runs: it is as a write to all of it. What went wrong, or nothing.
std::string release(Address at);
// The operation that runs reads or writes bytes. What is wrong with that, or nothing.
std::string touch(Address at, size_t bytes, bool is_write);
// Bytes that hold memory now, whether it is queued to be freed or not.
size_t num_held();

#if defined(STANDIN_CHECKED)
Cell* cells(Address at);
// The operation with which an access of the running one to `cell` is not ordered; 0 for none. What nobody wrote was allocated by `allocation_op`.
inline uint32_t unordered(const Cell& cell, uint32_t allocation_op, bool is_write) {
    const uint32_t before = cell.writer_op ? cell.writer_op : allocation_op;
    if (!streams::is_before_running(before)) return before;
    if (is_write && !streams::is_before_running(cell.reader_op)) return cell.reader_op;
    if (is_write && !streams::is_before_running(cell.other_reader_op)) return cell.other_reader_op;
    return 0;
}
// Notes the running operation in `cell`.
void mark(Cell& cell, bool is_write);
#endif

// ---- pinned memory of the host -------------------------------------------------------------------------------------------------------

void* pin(size_t bytes);
Result unpin(void* at);
bool is_pinned(const void* at, size_t bytes);
// From now on until the host knows that `op` is done it uses these bytes. Those that it will write are poison. A host that touches them, or writes
// what the operation reads, ends the program.
void lend_host(void* at, size_t bytes, uint32_t op, bool is_written);
// What the operation that runs does with bytes that it was lent.
void copy_to_host(void* to, const void* from, size_t bytes);
void copy_from_host(void* to, const void* from, size_t bytes);
// Takes back what operations used that the host knows to be done.
void take_back();

}  // namespace memory
