#include "counts.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <map>

namespace counts {
namespace {

struct Sum {
    uint64_t number = 0, bytes = 0;
    void add(size_t more) { number++, bytes += more; }
};

const char* const COPIES[NUM_COPIES] = {"up_pinned", "up_pageable", "down_pinned", "down_pageable", "on_device"};

struct Counts {
    std::map<std::string, uint64_t> launches, products;
    Sum copies[NUM_COPIES], fills, allocations;
    uint64_t frees = 0;
} counts;
size_t live, peak;

std::string object(const std::map<std::string, uint64_t>& numbers) {
    std::string text;
    for (const auto& [name, number] : numbers) text += (text.empty() ? "\"" : ", \"") + name + "\": " + std::to_string(number);
    return "{" + text + "}";
}

std::string object(const Sum& sum) {
    return "{\"number\": " + std::to_string(sum.number) + ", \"bytes\": " + std::to_string(sum.bytes) + "}";
}

FILE* file() {
    static FILE* const to = []() -> FILE* {
        const char* folder = getenv("GLMDDP_STANDIN_COUNTS");
        if (!folder || !*folder) return nullptr;
        const std::string path = std::string(folder) + "/" + std::to_string(getpid()) + ".jsonl";
        FILE* opened = fopen(path.c_str(), "a");
        if (!opened) fprintf(stderr, "stand-in driver: %s cannot be written\n", path.c_str());
        return opened;
    }();
    return to;
}

void end(const char* call) {
    if (FILE* to = file()) {
        std::string line = "{\"wait\": \"" + std::string(call) + "\", \"launches\": " + object(counts.launches) + ", \"products\": " +
                           object(counts.products);
        for (int i = 0; i < NUM_COPIES; i++) line += ", \"" + std::string(COPIES[i]) + "\": " + object(counts.copies[i]);
        line += ", \"fills\": " + object(counts.fills) + ", \"allocations\": " + object(counts.allocations) + ", \"frees\": " +
                std::to_string(counts.frees) + ", \"live\": " + std::to_string(live) + ", \"peak\": " + std::to_string(peak) + "}\n";
        fputs(line.c_str(), to);
        fflush(to);
    }
    counts = Counts();
    peak = live;
}

struct AtExit {
    ~AtExit() { end("exit"); }
} at_exit;

}  // namespace

void launch(const std::string& kernel) { counts.launches[kernel]++; }
void product(const std::string& shape) { counts.products[shape]++; }
void copy(Copy kind, size_t bytes) { counts.copies[kind].add(bytes); }
void fill(size_t bytes) { counts.fills.add(bytes); }
void allocation(size_t bytes, size_t now) {
    counts.allocations.add(bytes);
    live = now;
    if (peak < live) peak = live;
}
void release(size_t now) {
    counts.frees++;
    live = now;
}
void wait(const char* call) { end(call); }

}  // namespace counts
