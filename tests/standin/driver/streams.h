// What the host has queued on a GPU that is not there: operations by stream, what each of them has to wait for, and when they run.
//
// Nothing runs when it is queued. Operations run when somebody waits for one of them, and then in any order that streams and events allow: which of
// those that may run is next is drawn with GLMDDP_STANDIN_SEED. So what a missing event leaves to chance goes wrong here.
//
// A clock says which operations come before another one whatever the order in which they happen to run: for each stream, how many of its
// operations. It grows along a stream, over an event that a stream waits for, and over the host, once it has waited for something.
#pragma once
#include <stdint.h>
#include <time.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

typedef int Result;  // CUresult
typedef uint64_t Address;

enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
};

// How many operations of each stream.
typedef std::vector<uint32_t> Clock;

struct Op {
    // From 1, in the order in which they were queued.
    uint32_t id;
    // For messages: "kernel `x`".
    std::string what;
    int stream;
    // Its place in the stream, from 1.
    uint32_t place;
    Clock clock;
    // Operations of other streams that must be done.
    std::vector<std::shared_ptr<Op>> after;
    // Does it; what went wrong, or nothing.
    std::function<std::string()> run;
    bool never_ends = false, is_done = false;
    timespec ended;
};

// Everything is done under this lock, by whichever thread waits.
extern std::recursive_mutex one_at_a_time;
#define LOCKED std::lock_guard<std::recursive_mutex> lock(one_at_a_time)

// The error that every call returns after a fault, as from a context that is lost.
extern Result fault;

// Says on stderr what was wrong: the driver's codes say little.
Result refuse(Result code, const std::string& why);

// What a call begins with: the error that it was told to give, that of a context that is lost, or that of a thread without one.
extern "C" Result standin_begin(const char* call);

namespace streams {

// Handles: null and 1 are the legacy stream, which waits for all streams that do not opt out, and they for it; 2 is another stream in each thread.
void* create(bool is_legacy);
Result destroy(void* stream);

// Queues an operation; null for a stream that is not there.
std::shared_ptr<Op> queue(void* stream, const std::string& what, std::function<std::string()> run);
// What comes next on a stream waits for `op`.
Result wait_for(void* stream, const std::shared_ptr<Op>& op);

// Runs what must run before `op` is done, and then the host knows that it is. Returns the fault, if there is one.
Result complete(std::shared_ptr<Op> op);
Result complete_stream(void* stream);
Result complete_all();
// Runs one operation, if one may run: whether one did.
bool progress();
// The host has seen that `op` is done, and so is all that comes before it.
void host_knows(const Op& op);
// Has it seen that of operation `id`?
bool host_knows_of(uint32_t id);
size_t num_queued();

// The operation that runs.
const Op* running();
// Is operation `id` before the one that runs, in whatever order they happen to run?
bool is_before_running(uint32_t id);
// "kernel `x` (operation 12, stream 1)".
std::string describe(uint32_t id);
// A number below `n`, by the seed.
uint32_t draw(uint32_t n);
// Without a seed (GLMDDP_STANDIN_SEED=0) nothing is drawn: 0 each time.
bool is_seeded();

}  // namespace streams
