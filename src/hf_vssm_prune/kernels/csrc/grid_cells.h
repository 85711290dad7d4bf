// Three ways to sum over the neighbours of cells on the patch grid, or in a sequence. Each keeps the cells' rows in
// buffers of `places` rows, a token's at `place(token)`, and has the same three sums:
//
//     convolve    sums[i] += weight[tap] rows[j]         over the neighbours j of each cell i, at their taps
//     spread      sums[j] += weight[tap] grads[i]        over the same pairs: the gradient of convolve's rows
//     correlate   grad_weight[tap] += grads[i] rows[j]   over the cells i that have a neighbour j at the tap
//
// A tap is a position in the window, counted row by row; the weight and its gradient have a row for each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "channel_block.h"

// Cells, some of which are empty. If these count as zero, each token gathers only from its kept neighbours: with a
// fraction r of the tokens left, the work is about r^2 of that for the whole grid. If other tokens stand in for them,
// it is r.
class SparseCells {
public:
    int64_t places;

    // `kept`: the cell of each token, or null if there is one in every cell. `stand_ins`: the token seen in each cell,
    // or null if empty cells count as zero.
    void list(const int32_t* kept, const int32_t* stand_ins, int64_t tokens, int64_t height, int64_t width,
              const Window& window) {
        const int64_t padded_width = width + window.width - 1;
        const auto padded = [&](int64_t cell) { return cell / width * padded_width + cell % width + window.left; };
        token_of_cell_.assign(height * padded_width, -1);
        if (stand_ins) {
            for (int64_t cell = 0; cell < height * width; ++cell) token_of_cell_[padded(cell)] = stand_ins[cell];
        } else {
            for (int64_t token = 0; token < tokens; ++token) {
                token_of_cell_[padded(kept ? kept[token] : token)] = token;
            }
        }

        places = tokens;
        neighbours_.resize(tokens * window.taps() + 1);
        starts_.assign(1, 0);
        int64_t count = 0;
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t cell = kept ? kept[token] : token, y = cell / width;
            const int64_t corner = padded(cell) - window.above() * padded_width - window.left;
            const int64_t last_row = std::min(window.height, height + window.above() - y);
            for (int64_t row = std::max<int64_t>(0, window.above() - y); row < last_row; ++row) {
                const int32_t* in_row = &token_of_cell_[corner + row * padded_width];
                for (int64_t column = 0; column < window.width; ++column) {
                    neighbours_[count] = {static_cast<int32_t>(row * window.width + column), in_row[column]};
                    count += neighbours_[count].token >= 0;
                }
            }
            starts_.push_back(count);
        }
    }

    int64_t place(int64_t token) const { return token; }

    void convolve(const BlockRows& weight, const BlockRows& rows, BlockRows& sums) const {
        for (int64_t token = 0; token < places; ++token) {
            Vec total[kVectors];
            std::copy_n(&sums[token * kVectors], kVectors, total);
            for (int64_t i = starts_[token]; i < starts_[token + 1]; ++i) {
                const Vec *weights = &weight[neighbours_[i].tap * kVectors], *inputs = row(rows, i);
                for (int v = 0; v < kVectors; ++v) total[v] += weights[v] * inputs[v];
            }
            std::copy_n(total, kVectors, &sums[token * kVectors]);
        }
    }

    void spread(const BlockRows& weight, const BlockRows& grads, BlockRows& sums) const {
        for (int64_t token = 0; token < places; ++token) {
            Vec grad[kVectors];
            std::copy_n(&grads[token * kVectors], kVectors, grad);
            for (int64_t i = starts_[token]; i < starts_[token + 1]; ++i) {
                const Vec* weights = &weight[neighbours_[i].tap * kVectors];
                Vec* total = &sums[neighbours_[i].token * kVectors];
                for (int v = 0; v < kVectors; ++v) total[v] += weights[v] * grad[v];
            }
        }
    }

    void correlate(const BlockRows& grads, const BlockRows& rows, BlockRows& grad_weight) const {
        for (int64_t token = 0; token < places; ++token) {
            Vec grad[kVectors];
            std::copy_n(&grads[token * kVectors], kVectors, grad);
            for (int64_t i = starts_[token]; i < starts_[token + 1]; ++i) {
                Vec* total = &grad_weight[neighbours_[i].tap * kVectors];
                const Vec* inputs = row(rows, i);
                for (int v = 0; v < kVectors; ++v) total[v] += grad[v] * inputs[v];
            }
        }
    }

private:
    struct Neighbour {
        int32_t tap, token;
    };

    const Vec* row(const BlockRows& rows, int64_t i) const { return &rows[neighbours_[i].token * kVectors]; }

    std::vector<Neighbour> neighbours_;  // of all tokens, one after another; each is its own neighbour, too
    std::vector<int64_t> starts_;        // [starts_[i], starts_[i + 1]) are those of token i
    std::vector<int32_t> token_of_cell_;
};

// A grid with a token in every cell. It is processed in tiles of kTile neighbouring cells of a row, whose sums are in
// registers. A loaded row of inputs is used for all sums of the tile to which it contributes, and a row of the kernel
// for all cells of the tile. There are columns of zeros on both sides; on the right, enough to complete the last tile.
template <int kKernel>
class DenseGrid {
public:
    int64_t places;

    DenseGrid(int64_t height, int64_t width) : height_(height), width_(width) {
        stride_ = (width + kTile - 1) / kTile * kTile + 2 * kRadius;
        places = height * stride_;
    }

    int64_t place(int64_t token) const { return token / width_ * stride_ + kRadius + token % width_; }

    void convolve(const BlockRows& weight, const BlockRows& rows, BlockRows& sums) const {
        for_tiles([&](int64_t tile, int64_t inputs, int first_row, int last_row, int v) {
            Vec total[kTile];
            load_rows<kTile>(sums, tile, v, total);
            for (int row = first_row; row < last_row; ++row) {
                Vec weights[kKernel];
                load_rows<kKernel>(weight, row * kKernel, v, weights);
                for_pairs(&rows[(inputs + row * stride_) * kVectors + v],
                          [&](int cell, int tap, Vec input) { total[cell] += weights[tap] * input; });
            }
            store_rows<kTile>(total, tile, v, sums);
        });
    }

    // If j is i's neighbour at a tap, then i is j's neighbour at the mirrored tap.
    void spread(const BlockRows& weight, const BlockRows& grads, BlockRows& sums) const {
        constexpr int taps = kKernel * kKernel;
        thread_local BlockRows mirrored(taps * kVectors);  // its memory is reused
        for (int tap = 0; tap < taps; ++tap) {
            std::copy_n(&weight[tap * kVectors], kVectors, &mirrored[(taps - 1 - tap) * kVectors]);
        }
        convolve(mirrored, grads, sums);
    }

    void correlate(const BlockRows& grads, const BlockRows& rows, BlockRows& grad_weight) const {
        for_tiles([&](int64_t tile, int64_t inputs, int first_row, int last_row, int v) {
            Vec grad[kTile];
            load_rows<kTile>(grads, tile, v, grad);
            for (int row = first_row; row < last_row; ++row) {
                Vec total[kKernel];
                load_rows<kKernel>(grad_weight, row * kKernel, v, total);
                for_pairs(&rows[(inputs + row * stride_) * kVectors + v],
                          [&](int cell, int tap, Vec input) { total[tap] += grad[cell] * input; });
                store_rows<kKernel>(total, row * kKernel, v, grad_weight);
            }
        });
    }

private:
    static constexpr int kTile = 7, kRadius = kKernel / 2;

    // Calls work(place of the tile, place of the kernel's corner at the tile's first cell, first row of the kernel
    // inside the grid, end of these rows, vector) for all tiles.
    template <typename Work>
    void for_tiles(const Work& work) const {
        for (int v = 0; v < kVectors; ++v) {
            for (int64_t y = 0; y < height_; ++y) {
                const int first_row = static_cast<int>(std::max<int64_t>(0, kRadius - y));
                const int last_row = static_cast<int>(std::min<int64_t>(kKernel, height_ + kRadius - y));
                for (int64_t x = 0; x < width_; x += kTile) {
                    const int64_t tile = y * stride_ + kRadius + x;
                    work(tile, tile - kRadius * stride_ - kRadius, first_row, last_row, v);
                }
            }
        }
    }

    // Calls work(cell of the tile, tap in a row of the kernel, input) for all pairs, unrolled.
    template <typename Work>
    [[gnu::always_inline]] static inline void for_pairs(const Vec* inputs, const Work& work) {
#pragma GCC unroll 16
        for (int i = 0; i < kTile + kKernel - 1; ++i) {
            const Vec input = inputs[i * kVectors];
#pragma GCC unroll 16
            for (int cell = 0; cell < kTile; ++cell) {
                if (i - cell >= 0 && i - cell < kKernel) work(cell, i - cell, input);
            }
        }
    }

    template <int kCount>
    [[gnu::always_inline]] static inline void load_rows(const BlockRows& rows, int64_t first, int v, Vec* target) {
        for (int i = 0; i < kCount; ++i) target[i] = rows[(first + i) * kVectors + v];
    }

    template <int kCount>
    [[gnu::always_inline]] static inline void store_rows(const Vec* source, int64_t first, int v, BlockRows& rows) {
        for (int i = 0; i < kCount; ++i) rows[(first + i) * kVectors + v] = source[i];
    }

    int64_t height_, width_, stride_;
};

// A sequence without gaps, and a window of kTaps tokens. The weights and unfinished sums stay in registers. There are
// rows of zeros where the window extends beyond an end.
template <int kTaps>
class DenseSequence {
public:
    int64_t places;

    DenseSequence(int64_t tokens, int64_t left) : places(tokens + kTaps - 1), tokens_(tokens), left_(left) {}

    int64_t place(int64_t token) const { return token + left_; }

    void convolve(const BlockRows& weight, const BlockRows& rows, BlockRows& sums) const {
        for (int v = 0; v < kVectors; ++v) {
            Vec weights[kTaps];
            for (int tap = 0; tap < kTaps; ++tap) weights[tap] = weight[tap * kVectors + v];
            for (int64_t token = 0; token < tokens_; ++token) {
                Vec total = sums[place(token) * kVectors + v];
                for (int tap = 0; tap < kTaps; ++tap) total += weights[tap] * rows[(token + tap) * kVectors + v];
                sums[place(token) * kVectors + v] = total;
            }
        }
    }

    void spread(const BlockRows& weight, const BlockRows& grads, BlockRows& sums) const {
        for (int v = 0; v < kVectors; ++v) {
            Vec weights[kTaps], totals[kTaps] = {};  // totals: unfinished sums, of the rows from a token's window on
            for (int tap = 0; tap < kTaps; ++tap) weights[tap] = weight[tap * kVectors + v];
            for (int64_t token = 0; token < tokens_; ++token) {
                const Vec grad = grads[place(token) * kVectors + v];
                for (int tap = 0; tap < kTaps; ++tap) totals[tap] += weights[tap] * grad;
                sums[token * kVectors + v] += totals[0];
                for (int tap = 1; tap < kTaps; ++tap) totals[tap - 1] = totals[tap];
                totals[kTaps - 1] = Vec{};
            }
            for (int tap = 0; tap + 1 < kTaps; ++tap) sums[(tokens_ + tap) * kVectors + v] += totals[tap];
        }
    }

    void correlate(const BlockRows& grads, const BlockRows& rows, BlockRows& grad_weight) const {
        for (int v = 0; v < kVectors; ++v) {
            Vec totals[kTaps] = {};
            for (int64_t token = 0; token < tokens_; ++token) {
                const Vec grad = grads[place(token) * kVectors + v];
                for (int tap = 0; tap < kTaps; ++tap) totals[tap] += grad * rows[(token + tap) * kVectors + v];
            }
            for (int tap = 0; tap < kTaps; ++tap) grad_weight[tap * kVectors + v] += totals[tap];
        }
    }

private:
    int64_t tokens_, left_;
};
