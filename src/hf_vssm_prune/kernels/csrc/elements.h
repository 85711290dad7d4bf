// Numbers in memory: float32, or one of the half precisions, which are converted to float32 when they are read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "vectors.h"

enum ElementType : int64_t { kFloat32, kBFloat16, kFloat16 };

typedef uint16_t HalfVec __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t BitsVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));

[[gnu::always_inline]] inline BitsVec bits_of(Vec x) { return reinterpret_cast<BitsVec>(x); }
[[gnu::always_inline]] inline Vec with_bits(BitsVec bits) { return reinterpret_cast<Vec>(bits); }

[[gnu::always_inline]] inline Vec from_bfloat16(HalfVec half) {
    return with_bits(__builtin_convertvector(half, BitsVec) << 16);
}

// Rounds to the nearest number, and ties to even, as all conversions here do; NaN stays NaN.
[[gnu::always_inline]] inline HalfVec to_bfloat16(Vec x) {
    const BitsVec bits = bits_of(x), nan = BitsVec{} + 0x7fc0u;
    const BitsVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(x == x ? rounded : nan, HalfVec);
}

// A float16 has 5 bits of exponent and 10 of fraction. Shifted to their places in a float32, it is too small
// by a factor of 2^112.
[[gnu::always_inline]] inline Vec from_float16(HalfVec half) {
    const BitsVec bits = __builtin_convertvector(half, BitsVec), sign = (bits & 0x8000u) << 16;
    const BitsVec magnitude = (bits & 0x7fffu) << 13, infinite = BitsVec{} + 0x7f800000u;
    const Vec scaled = with_bits(magnitude) * 0x1p112f;
    const BitsVec finite = bits_of(scaled), special = magnitude | infinite;
    return with_bits(sign | ((bits & 0x7c00u) == 0x7c00u ? special : finite));
}

[[gnu::always_inline]] inline HalfVec to_float16(Vec x) {
    const BitsVec bits = bits_of(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Numbers below 2^-14 have fewer digits: adding 1/2 moves them to the low bits.
    const BitsVec small = bits_of(with_bits(magnitude) + 0.5f) - 0x3f000000u;
    const BitsVec normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const BitsVec infinite = BitsVec{} + 0x7c00u, nan = BitsVec{} + 0x7e00u;
    const BitsVec finite = magnitude < 0x38800000u ? small : normal;
    const BitsVec result = magnitude > 0x7f800000u ? nan : (magnitude >= 0x47800000u ? infinite : finite);
    return __builtin_convertvector(sign | result, HalfVec);
}

// A pointer to numbers of one of these types. Pointers to float32 are converted implicitly.
template <typename Pointer, typename Byte>
struct Place {
    Pointer data;
    ElementType type;

    Place() = default;
    Place(Pointer data, ElementType type) : data(data), type(type) {}
    template <typename Float>
    Place(Float* floats) : data(floats), type(kFloat32) {}

    Place operator+(int64_t count) const {
        return {type == kFloat32 ? at<kFloat32>(count) : at<kFloat16>(count), type};
    }

    // The address of number `index`, if the type is known when this is compiled.
    template <ElementType known>
    Byte* at(int64_t index) const {
        return static_cast<Byte*>(data) + index * (known == kFloat32 ? sizeof(float) : sizeof(uint16_t));
    }
};

using Source = Place<const void*, const char>;
using Target = Place<void*, char>;

// Calls `visit` with the type as a constant, so that loops inside are compiled for each type.
template <typename Visitor>
void with_type(ElementType type, const Visitor& visit) {
    switch (type) {
        case kFloat32: return visit(std::integral_constant<ElementType, kFloat32>{});
        case kBFloat16: return visit(std::integral_constant<ElementType, kBFloat16>{});
        case kFloat16: return visit(std::integral_constant<ElementType, kFloat16>{});
    }
}

// The first `count` lanes; the others are 0.
template <ElementType type>
[[gnu::always_inline]] inline Vec load_as(const void* source, int count) {
    if constexpr (type == kFloat32) {
        return load(static_cast<const float*>(source), count);
    } else {
        HalfVec half;
        if (count == kLanes) {
            std::memcpy(&half, source, sizeof(HalfVec));
        } else {
            half = load_part<HalfVec>(source, count * sizeof(uint16_t));
        }
        return type == kBFloat16 ? from_bfloat16(half) : from_float16(half);
    }
}

template <ElementType type>
[[gnu::always_inline]] inline void store_as(void* target, Vec value, int count) {
    if constexpr (type == kFloat32) {
        store(static_cast<float*>(target), value, count);
    } else {
        const HalfVec half = type == kBFloat16 ? to_bfloat16(value) : to_float16(value);
        if (count == kLanes) {
            std::memcpy(target, &half, sizeof(HalfVec));
        } else {
            store_part(target, half, count * sizeof(uint16_t));
        }
    }
}

inline void copy_floats(Source source, int64_t count, float* target) {
    if (source.type == kFloat32) {
        std::copy_n(static_cast<const float*>(source.data), count, target);
        return;
    }
    with_type(source.type, [&](auto type) {
        for (int64_t i = 0; i < count; i += kLanes) {
            const int lanes = static_cast<int>(std::min<int64_t>(kLanes, count - i));
            store(target + i, load_as<type.value>((source + i).data, lanes), lanes);
        }
    });
}

// The same numbers in float32: the given ones, or a copy that lives as long as this object.
class Floats {
public:
    const float* of(Source source, int64_t count) {
        if (!source.data || source.type == kFloat32) return static_cast<const float*>(source.data);
        copies_.emplace_back(count);
        copy_floats(source, count, copies_.back().data());
        return copies_.back().data();
    }

private:
    std::vector<std::vector<float>> copies_;
};
