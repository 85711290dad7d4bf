// A block of channels: kVectors vectors of neighbouring channels, processed together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "elements.h"
#include "vectors.h"

constexpr int kVectors = 4;
constexpr int kBlock = kVectors * kLanes;  // channels of a block

// Rows with the channels of one block, one after another.
using BlockRows = std::vector<Vec>;

struct ChannelBlock {
    int64_t sample, first_channel;
    int width[kVectors];  // number of channels in each vector

    ChannelBlock(int64_t sample, int64_t first_channel, int64_t channels)
        : sample(sample), first_channel(first_channel) {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t left = channels - first_channel - v * kLanes;
            width[v] = static_cast<int>(std::clamp<int64_t>(left, 0, kLanes));
        }
    }

    // `channels` points to a row of all channels. The type is a template argument, so that loops over rows are compiled
    // for each type.
    template <ElementType type>
    void load_row(const void* channels, Vec* target) const {
        for (int v = 0; v < kVectors; ++v) {
            target[v] = load_as<type>(Source(channels, type).at<type>(first_channel + v * kLanes), width[v]);
        }
    }

    template <ElementType type>
    void store_row(const Vec* source, void* channels) const {
        for (int v = 0; v < kVectors; ++v) {
            store_as<type>(Target(channels, type).at<type>(first_channel + v * kLanes), source[v], width[v]);
        }
    }

    // The transpose of the block's part of a matrix (channels, columns), as rows.
    void load_columns(const float* matrix, int64_t columns, BlockRows& target) const {
        target.assign(columns * kVectors, Vec{});
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < width[v]; ++lane) {
                const float* row = matrix + (first_channel + v * kLanes + lane) * columns;
                for (int64_t i = 0; i < columns; ++i) target[i * kVectors + v][lane] = row[i];
            }
        }
    }

    void store_columns(const BlockRows& source, int64_t columns, float* matrix) const {
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < width[v]; ++lane) {
                float* row = matrix + (first_channel + v * kLanes + lane) * columns;
                for (int64_t i = 0; i < columns; ++i) row[i] = source[i * kVectors + v][lane];
            }
        }
    }
};
