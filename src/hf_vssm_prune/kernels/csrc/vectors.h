// Short vectors of floats, and the elementary functions that the kernels apply to them.
//
// The compilers' vector extensions (GCC, Clang) turn the same source into AVX-512, AVX2, SSE2 or NEON instructions. The
// lanes of a vector are neighbouring channels.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

[[gnu::always_inline]] inline Vec broadcast(float value) { return value - Vec{}; }

[[gnu::always_inline]] inline Vec load(const float* source) {
    Vec result;
    std::memcpy(&result, source, sizeof(Vec));
    return result;
}

[[gnu::always_inline]] inline void store(float* target, Vec value) { std::memcpy(target, &value, sizeof(Vec)); }

// The first bytes of a vector; the others are 0. These are separate functions, because the compiler would otherwise use
// one call of memcpy for whole and partial vectors.
template <typename Vector>
[[gnu::noinline]] Vector load_part(const void* source, size_t bytes) {
    Vector result{};
    std::memcpy(&result, source, bytes);
    return result;
}

template <typename Vector>
[[gnu::noinline]] void store_part(void* target, Vector value, size_t bytes) {
    std::memcpy(target, &value, bytes);
}

// The first `count` lanes; the others are 0.
[[gnu::always_inline]] inline Vec load(const float* source, int count) {
    return count == kLanes ? load(source) : load_part<Vec>(source, count * sizeof(float));
}

[[gnu::always_inline]] inline void store(float* target, Vec value, int count) {
    count == kLanes ? store(target, value) : store_part(target, value, count * sizeof(float));
}

// In both, a lane where `x` is NaN stays NaN.
[[gnu::always_inline]] inline Vec minimum(Vec limit, Vec x) { return limit < x ? limit : x; }
[[gnu::always_inline]] inline Vec maximum(Vec limit, Vec x) { return limit > x ? limit : x; }

// 2^x for x in [-127, 127], within 2e-7 of it; 0 at -127, next to 0 below -126, NaN where x is NaN.
//
// Adding a large constant rounds x to a whole number, or to eighths, which are then in the low bits of the sum. 2^f of
// the remainder f is a polynomial: the one with the smallest relative error that is exact at 0.
#if defined(__AVX2__)
#if defined(__AVX512F__)
// With 16 lanes, an index has 4 bits, so the table is needed twice.
[[gnu::always_inline]] inline IntVec look_up_eighth(const int32_t (&table)[8], IntVec index) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    return reinterpret_cast<IntVec>(_mm512_permutexvar_epi32(reinterpret_cast<__m512i>(index), twice));
}
#else
[[gnu::always_inline]] inline IntVec look_up_eighth(const int32_t (&table)[8], IntVec index) {
    const __m256i once = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
    return reinterpret_cast<IntVec>(_mm256_permutevar8x32_epi32(once, reinterpret_cast<__m256i>(index)));
}
#endif

// The bits of 2^(j / 8) for j = 0, ..., 7, minus j << 20.
constexpr int32_t kEighths[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};

[[gnu::always_inline]] inline Vec exp2_in_range(Vec x) {
    constexpr float kRound = 1.5f * (1 << 20);
    const Vec rounded = x + kRound;
    const Vec f = x - (rounded - kRound);
    // Of n eighths, n >> 3 belongs to the exponent, and 2^((n & 7) / 8) is the fraction. n << 20 has the former in the
    // place of the exponent, and n & 7 at the start of the fraction, which the table cancels.
    const IntVec eighths = reinterpret_cast<IntVec>(rounded);
    const IntVec scale_bits = (eighths << 20) + look_up_eighth(kEighths, eighths);
    Vec power = f * 5.5496221798587306e-2f + 0.24025762982923016f;
    power = power * f + 0.6931472142603405f;
    power = power * f + 1.0f;
    return power * reinterpret_cast<Vec>(scale_bits);
}
#else
[[gnu::always_inline]] inline Vec exp2_in_range(Vec x) {
    // With the exponent's bias added as well, the low bits only have to be shifted to become 2^n; n = -127 becomes 0.
    constexpr float kRound = 1.5f * (1 << 23) + 127.0f;
    const Vec rounded = x + kRound;
    const Vec f = x - (rounded - kRound);
    const IntVec scale_bits = reinterpret_cast<IntVec>(rounded) << 23;
    Vec power = f * 1.326472731307149e-3f + 9.671512991189957e-3f;
    power = power * f + 5.550733581185341e-2f;
    power = power * f + 0.24022242426872253f;
    power = power * f + 0.6931470036506653f;
    power = power * f + 1.0f;
    return power * reinterpret_cast<Vec>(scale_bits);
}
#endif

constexpr float kLog2E = 1.4426950408889634f;

// 0 if the result would be below 2^-126; never more than 2^127.
[[gnu::always_inline]] inline Vec exp(Vec x) {
    return exp2_in_range(minimum(broadcast(127.0f), maximum(broadcast(-127.0f), x * kLog2E)));
}

// log(1 + y) for y in [0, 1]: 2 artanh(s) with s = y / (2 + y) <= 1/3, which keeps all digits of a small y.
[[gnu::always_inline]] inline Vec log1p(Vec y) {
    const Vec s = y / (y + 2.0f);
    const Vec square = s * s;
    Vec series = square * (1.0f / 15) + 1.0f / 13;
    series = series * square + 1.0f / 11;
    series = series * square + 1.0f / 9;
    series = series * square + 1.0f / 7;
    series = series * square + 1.0f / 5;
    series = series * square + 1.0f / 3;
    series = series * square + 1.0f;
    return 2.0f * s * series;
}

// log(1 + exp(x)) without overflow.
[[gnu::always_inline]] inline Vec softplus(Vec x) {
    const Vec magnitude = x < 0.0f ? -x : x;
    return maximum(Vec{}, x) + log1p(exp(-magnitude));
}

[[gnu::always_inline]] inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

[[gnu::always_inline]] inline Vec silu(Vec x) { return x * sigmoid(x); }

[[gnu::always_inline]] inline Vec silu_derivative(Vec x) {
    const Vec s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

template <int... lanes>
[[gnu::always_inline]] inline Vec shuffle(Vec a, Vec b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, lanes...);
#else
    return __builtin_shuffle(a, b, IntVec{lanes...});
#endif
}

// The lane of the pair (a, b) that is summand `half` (0 or 1) of `lane` in add_halves.
constexpr int half_lane(int lane, int group, int half) {
    const int start = lane / group * group, rest = lane % group;
    return start + half * (group / 2) + (rest < group / 2 ? rest : kLanes - group / 2 + rest);
}

// Cuts both vectors into groups of `group` lanes and adds each group's upper half to its lower half; in the result,
// the sums of a group of `a` are followed by those of the same group of `b`.
template <int group, int... lanes>
[[gnu::always_inline]] inline Vec add_halves(Vec a, Vec b, std::integer_sequence<int, lanes...>) {
    return shuffle<half_lane(lanes, group, 0)...>(a, b) + shuffle<half_lane(lanes, group, 1)...>(a, b);
}

// Lane i of the result is the sum of the lanes of vectors[i], for i < kLanes.
template <int group = 2>
[[gnu::always_inline]] inline Vec sum_lanes(const Vec* vectors, int stride = 1) {
    if constexpr (group > kLanes) {
        return *vectors;
    } else {
        const Vec even = sum_lanes<2 * group>(vectors, 2 * stride);
        const Vec odd = sum_lanes<2 * group>(vectors + stride, 2 * stride);
        return add_halves<group>(even, odd, std::make_integer_sequence<int, kLanes>{});
    }
}
