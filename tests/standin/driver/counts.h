// What the host asks of the driver, counted from one wait of the host to the next. With GLMDDP_STANDIN_COUNTS=FOLDER each wait appends a line of JSON
// to FOLDER/PID.jsonl; what was asked behind the last wait is the last line, at the process's end.
#pragma once
#include <stddef.h>

#include <string>

namespace counts {

enum Copy { UP_PINNED, UP_PAGEABLE, DOWN_PINNED, DOWN_PAGEABLE, ON_DEVICE, NUM_COPIES };

void launch(const std::string& kernel);
// A product of a library, by its shape.
void product(const std::string& shape);
void copy(Copy kind, size_t bytes);
void fill(size_t bytes);
// `live` is what is allocated after it.
void allocation(size_t bytes, size_t live);
void release(size_t live);
// The host waits: for a stream, an event, a copy to pageable memory or everything.
void wait(const char* call);

}  // namespace counts
