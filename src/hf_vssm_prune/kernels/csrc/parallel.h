// Loops over the threads of PyTorch's own OpenMP runtime.
//
// A pool of our own would compete with them: they go on spinning for a while after PyTorch's last operator.
#pragma once

#include <cstdint>
#include <functional>

// Calls task(0), ..., task(count - 1), shared out to at most `threads` threads, and returns when all are done. Where
// there is no such runtime, and in a forked process, whose copy of it has no threads, the calling thread does it all.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// 1 if there is a runtime.
extern "C" int has_threads();
