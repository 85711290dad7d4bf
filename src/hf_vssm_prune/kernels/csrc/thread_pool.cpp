#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

class ThreadPool {
public:
    void run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
        std::lock_guard<std::mutex> one_caller(callers_);
        std::unique_lock<std::mutex> lock(mutex_);
        for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
        task_ = &task;
        count_ = count;
        next_ = 0;
        seats_ = threads - 1;
        lock.unlock();
        wake_.notify_all();
        drain();
        lock.lock();
        seats_ = 0;  // a worker that wakes only now finds no seat and goes back to sleep
        idle_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++busy_;
            lock.unlock();
            drain();
            lock.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    void drain() {
        for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i);
    }

    std::mutex callers_, mutex_;
    std::condition_variable wake_, idle_;
    const std::function<void(int64_t)>* task_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    int workers_ = 0;  // threads that exist
    int seats_ = 0;    // threads that may still join the present run
    int busy_ = 0;     // threads that have joined it and are not done
};

// Never destroyed: its threads sleep in it until the process ends.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool& get_pool() {
    if (ThreadPool* existing = pool) return *existing;
    // A forked child inherits the pool's memory but not its threads, and makes a pool of its own.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
    (void)registered;
    auto* fresh = new ThreadPool;
    ThreadPool* expected = nullptr;
    if (pool.compare_exchange_strong(expected, fresh)) return *fresh;
    delete fresh;
    return *expected;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads > 1) return get_pool().run(count, threads, task);
    for (int64_t i = 0; i < count; ++i) task(i);
}
