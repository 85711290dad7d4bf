// Independent multiply-adds in registers, as fast as one core can do them: for the benchmark's roofline.
#include <cstdint>

#include "vectors.h"

// `count` of them, each of one lane of a vector.
extern "C" void multiply_adds(int64_t count) {
    constexpr int kChains = 12;  // hide the latency of an operation
    const Vec factor = broadcast(0.999f), summand = broadcast(1e-3f);
    Vec chain[kChains] = {};
    for (int64_t done = 0; done < count; done += kChains * kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) {
            chain[i] = chain[i] * factor + summand;
            asm volatile("" : "+v"(chain[i]));
        }
    }
}
