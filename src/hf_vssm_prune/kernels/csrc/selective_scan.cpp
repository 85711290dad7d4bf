// The pruning-aware selective scan, forward and backward.
//
// For each path k over the tokens that are left, with o = order[k, t] the token visited at step t and g = gaps[k, t]:
//
//     s_t = delta_t + e_t                             decay step; e_t is the time spent in the hole before step t
//     h_t = exp(s_t A) h_{t-1} + delta_t B_t u_o      state; A, B and C have one entry for each state
//     y_o += C_t h_t + D u_o                          summed over paths, then multiplied by SiLU(gate)
//
// Channels are independent of each other: a block of kLanes channels is one vector, and its states stay in the cache.
// States are independent as well, except for the sum in C_t h_t, and are processed in slices of S. All paths share
// delta, A and C, so exp(delta_t A) is computed once for up to four of them.
//
// The order of every sum depends on the sizes alone, not on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "arguments.h"
#include "parallel.h"
#include "vectors.h"

namespace {

// A task processes its blocks one by one, but reads their rows together: four neighbouring cache lines.
constexpr int kBlocksPerTask = 64 / kLanes;

// Up to this gap, exp(gap x) is computed from exp(x) by multiplications. Beyond it, they would lose too many digits and
// take too long.
constexpr int kLargestPower = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A parameter that `with_floats` has converted to float32.
const float* floats(Source parameter) { return static_cast<const float*>(parameter.data); }

// ---------------------------------------------------------------------------------------------------------------------
// What all channels of a sample share: the paths, B and C
// ---------------------------------------------------------------------------------------------------------------------

// Sums over lanes are computed kLanes at a time, so tables by state are at least that wide.
template <int S>
constexpr int kTableWidth = S > kLanes ? S : kLanes;

template <int S>
int64_t padded_states(const ScanArguments& arguments) {
    return divide_up(arguments.states, kTableWidth<S>) * kTableWidth<S>;
}

// One step of one path.
struct Visit {
    int32_t token, gap, move;
};

struct Sample {
    int64_t call = 0, index, paths, padded_states;
    std::vector<Visit> visits;  // (length, paths)
    std::vector<float> B;       // (length, paths, padded_states), with direction_B added
    std::vector<float> C;       // (length, padded_states)

    const Visit* visits_at(int64_t t, int64_t path) const { return &visits[t * paths + path]; }
    const float* B_at(int64_t t, int64_t path) const { return &B[(t * paths + path) * padded_states]; }
    const float* C_at(int64_t t) const { return &C[t * padded_states]; }
};

int32_t entry(const Paths& paths, const ScanArguments& arguments, int64_t sample, int64_t path, int64_t t,
              int64_t none) {
    if (!paths.data) return static_cast<int32_t>(none);
    return paths.data[sample * paths.batch_stride + path * arguments.length + t];
}

void load_sample(const ScanArguments& arguments, int64_t index, int64_t padded_states, Sample& sample) {
    const int64_t length = arguments.length, paths = arguments.paths, states = arguments.states;
    sample.index = index;
    sample.paths = paths;
    sample.padded_states = padded_states;
    sample.visits.resize(length * paths);
    sample.B.assign(length * paths * padded_states, 0.0f);
    sample.C.assign(length * padded_states, 0.0f);
    for (int64_t t = 0; t < length; ++t) {
        copy_floats(arguments.C.row(index, t), states, &sample.C[t * padded_states]);
        for (int64_t path = 0; path < paths; ++path) {
            Visit& visit = sample.visits[t * paths + path];
            visit.token = entry(arguments.order, arguments, index, path, t, t);
            visit.gap = entry(arguments.gaps, arguments, index, path, t, 1);
            visit.move = entry(arguments.moves, arguments, index, path, t, 0);
            float* B = &sample.B[(t * paths + path) * padded_states];
            copy_floats(arguments.B.row(index, t), states, B);
            if (!arguments.direction_B.data) continue;
            const float* direction = floats(arguments.direction_B) + visit.move * states;
            for (int64_t n = 0; n < states; ++n) B[n] += direction[n];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of channels of one sample, copied into the cache
// ---------------------------------------------------------------------------------------------------------------------

struct Block {
    int64_t sample, first_channel;
    int width;  // number of channels in the block: kLanes, fewer in the last one

    Vec D, bias, hole_step, longest_step;  // bias: of the time step; longest_step: the longest delta
    std::vector<Vec> u, delta, y;    // by token

    // Only for the backward pass.
    Vec grad_D, grad_hole_step;
    std::vector<Vec> grad_y, grad_u, grad_delta;  // by token
};

// The data that a thread works with. The memory is reused.
struct Workspace {
    Sample sample;
    Block blocks[kBlocksPerTask];
    int block_count;
    std::vector<Vec> states, decays;    // for the backward pass: h_t from h_0 on, and exp(delta_t A), by step
    std::vector<Vec> grad_direction_B;  // by kind of move
};

thread_local Workspace thread_workspace;

Vec load_channels(Source channels, const Block& block) {
    Vec result{};
    if (!channels.data) return result;
    with_type(channels.type, [&](auto type) {
        result = load_as<type.value>((channels + block.first_channel).data, block.width);
    });
    return result;
}

template <ElementType type>
Vec load_token(const Rows& rows, const Block& block, int64_t token) {
    const int64_t place = block.sample * rows.batch_stride + token * rows.row_stride + block.first_channel;
    return load_as<type>(rows.data.template at<type>(place), block.width);
}

template <ElementType type>
void store_token(Target target, int64_t place, const Block& block, Vec value) {
    store_as<type>(target.template at<type>(place), value, block.width);
}

template <ElementType type>
void load_blocks(const ScanArguments& arguments, int64_t sample, int64_t first_channel, Workspace& work) {
    const int64_t left = arguments.channels - first_channel;
    work.block_count = static_cast<int>(std::min<int64_t>(kBlocksPerTask, divide_up(left, kLanes)));
    for (int b = 0; b < work.block_count; ++b) {
        Block& block = work.blocks[b];
        block.sample = sample;
        block.first_channel = first_channel + b * kLanes;
        block.width = static_cast<int>(std::min<int64_t>(kLanes, left - b * kLanes));
        block.D = load_channels(arguments.D, block);
        block.bias = load_channels(arguments.time_step_bias, block);
        block.hole_step = load_channels(arguments.hole_time_step, block);
        block.longest_step = Vec{};
        block.u.resize(arguments.length);
        block.delta.resize(arguments.length);
        block.y.assign(arguments.length, Vec{});
    }
    for (int64_t token = 0; token < arguments.length; ++token) {
        for (int b = 0; b < work.block_count; ++b) {
            Block& block = work.blocks[b];
            const Vec delta = softplus(load_token<type>(arguments.time_step, block, token) + block.bias);
            block.longest_step = delta > block.longest_step ? delta : block.longest_step;  // ignores NaN
            block.delta[token] = delta;
            block.u[token] = load_token<type>(arguments.hidden_states, block, token);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A slice of S states, and one step of K paths in it
// ---------------------------------------------------------------------------------------------------------------------

template <int S>
struct Slice {
    int64_t first_state;
    int count;          // states in the slice: S, fewer in the last one; the others have A = B = C = 0
    Vec A[S];           // times log2(e)
    Vec longest[S];     // the step after which nothing of the state is left in float32: exp2 needs |step A| <= 127
    bool within_range;  // no delta of the block is longer than that
    Vec hole_decay[S];  // exp(hole_time_step A)
    Vec skip;           // D in the first slice, 0 in the others, because D u is added once

    template <bool kWithinRange = false>
    Vec decay(Vec step, int n) const {
        return exp2_in_range((kWithinRange ? step : minimum(longest[n], step)) * A[n]);
    }
};

template <int S>
Slice<S> load_slice(const ScanArguments& arguments, const Block& block, int64_t first_state) {
    Slice<S> slice{};
    slice.first_state = first_state;
    slice.count = static_cast<int>(std::min<int64_t>(S, arguments.states - first_state));
    slice.within_range = true;
    for (int n = 0; n < slice.count; ++n) {
        for (int lane = 0; lane < block.width; ++lane) {
            slice.A[n][lane] =
                kLog2E * floats(arguments.A)[(block.first_channel + lane) * arguments.states + first_state + n];
        }
        slice.longest[n] = 127.0f / (slice.A[n] < 0.0f ? -slice.A[n] : slice.A[n]);
        for (int lane = 0; lane < block.width; ++lane) {
            slice.within_range &= block.longest_step[lane] <= slice.longest[n][lane];
        }
        slice.hole_decay[n] = slice.decay(block.hole_step, n);
    }
    if (first_state == 0) slice.skip = block.D;
    return slice;
}

template <int K>
struct Step {
    const Visit* visits;
    const float *B, *C;  // B: (K, padded_states)
    Vec delta;
    Vec u[K], input[K];  // input = delta u

    bool has_holes() const {
        bool found = false;
        for (int k = 0; k < K; ++k) found |= visits[k].gap > 1;
        return found;
    }
};

template <int K>
[[gnu::always_inline]] inline Step<K> load_step(const Sample& sample, const Block& block, int64_t first_state,
                                                int64_t first_path, int64_t t) {
    Step<K> step;
    step.visits = sample.visits_at(t, first_path);
    step.B = sample.B_at(t, first_path) + first_state;
    step.C = sample.C_at(t) + first_state;
    step.delta = block.delta[t];
    for (int k = 0; k < K; ++k) {
        step.u[k] = block.u[step.visits[k].token];
        step.input[k] = step.delta * step.u[k];
    }
    return step;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// The state of one path decays over the gap - 1 tokens that were dropped before this step. Most gaps are small, and a
// few multiplications are cheaper than another exp.
template <int S>
void cross_hole(const ScanArguments& arguments, const Block& block, const Slice<S>& slice, Vec delta, const Vec* decay,
                int gap, Vec* state) {
    const bool repeats = !arguments.hole_time_step.data;
    if (gap > kLargestPower) {
        const Vec time = static_cast<float>(gap - 1) * (repeats ? delta : block.hole_step);
        for (int n = 0; n < S; ++n) state[n] *= slice.decay(time, n);
        return;
    }
    const Vec* factor = repeats ? decay : slice.hole_decay;
    for (int dropped = 1; dropped < gap; ++dropped) {
        for (int n = 0; n < S; ++n) state[n] *= factor[n];
    }
}

// target[n] += the sum of the lanes of vectors[n], for n < S.
template <int S>
void add_lane_sums(const Vec (&vectors)[kTableWidth<S>], float* target) {
    for (int n = 0; n < S; n += kLanes) store(target + n, load(target + n) + sum_lanes(vectors + n));
}

// Where the forward pass stores h_t and exp(delta_t A): one step after another, for the backward pass, or, with strides
// of 0, each step in place of the last one. The gradient of C needs h_t, and is computed at the same time if there is a
// place for it.
struct Trace {
    Vec *states, *decays;
    int64_t state_stride, decay_stride;
    float* grad_C;  // (length, ...), with rows of this length:
    int64_t grad_C_stride;
};

// One step: computes the states `after` from those `before`, and adds their output to block.y. `decay` is
// exp(delta_t A). That of the next step is computed at the same time: an exp is a long chain of operations, and the
// short chains of the paths fill its waiting times.
template <int S, int K, bool kWithinRange, bool kGradC>
[[gnu::always_inline]] inline void advance(const Sample& sample, const Slice<S>& slice, const Step<K>& step,
                                           Vec next_delta, Block& block, const Vec* before, Vec* after,
                                           const Vec* decay, Vec* next_decay, Vec* grad_C) {
    Vec y[K], grad_y[K];
    for (int k = 0; k < K; ++k) {
        y[k] = slice.skip * step.u[k];
        if constexpr (kGradC) grad_y[k] = block.grad_y[step.visits[k].token];
    }
#pragma GCC unroll 2
    for (int n = 0; n < S; ++n) {
        const Vec present = decay[n];
        next_decay[n] = slice.template decay<kWithinRange>(next_delta, n);
        Vec sum_C{};
        for (int k = 0; k < K; ++k) {
            const Vec h = present * before[k * S + n] + step.input[k] * step.B[k * sample.padded_states + n];
            after[k * S + n] = h;
            y[k] += step.C[n] * h;
            if constexpr (kGradC) sum_C += grad_y[k] * h;
        }
        if constexpr (kGradC) grad_C[n] = sum_C;
    }
    for (int k = 0; k < K; ++k) block.y[step.visits[k].token] += y[k];
}

// Scans K paths, and adds their output to block.y.
template <int S, int K, bool kWithinRange, bool kGradC>
void scan_paths(const ScanArguments& arguments, const Sample& sample, Block& block, const Slice<S>& slice,
                int64_t first_path, const Trace& trace) {
    Vec *state = trace.states, *decay = trace.decays;
    std::fill_n(state, K * S, Vec{});
    for (int n = 0; n < S; ++n) decay[n] = slice.decay(block.delta[0], n);
    for (int64_t t = 0; t < arguments.length; ++t) {
        const Step<K> step = load_step<K>(sample, block, slice.first_state, first_path, t);
        Vec* before = state;
        Vec behind_holes[kGradC ? K * S : 1];
        if (step.has_holes()) {
            if constexpr (kGradC) before = std::copy_n(state, K * S, behind_holes) - K * S;
            for (int k = 0; k < K; ++k) {
                cross_hole<S>(arguments, block, slice, step.delta, decay, step.visits[k].gap, before + k * S);
            }
        }
        const Vec next_delta = block.delta[std::min(t + 1, arguments.length - 1)];
        Vec grad_C[kTableWidth<S>] = {};
        advance<S, K, kWithinRange, kGradC>(sample, slice, step, next_delta, block, before, state + trace.state_stride,
                                            decay, decay + trace.decay_stride, grad_C);
        if constexpr (kGradC) add_lane_sums<S>(grad_C, trace.grad_C + t * trace.grad_C_stride);
        state += trace.state_stride;
        decay += trace.decay_stride;
    }
}

template <int S, int K, bool kGradC>
void scan_paths(const ScanArguments& arguments, const Sample& sample, Block& block, const Slice<S>& slice,
                int64_t first_path, const Trace& trace) {
    (slice.within_range ? scan_paths<S, K, true, kGradC> : scan_paths<S, K, false, kGradC>)(
        arguments, sample, block, slice, first_path, trace);
}

// Calls visit(K, first_path) for groups of K paths, so that every path is in one group: fours first, then single paths.
template <typename Visitor>
void for_path_groups(int64_t paths, const Visitor& visit) {
    int64_t first_path = 0;
    for (; first_path + 4 <= paths; first_path += 4) visit(std::integral_constant<int, 4>{}, first_path);
    for (; first_path < paths; ++first_path) visit(std::integral_constant<int, 1>{}, first_path);
}

template <int S>
void forward_block(const ScanArguments& arguments, const Sample& sample, Block& block) {
    for (int64_t first_state = 0; first_state < arguments.states; first_state += S) {
        const Slice<S> slice = load_slice<S>(arguments, block, first_state);
        for_path_groups(arguments.paths, [&](auto group, int64_t first_path) {
            constexpr int K = decltype(group)::value;
            Vec states[K * S], decays[S];
            scan_paths<S, K, false>(arguments, sample, block, slice, first_path,
                                    Trace{states, decays, 0, 0, nullptr, 0});
        });
    }
}

template <ElementType type>
void store_output(const ScanArguments& arguments, const Workspace& work, Target output) {
    for (int64_t token = 0; token < arguments.length; ++token) {
        for (int b = 0; b < work.block_count; ++b) {
            const Block& block = work.blocks[b];
            Vec y = block.y[token];
            if (arguments.gate.data.data) y *= silu(load_token<type>(arguments.gate, block, token));
            const int64_t row = (block.sample * arguments.length + token) * arguments.channels;
            store_token<type>(output, row + block.first_channel, block, y);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// result = base^exponent, exponent >= 1, from the exponent's highest bit to its lowest.
template <int S>
void power(const Vec* base, int exponent, Vec* result) {
    std::copy_n(base, S, result);
    int bit = 1;
    while (bit <= exponent / 2) bit *= 2;
    while (bit /= 2) {
        for (int n = 0; n < S; ++n) result[n] *= result[n];
        if (exponent & bit) {
            for (int n = 0; n < S; ++n) result[n] *= base[n];
        }
    }
}

// The decays exp(s_t A) of K paths. A path without a hole before this step shares exp(delta_t A) with the others.
template <int S, int K>
struct PathDecays {
    const Vec* of_path[K];
    Vec across_hole[K][S];

    PathDecays(const ScanArguments& arguments, const Block& block, const Slice<S>& slice, const Step<K>& step,
               const Vec* decay) {
        for (int k = 0; k < K; ++k) {
            of_path[k] = decay;
            if (step.visits[k].gap == 1) continue;
            of_path[k] = across_hole[k];
            if (step.visits[k].gap > kLargestPower) {
                const Vec hole_step = arguments.hole_time_step.data ? block.hole_step : step.delta;
                const Vec decay_step = step.delta + static_cast<float>(step.visits[k].gap - 1) * hole_step;
                for (int n = 0; n < S; ++n) across_hole[k][n] = slice.decay(decay_step, n);
            } else if (arguments.hole_time_step.data) {
                power<S>(slice.hole_decay, step.visits[k].gap - 1, across_hole[k]);
                for (int n = 0; n < S; ++n) across_hole[k][n] *= decay[n];
            } else {
                power<S>(decay, step.visits[k].gap, across_hole[k]);
            }
        }
    }
};

// Sums over samples, or over blocks of channels, are computed in two steps: each task has its own partial sums, and
// these are added up afterwards in the order of the tasks.
struct PartialSums {
    int64_t rows, width, padded_width;
    std::unique_ptr<float[]> data;

    PartialSums(int64_t tasks, int64_t rows, int64_t width, int64_t padded_width)
        : rows(rows), width(width), padded_width(padded_width), data(new float[tasks * rows * padded_width]) {}

    float* row(int64_t task, int64_t row) { return data.get() + (task * rows + row) * padded_width; }

    void clear(int64_t task) { std::fill_n(row(task, 0), rows * padded_width, 0.0f); }

    // target (rows, width) = the sum of the partial sums of tasks [first, first + count).
    void add_up(int64_t first, int64_t count, float* target) {
        std::fill_n(target, rows * width, 0.0f);
        for (int64_t task = first; task < first + count; ++task) {
            for (int64_t r = 0; r < rows; ++r) {
                const float* source = row(task, r);
                for (int64_t i = 0; i < width; ++i) target[r * width + i] += source[i];
            }
        }
    }
};

struct Partials {
    PartialSums A;                                   // by sample: (channels, states)
    PartialSums D, time_step_bias, hole_time_step;   // by sample: (1, channels)
    PartialSums B, C;                                // by task: (length, states)
    PartialSums direction_B;                         // by task: (move_kinds, states)
};

// How the paths' decay steps s_t depend on delta_t and on the step of a hole: s_t = weight delta_t + holes hole_step.
template <int K>
struct DecaySteps {
    float weight[K], holes[K];

    DecaySteps(const ScanArguments& arguments, const Step<K>& step) {
        for (int k = 0; k < K; ++k) {
            const auto gap = static_cast<float>(step.visits[k].gap);
            weight[k] = arguments.hole_time_step.data ? 1.0f : gap;
            holes[k] = arguments.hole_time_step.data ? gap - 1.0f : 0.0f;
        }
    }
};

// Gradients that are summed over the steps of K paths, from the last to the first.
template <int S, int K>
struct Reverse {
    Vec carry[K * S] = {};  // exp(s_{t+1} A) times the gradient of h_{t+1}
    Vec grad_A[S] = {};
    Vec* grad_direction_B;  // (move_kinds, S)
};

// One step in reverse. `before` is h_{t-1}, `of_path` the decays of each path. Adds to the block's gradients, and
// writes that of B, not yet summed over the lanes, to `grad_B`.
template <int S, int K, bool kMoves, bool kHoles>
[[gnu::always_inline]] inline void reverse_step(const ScanArguments& arguments, const Sample& sample,
                                                const Slice<S>& slice, const Step<K>& step, const Vec* const* of_path,
                                                const Vec* before, int64_t t, Block& block, Reverse<S, K>& reverse,
                                                Vec* grad_B) {
    const DecaySteps<K> decay_steps(arguments, step);
    Vec grad_y[K], grad_input[K] = {};
    Vec* grad_direction_B[K];
    for (int k = 0; k < K; ++k) {
        grad_y[k] = block.grad_y[step.visits[k].token];
        grad_direction_B[k] = reverse.grad_direction_B + step.visits[k].move * S;
    }
    Vec grad_delta{}, grad_hole_step{};
    for (int n = 0; n < S; ++n) {
        // The gradient of s_t A[n], summed over paths with the weights of delta_t and of the hole's step in s_t.
        Vec grad_exponent{}, grad_hole_exponent{}, sum_B{};
        for (int k = 0; k < K; ++k) {
            const int i = k * S + n;
            const Vec grad_h = grad_y[k] * step.C[n] + reverse.carry[i];
            const Vec grad_B_k = grad_h * step.input[k];
            sum_B += grad_B_k;
            if constexpr (kMoves) grad_direction_B[k][n] += grad_B_k;
            grad_input[k] += grad_h * step.B[k * sample.padded_states + n];
            reverse.carry[i] = grad_h * of_path[k][n];
            if constexpr (kHoles) {
                const Vec grad = reverse.carry[i] * before[i];
                grad_exponent += decay_steps.weight[k] * grad;
                grad_hole_exponent += decay_steps.holes[k] * grad;
            } else {
                grad_exponent += reverse.carry[i] * before[i];
            }
        }
        grad_B[n] = sum_B;
        grad_delta += grad_exponent * slice.A[n];
        reverse.grad_A[n] += grad_exponent * step.delta;
        if constexpr (kHoles) {
            grad_hole_step += grad_hole_exponent * slice.A[n];
            reverse.grad_A[n] += grad_hole_exponent * block.hole_step;
        }
    }
    grad_delta *= 1.0f / kLog2E;  // slice.A holds A log2(e)
    if constexpr (kHoles) block.grad_hole_step += grad_hole_step * (1.0f / kLog2E);
    for (int k = 0; k < K; ++k) {
        grad_delta += grad_input[k] * step.u[k];
        block.grad_u[step.visits[k].token] += grad_input[k] * step.delta + grad_y[k] * slice.skip;
        if (slice.first_state == 0) block.grad_D += grad_y[k] * step.u[k];
    }
    block.grad_delta[t] += grad_delta;
}

// The reverse of scan_paths: given the gradient of y, adds to the gradients of all inputs.
template <int S, int K, bool kMoves>
void reverse_paths(const ScanArguments& arguments, Workspace& work, Block& block, const Slice<S>& slice,
                   int64_t first_path, int64_t task, Partials& partials) {
    Reverse<S, K> reverse;
    work.grad_direction_B.assign(arguments.move_kinds * S, Vec{});
    reverse.grad_direction_B = work.grad_direction_B.data();
    for (int64_t t = arguments.length - 1; t >= 0; --t) {
        const Step<K> step = load_step<K>(work.sample, block, slice.first_state, first_path, t);
        const Vec *before = &work.states[t * K * S], *decay = &work.decays[t * S];
        Vec grad_B[kTableWidth<S>] = {};
        if (step.has_holes()) {
            const PathDecays<S, K> decays(arguments, block, slice, step, decay);
            reverse_step<S, K, kMoves, true>(arguments, work.sample, slice, step, decays.of_path, before, t, block,
                                             reverse, grad_B);
        } else {
            const Vec* of_path[K];
            std::fill_n(of_path, K, decay);
            reverse_step<S, K, kMoves, false>(arguments, work.sample, slice, step, of_path, before, t, block, reverse,
                                              grad_B);
        }
        add_lane_sums<S>(grad_B, partials.B.row(task, t) + slice.first_state);
    }

    for (int lane = 0; lane < block.width; ++lane) {
        float* row = partials.A.row(block.sample, block.first_channel + lane) + slice.first_state;
        for (int n = 0; n < slice.count; ++n) row[n] += reverse.grad_A[n][lane];
    }
    if constexpr (kMoves) {
        for (int64_t move = 0; move < arguments.move_kinds; ++move) {
            Vec sums[kTableWidth<S>] = {};
            std::copy_n(&work.grad_direction_B[move * S], S, sums);
            add_lane_sums<S>(sums, partials.direction_B.row(task, move) + slice.first_state);
        }
    }
}

// Loads the gradient of y, the scan's output before the gate, and sets the other gradients to 0.
template <ElementType type>
void load_gradients(const ScanArguments& arguments, const Rows& grad_output, Workspace& work) {
    for (int b = 0; b < work.block_count; ++b) {
        Block& block = work.blocks[b];
        block.grad_D = block.grad_hole_step = Vec{};
        block.grad_y.resize(arguments.length);
        block.grad_u.assign(arguments.length, Vec{});
        block.grad_delta.assign(arguments.length, Vec{});
    }
    for (int64_t token = 0; token < arguments.length; ++token) {
        for (int b = 0; b < work.block_count; ++b) {
            Block& block = work.blocks[b];
            Vec grad = load_token<type>(grad_output, block, token);
            if (arguments.gate.data.data) grad *= silu(load_token<type>(arguments.gate, block, token));
            block.grad_y[token] = grad;
        }
    }
}

template <int S>
void backward_block(const ScanArguments& arguments, Workspace& work, Block& block, int64_t task, Partials& partials) {
    for (int lane = 0; lane < block.width; ++lane) {
        std::fill_n(partials.A.row(block.sample, block.first_channel + lane), arguments.states, 0.0f);
    }
    for (int64_t first_state = 0; first_state < arguments.states; first_state += S) {
        const Slice<S> slice = load_slice<S>(arguments, block, first_state);
        for_path_groups(arguments.paths, [&](auto group, int64_t first_path) {
            constexpr int K = decltype(group)::value;
            work.states.resize((arguments.length + 1) * K * S);
            work.decays.resize((arguments.length + 1) * S);
            const Trace trace{work.states.data(), work.decays.data(), K * S, S,
                              partials.C.row(task, 0) + first_state, partials.C.padded_width};
            scan_paths<S, K, true>(arguments, work.sample, block, slice, first_path, trace);
            (arguments.moves.data ? reverse_paths<S, K, true> : reverse_paths<S, K, false>)(
                arguments, work, block, slice, first_path, task, partials);
        });
    }
}

template <ElementType type>
void store_gradients(const ScanArguments& arguments, const Rows& grad_output, const Workspace& work,
                     const ScanGradients& gradients, Partials& partials) {
    Vec grad_bias[kBlocksPerTask] = {};
    for (int64_t token = 0; token < arguments.length; ++token) {
        for (int b = 0; b < work.block_count; ++b) {
            const Block& block = work.blocks[b];
            const int64_t place = (block.sample * arguments.length + token) * arguments.channels + block.first_channel;
            const Vec time_step = load_token<type>(arguments.time_step, block, token) + block.bias;
            const Vec grad_time_step = block.grad_delta[token] * sigmoid(time_step);
            grad_bias[b] += grad_time_step;
            store_token<type>(gradients.hidden_states, place, block, block.grad_u[token]);
            store_token<type>(gradients.time_step, place, block, grad_time_step);
            if (arguments.gate.data.data) {
                const Vec slope = silu_derivative(load_token<type>(arguments.gate, block, token));
                const Vec grad_gate = load_token<type>(grad_output, block, token) * block.y[token] * slope;
                store_token<type>(gradients.gate, place, block, grad_gate);
            }
        }
    }
    for (int b = 0; b < work.block_count; ++b) {
        const Block& block = work.blocks[b];
        store(partials.D.row(block.sample, 0) + block.first_channel, block.grad_D, block.width);
        store(partials.time_step_bias.row(block.sample, 0) + block.first_channel, grad_bias[b], block.width);
        store(partials.hole_time_step.row(block.sample, 0) + block.first_channel, block.grad_hole_step, block.width);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Tasks: a sample and a few blocks of its channels
// ---------------------------------------------------------------------------------------------------------------------

int64_t tasks_per_sample(const ScanArguments& arguments) {
    return divide_up(arguments.channels, kLanes * kBlocksPerTask);
}

// The number of calls, forward and backward, by which a thread knows whether the sample that it has loaded is of this
// one.
std::atomic<int64_t> calls{0};

// Loads the blocks of each task, and calls work(workspace, task).
template <int S, ElementType type, typename Work>
void for_tasks(const ScanArguments& arguments, int threads, const Work& work) {
    const int64_t call = ++calls, tasks = tasks_per_sample(arguments);
    parallel_for(arguments.batch * tasks, threads, [&](int64_t task) {
        Workspace& workspace = thread_workspace;
        Sample& sample = workspace.sample;
        if (sample.call != call || sample.index != task / tasks) {
            load_sample(arguments, task / tasks, padded_states<S>(arguments), sample);
            sample.call = call;
        }
        load_blocks<type>(arguments, sample.index, task % tasks * kLanes * kBlocksPerTask, workspace);
        work(workspace, task);
    });
}

template <int S, ElementType type>
void forward(const ScanArguments& arguments, Target output, int threads) {
    for_tasks<S, type>(arguments, threads, [&](Workspace& work, int64_t) {
        for (int b = 0; b < work.block_count; ++b) forward_block<S>(arguments, work.sample, work.blocks[b]);
        store_output<type>(arguments, work, output);
    });
}

template <int S, ElementType type>
void backward(const ScanArguments& arguments, const Rows& grad_output, const ScanGradients& gradients, int threads) {
    const int64_t batch = arguments.batch, channels = arguments.channels, states = arguments.states;
    const int64_t groups = tasks_per_sample(arguments), tasks = batch * groups;
    const int64_t width = padded_states<S>(arguments);
    Partials partials{{batch, channels, states, states},
                      {batch, 1, channels, channels},
                      {batch, 1, channels, channels},
                      {batch, 1, channels, channels},
                      {tasks, arguments.length, states, width},
                      {tasks, arguments.length, states, width},
                      {tasks, arguments.move_kinds, states, width}};

    for_tasks<S, type>(arguments, threads, [&](Workspace& work, int64_t task) {
        partials.B.clear(task);
        partials.C.clear(task);
        partials.direction_B.clear(task);
        load_gradients<type>(arguments, grad_output, work);
        for (int b = 0; b < work.block_count; ++b) backward_block<S>(arguments, work, work.blocks[b], task, partials);
        store_gradients<type>(arguments, grad_output, work, gradients, partials);
    });

    parallel_for(batch, threads, [&](int64_t sample) {
        const int64_t place = sample * arguments.length * states;
        partials.B.add_up(sample * groups, groups, gradients.B + place);
        partials.C.add_up(sample * groups, groups, gradients.C + place);
    });
    partials.A.add_up(0, batch, gradients.A);
    partials.D.add_up(0, batch, gradients.D);
    partials.time_step_bias.add_up(0, batch, gradients.time_step_bias);
    if (gradients.hole_time_step) partials.hole_time_step.add_up(0, batch, gradients.hole_time_step);
    if (gradients.direction_B) partials.direction_B.add_up(0, tasks, gradients.direction_B);
}

bool all_within(const ScanArguments& arguments, const Paths& paths, int64_t low, int64_t high) {
    if (!paths.data) return true;
    const int64_t count = (paths.batch_stride ? arguments.batch : 1) * arguments.paths * arguments.length;
    bool within = true;
    for (int64_t i = 0; i < count; ++i) within &= paths.data[i] >= low && paths.data[i] < high;
    return within;
}

const char* find_error(const ScanArguments& arguments) {
    if (!all_within(arguments, arguments.order, 0, arguments.length)) return "`order` must be in [0, length)";
    if (!all_within(arguments, arguments.gaps, 1, INT32_MAX)) return "`gaps` must be at least 1";
    if (!all_within(arguments, arguments.moves, 0, arguments.move_kinds)) {
        return "`moves` must be in [0, direction_B.shape[0])";
    }
    return nullptr;
}

// The arguments with those parameters in float32 that are read number by number.
ScanArguments with_floats(const ScanArguments& given, Floats& floats) {
    ScanArguments arguments = given;
    arguments.A = floats.of(given.A, given.channels * given.states);
    arguments.direction_B = floats.of(given.direction_B, given.move_kinds * given.states);
    return arguments;
}

}  // namespace

// Both return null or an error message.

extern "C" const char* selective_scan_forward(const ScanArguments* given, const Target* output, int threads) {
    if (const char* error = find_error(*given)) return error;
    return with_memory([&] {
        Floats floats;
        const ScanArguments arguments = with_floats(*given, floats);
        with_type(output->type, [&](auto type) {
            (arguments.states <= 8 ? forward<8, type.value> : forward<16, type.value>)(arguments, *output, threads);
        });
    });
}

extern "C" const char* selective_scan_backward(const ScanArguments* given, const Rows* grad_output,
                                               const ScanGradients* gradients, int threads) {
    if (const char* error = find_error(*given)) return error;
    return with_memory([&] {
        Floats floats;
        const ScanArguments arguments = with_floats(*given, floats);
        with_type(grad_output->data.type, [&](auto type) {
            (arguments.states <= 8 ? backward<8, type.value> : backward<16, type.value>)(arguments, *grad_output,
                                                                                        *gradients, threads);
        });
    });
}
