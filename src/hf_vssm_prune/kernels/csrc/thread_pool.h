// A pool of sleeping threads: no spinning, so that a busy machine does not turn a kernel of 1 ms into one of 8.
#pragma once

#include <cstdint>
#include <functional>

// Calls task(0), ..., task(count - 1), shared out to at most `threads` threads, and returns when all are done.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);
