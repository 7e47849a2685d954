#include "streams.h"

#include "memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <deque>
#include <map>

std::recursive_mutex one_at_a_time;
Result fault = SUCCESS;

Result refuse(Result code, const std::string& why) {
    fprintf(stderr, "stand-in driver: %s\n", why.c_str());
    return code;
}

namespace streams {
namespace {

struct Stream {
    bool is_legacy, is_destroyed = false;
    std::deque<std::shared_ptr<Op>> queue;
    std::shared_ptr<Op> last;
    Clock clock;
    // What the next operation has to wait for.
    std::vector<std::shared_ptr<Op>> after;
};

// Number 0 is the legacy stream.
std::vector<Stream> streams = {Stream{true, false, {}, nullptr, {}, {}}};
Clock host;
// By id: the stream and the place of each operation, and what it was.
struct Past {
    int stream;
    uint32_t place;
    std::string what;
};
std::vector<Past> past(1);
const Op* now = nullptr;

uint64_t seed() {
    static const uint64_t value = [] {
        const char* text = getenv("GLMDDP_STANDIN_SEED");
        return text ? strtoull(text, nullptr, 10) : 1;
    }();
    return value;
}

void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); i++)
        if (to[i] < from[i]) to[i] = from[i];
}

int number(void* handle) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(handle);
    if (at == 0 || at == 1) return 0;
    if (at == 2) {
        thread_local const int own = int(reinterpret_cast<uintptr_t>(create(true)) / 256);
        return own;
    }
    const size_t i = at / 256;
    if (at % 256 || i >= streams.size() || streams[i].is_destroyed) return -1;
    return int(i);
}

bool may_run(const Op& op) {
    if (op.never_ends) return false;
    for (const auto& before : op.after)
        if (!before->is_done) return false;
    return true;
}

// One of the operations that may run, or null.
std::shared_ptr<Op> next() {
    std::vector<Stream*> ready;
    for (Stream& stream : streams)
        if (!stream.queue.empty() && may_run(*stream.queue.front())) ready.push_back(&stream);
    if (ready.empty()) return nullptr;
    Stream& stream = *ready[draw(uint32_t(ready.size()))];
    auto op = stream.queue.front();
    stream.queue.pop_front();
    return op;
}

void run(Op& op) {
    if (!fault) {
        now = &op;
        const std::string problem = op.run ? op.run() : "";
        now = nullptr;
        if (!problem.empty()) {
            fault = ILLEGAL_ADDRESS;
            refuse(fault, describe(op.id) + ": " + problem);
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &op.ended);
    op.is_done = true;
    op.run = nullptr;
    op.after.clear();
}

}  // namespace

void* create(bool is_legacy) {
    streams.push_back(Stream{is_legacy, false, {}, nullptr, {}, {}});
    return reinterpret_cast<void*>((streams.size() - 1) * 256);
}

Result destroy(void* handle) {
    const int i = number(handle);
    if (i <= 0) return refuse(INVALID_HANDLE, "destroying a stream that is not there");
    streams[size_t(i)].is_destroyed = true;  // what it holds runs all the same
    return SUCCESS;
}

std::shared_ptr<Op> queue(void* handle, const std::string& what, std::function<std::string()> run) {
    const int i = number(handle);
    if (i < 0) {
        refuse(INVALID_HANDLE, what + " on a stream that is not there");
        return nullptr;
    }
    Stream& stream = streams[size_t(i)];
    auto op = std::make_shared<Op>();
    op->id = uint32_t(past.size());
    op->what = what;
    op->stream = i;
    op->run = std::move(run);
    op->after.swap(stream.after);
    // The legacy stream and those that have not opted out of it wait for each other.
    for (size_t other = 0; other < streams.size() && stream.is_legacy; other++) {
        const bool waits = int(other) != i && streams[other].is_legacy && (i == 0 || other == 0);
        if (!waits || !streams[other].last) continue;
        join(stream.clock, streams[other].last->clock);
        if (!streams[other].last->is_done) op->after.push_back(streams[other].last);
    }
    join(stream.clock, host);
    if (stream.clock.size() <= size_t(i)) stream.clock.resize(size_t(i) + 1);
    op->place = ++stream.clock[size_t(i)];
    op->clock = stream.clock;
    past.push_back({i, op->place, what});
    stream.queue.push_back(op);
    stream.last = op;
    return op;
}

Result wait_for(void* handle, const std::shared_ptr<Op>& op) {
    const int i = number(handle);
    if (i < 0) return refuse(INVALID_HANDLE, "a stream that is not there waits for an event");
    // An event that was never recorded is no reason to wait.
    if (!op) return SUCCESS;
    join(streams[size_t(i)].clock, op->clock);
    if (!op->is_done) streams[size_t(i)].after.push_back(op);
    return SUCCESS;
}

void host_knows(const Op& op) {
    join(host, op.clock);
    memory::take_back();
}

bool host_knows_of(uint32_t id) {
    const Past& op = past[id];
    return size_t(op.stream) < host.size() && op.place <= host[size_t(op.stream)];
}

bool progress() {
    auto op = next();
    if (op) run(*op);
    return op != nullptr;
}

// By value: while the lock is released, who gave it may change or go.
Result complete(std::shared_ptr<Op> op) {
    while (op && !op->is_done) {
        if (auto next_op = next()) {
            run(*next_op);
            continue;
        }
        // It waits for something that never ends, and so does the host: but other threads may go on.
        one_at_a_time.unlock();
        usleep(1000);
        one_at_a_time.lock();
    }
    if (op) host_knows(*op);
    return fault;
}

Result complete_stream(void* handle) {
    const int i = number(handle);
    if (i < 0) return refuse(INVALID_HANDLE, "waiting for a stream that is not there");
    if (i == 0)
        for (size_t other = 1; other < streams.size(); other++)
            if (streams[other].is_legacy) complete(streams[other].last);
    return complete(streams[size_t(i)].last);
}

Result complete_all() {
    for (size_t i = 0; i < streams.size(); i++) complete(streams[i].last);
    return fault;
}

size_t num_queued() {
    size_t n = 0;
    for (const Stream& stream : streams) n += stream.queue.size();
    return n;
}

const Op* running() { return now; }

bool is_before_running(uint32_t id) {
    if (id == 0 || id == now->id) return true;
    const Past& op = past[id];
    return op.stream == now->stream ? op.place < now->place : size_t(op.stream) < now->clock.size() && op.place <= now->clock[size_t(op.stream)];
}

std::string describe(uint32_t id) {
    const Past& op = past[id];
    return op.what + " (operation " + std::to_string(id) + ", stream " + std::to_string(op.stream) + ")";
}

bool is_seeded() { return seed() != 0; }

uint32_t draw(uint32_t n) {
    if (!is_seeded() || n < 2) return 0;
    static uint64_t state = seed();
    // splitmix64 (Steele, Lea and Flood 2014).
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return uint32_t((x ^ x >> 31) % n);
}

}  // namespace streams
