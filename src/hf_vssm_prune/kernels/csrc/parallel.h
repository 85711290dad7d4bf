// Loops that run on the threads of PyTorch's own OpenMP runtime.
//
// Threads of our own would compete with them, because they keep spinning for a while after PyTorch's last operator.
#pragma once

#include <cstdint>
#include <functional>
#include <new>

// Calls task(0), ..., task(count - 1) on at most `threads` threads, and returns when all are done. Without such a
// runtime, and in a forked process, whose copy of it has no threads, the calling thread does everything. Throws
// std::bad_alloc if a task did; the other tasks may not have been called then.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// Runs the body of a kernel, and returns null, or an error message if memory ran out: an exception would end the Python
// process.
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
