#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <new>

// The entry point of GNU's OpenMP runtime, which LLVM's and Intel's have, too. Null if PyTorch has loaded none of them.
extern "C" void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));

namespace {

std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Loop {
    const int64_t count;
    const std::function<void(int64_t)>& task;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};

    // No exception may leave a thread of the runtime.
    void run() noexcept {
        try {
            for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
            next = count;
        }
    }
};

}  // namespace

extern "C" int has_threads() { return GOMP_parallel && !forked; }

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    Loop loop{count, task};
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    if (threads < 2 || !has_threads()) {
        loop.run();
    } else {
        GOMP_parallel([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, threads, 0);
    }
    if (loop.out_of_memory) throw std::bad_alloc();
}
