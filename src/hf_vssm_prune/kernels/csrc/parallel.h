// Loops over the threads of PyTorch's own OpenMP runtime.
//
// A pool of our own would compete with them: they go on spinning for a while after PyTorch's last operator.
#pragma once

#include <cstdint>
#include <functional>
#include <new>

// Calls task(0), ..., task(count - 1), shared out to at most `threads` threads, and returns when all are done. Where
// there is no such runtime, and in a forked process, whose copy of it has no threads, the calling thread does it all.
// Throws std::bad_alloc where a task did; the others may not have been called then.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// What a kernel says of its body: nothing, or that memory ran out. Python must not be ended by an exception.
template <class Body>
const char* with_memory(const Body& body) {
    try {
        body();
    } catch (const std::bad_alloc&) {
        return "out of memory";
    }
    return nullptr;
}

// 1 if there is a runtime.
extern "C" int has_threads();
