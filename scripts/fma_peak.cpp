// How many multiply-adds a second one core can do: independent ones, in registers. For the benchmark's roofline.
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "vectors.h"

// Lanes multiplied and added a second. 12 chains hide the latency of an operation.
extern "C" double multiply_adds_per_second() {
    constexpr int kChains = 12;
    constexpr int64_t kRounds = 200000;
    const Vec factor = broadcast(0.999f), summand = broadcast(1e-3f);
    Vec chain[kChains] = {};
    double best = 0;
    for (int run = 0; run < 20; ++run) {
        const auto start = std::chrono::steady_clock::now();
        for (int64_t round = 0; round < kRounds; ++round) {
#pragma GCC unroll 16
            for (int i = 0; i < kChains; ++i) {
                chain[i] = chain[i] * factor + summand;
                asm volatile("" : "+v"(chain[i]));
            }
        }
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, kChains * kRounds * kLanes / seconds.count());
    }
    return best;
}
