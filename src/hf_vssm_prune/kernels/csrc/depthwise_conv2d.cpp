// Depthwise convolution on the patch grid, at the cells that still hold a token.
//
// A dropped cell counts as zero, so each kept token only gathers from its kept neighbours: with a share r of the tokens
// left, the work is about r^2 of the dense one. The neighbours of all tokens of a sample are listed once and used for
// many channels.

#include <algorithm>
#include <memory>
#include <vector>

#include "arguments.h"
#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kVectors = 4;                   // vectors that are summed side by side
constexpr int kBlock = kVectors * kLanes;     // channels of a block
constexpr int kBlocksPerTask = 256 / kBlock;  // blocks of channels for which one list of neighbours is made

struct Neighbour {
    int32_t tap, token;
};

// For each token its kept neighbours, itself among them, in the order of the kernel's taps.
struct Neighbours {
    std::vector<Neighbour> entries;
    std::vector<int64_t> starts;  // entries [starts[i], starts[i + 1]) are those of token i
    std::vector<int32_t> token_of_cell;

    void list(const ConvolutionArguments& arguments, int64_t sample) {
        const int64_t radius = arguments.kernel / 2, padded_width = arguments.width + 2 * radius;
        const auto cell_of = [&](int64_t token) {
            const int64_t cell = arguments.kept ? arguments.kept[sample * arguments.tokens + token] : token;
            return (cell / arguments.width + radius) * padded_width + cell % arguments.width + radius;
        };
        token_of_cell.assign((arguments.height + 2 * radius) * padded_width, -1);
        for (int64_t token = 0; token < arguments.tokens; ++token) token_of_cell[cell_of(token)] = token;

        entries.resize(arguments.tokens * arguments.kernel * arguments.kernel);
        starts.assign(1, 0);
        int64_t count = 0;
        for (int64_t token = 0; token < arguments.tokens; ++token) {
            const int32_t* corner = &token_of_cell[cell_of(token) - radius * padded_width - radius];
            int32_t tap = 0;
            for (int64_t row = 0; row < arguments.kernel; ++row) {
                for (int64_t column = 0; column < arguments.kernel; ++column, ++tap) {
                    entries[count] = {tap, corner[row * padded_width + column]};
                    count += entries[count].token >= 0;
                }
            }
            starts.push_back(count);
        }
    }
};

// kBlock channels of a list of rows, one row after the other.
using BlockRows = std::vector<Vec>;

struct Workspace {
    Neighbours neighbours;
    BlockRows weight, mirrored_weight, inputs, grads, grad_weight;
};

// One for each thread, so that its memory is used again.
thread_local Workspace thread_workspace;

struct Block {
    int64_t sample, first_channel;
    int width[kVectors];  // channels that each vector holds

    Block(const ConvolutionArguments& arguments, int64_t sample, int64_t first_channel)
        : sample(sample), first_channel(first_channel) {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t left = arguments.channels - first_channel - v * kLanes;
            width[v] = static_cast<int>(std::clamp<int64_t>(left, 0, kLanes));
        }
    }
};

void load_row(const Block& block, const float* channels, Vec* target) {
    for (int v = 0; v < kVectors; ++v) target[v] = load(channels + block.first_channel + v * kLanes, block.width[v]);
}

void store_row(const Block& block, const Vec* source, float* channels) {
    for (int v = 0; v < kVectors; ++v) store(channels + block.first_channel + v * kLanes, source[v], block.width[v]);
}

void load_tokens(const ConvolutionArguments& arguments, const Block& block, const Rows& tokens, BlockRows& target) {
    target.resize(arguments.tokens * kVectors);
    for (int64_t i = 0; i < arguments.tokens; ++i) load_row(block, tokens.row(block.sample, i), &target[i * kVectors]);
}

void load_weight(const ConvolutionArguments& arguments, const Block& block, BlockRows& target) {
    const int64_t taps = arguments.kernel * arguments.kernel;
    target.resize(taps * kVectors);
    for (int64_t tap = 0; tap < taps; ++tap) {
        load_row(block, arguments.weight + tap * arguments.channels, &target[tap * kVectors]);
    }
}

// sum[v] += weight[tap] * rows[neighbour] over the neighbours of a token.
void gather(const Neighbours& neighbours, int64_t token, const BlockRows& weight, const BlockRows& rows, Vec* sum) {
    Vec total[kVectors];
    std::copy_n(sum, kVectors, total);
    const Vec *weights = weight.data(), *sources = rows.data();
    const Neighbour* last = neighbours.entries.data() + neighbours.starts[token + 1];
    for (const Neighbour* entry = neighbours.entries.data() + neighbours.starts[token]; entry != last; ++entry) {
        for (int v = 0; v < kVectors; ++v) {
            total[v] += weights[entry->tap * kVectors + v] * sources[entry->token * kVectors + v];
        }
    }
    std::copy_n(total, kVectors, sum);
}

// Bias and convolution: what SiLU is applied to.
void convolve(const ConvolutionArguments& arguments, const Block& block, const Workspace& work, int64_t token,
              Vec* result) {
    std::fill_n(result, kVectors, Vec{});
    if (arguments.bias) load_row(block, arguments.bias, result);
    gather(work.neighbours, token, work.weight, work.inputs, result);
}

void forward_block(const ConvolutionArguments& arguments, const Block& block, Workspace& work, float* output) {
    load_weight(arguments, block, work.weight);
    load_tokens(arguments, block, arguments.hidden_states, work.inputs);
    for (int64_t token = 0; token < arguments.tokens; ++token) {
        Vec result[kVectors];
        convolve(arguments, block, work, token, result);
        if (arguments.silu) {
            for (Vec& value : result) value = silu(value);
        }
        store_row(block, result, output + (block.sample * arguments.tokens + token) * arguments.channels);
    }
}

// `partial_weight` (taps, channels) and `partial_bias` (channels) are this sample's share.
void backward_block(const ConvolutionArguments& arguments, const Rows& grad_output, const Block& block, Workspace& work,
                    float* grad_hidden_states, float* partial_weight, float* partial_bias) {
    const int64_t taps = arguments.kernel * arguments.kernel;
    load_weight(arguments, block, work.weight);
    load_tokens(arguments, block, arguments.hidden_states, work.inputs);
    load_tokens(arguments, block, grad_output, work.grads);

    if (arguments.silu) {
        for (int64_t token = 0; token < arguments.tokens; ++token) {
            Vec result[kVectors];
            convolve(arguments, block, work, token, result);
            for (int v = 0; v < kVectors; ++v) work.grads[token * kVectors + v] *= silu_derivative(result[v]);
        }
    }

    Vec grad_bias[kVectors] = {};
    work.grad_weight.assign(taps * kVectors, Vec{});
    for (int64_t token = 0; token < arguments.tokens; ++token) {
        Vec grad[kVectors];
        std::copy_n(&work.grads[token * kVectors], kVectors, grad);
        for (int v = 0; v < kVectors; ++v) grad_bias[v] += grad[v];
        for (int64_t i = work.neighbours.starts[token]; i < work.neighbours.starts[token + 1]; ++i) {
            const Neighbour entry = work.neighbours.entries[i];
            for (int v = 0; v < kVectors; ++v) {
                work.grad_weight[entry.tap * kVectors + v] += grad[v] * work.inputs[entry.token * kVectors + v];
            }
        }
    }
    store_row(block, grad_bias, partial_bias);
    for (int64_t tap = 0; tap < taps; ++tap) {
        store_row(block, &work.grad_weight[tap * kVectors], partial_weight + tap * arguments.channels);
    }

    // If j is i's neighbour at a tap, then i is j's neighbour at the mirrored tap.
    work.mirrored_weight.resize(taps * kVectors);
    for (int64_t tap = 0; tap < taps; ++tap) {
        std::copy_n(&work.weight[tap * kVectors], kVectors, &work.mirrored_weight[(taps - 1 - tap) * kVectors]);
    }
    for (int64_t token = 0; token < arguments.tokens; ++token) {
        Vec grad[kVectors] = {};
        gather(work.neighbours, token, work.mirrored_weight, work.grads, grad);
        store_row(block, grad, grad_hidden_states + (block.sample * arguments.tokens + token) * arguments.channels);
    }
}

// A task is a sample and a few blocks of its channels.
template <typename Work>
void for_blocks(const ConvolutionArguments& arguments, int threads, const Work& work) {
    constexpr int64_t channels_per_task = kBlock * kBlocksPerTask;
    const int64_t tasks_per_sample = (arguments.channels + channels_per_task - 1) / channels_per_task;
    parallel_for(arguments.batch * tasks_per_sample, threads, [&](int64_t task) {
        const int64_t sample = task / tasks_per_sample, first = task % tasks_per_sample * channels_per_task;
        const int64_t last = std::min(first + channels_per_task, arguments.channels);
        thread_workspace.neighbours.list(arguments, sample);
        for (int64_t channel = first; channel < last; channel += kBlock) {
            work(Block(arguments, sample, channel), thread_workspace);
        }
    });
}

// sum[i] = the sum of partials[sample][i], in the order of the samples.
void add_up(const float* partials, int64_t batch, int64_t size, float* sum) {
    std::fill_n(sum, size, 0.0f);
    for (int64_t sample = 0; sample < batch; ++sample) {
        for (int64_t i = 0; i < size; ++i) sum[i] += partials[sample * size + i];
    }
}

const char* find_error(const ConvolutionArguments& arguments) {
    if (!arguments.kept) return nullptr;
    const int64_t cells = arguments.height * arguments.width;
    bool within = true;
    for (int64_t i = 0; i < arguments.batch * arguments.tokens; ++i) {
        within &= arguments.kept[i] >= 0 && arguments.kept[i] < cells;
    }
    return within ? nullptr : "`kept` must be in [0, height * width)";
}

}  // namespace

// Both return null, or what is wrong with the arguments.

extern "C" const char* depthwise_conv2d_forward(const ConvolutionArguments* arguments, float* output, int threads) {
    if (const char* error = find_error(*arguments)) return error;
    for_blocks(*arguments, threads,
               [&](const Block& block, Workspace& work) { forward_block(*arguments, block, work, output); });
    return nullptr;
}

extern "C" const char* depthwise_conv2d_backward(const ConvolutionArguments* arguments, const Rows* grad_output,
                                                 const ConvolutionGradients* gradients, int threads) {
    if (const char* error = find_error(*arguments)) return error;
    const int64_t batch = arguments->batch, channels = arguments->channels;
    const int64_t weight_size = arguments->kernel * arguments->kernel * channels;
    const std::unique_ptr<float[]> weights(new float[batch * weight_size]), biases(new float[batch * channels]);
    for_blocks(*arguments, threads, [&](const Block& block, Workspace& work) {
        backward_block(*arguments, *grad_output, block, work, gradients->hidden_states,
                       weights.get() + block.sample * weight_size, biases.get() + block.sample * channels);
    });
    add_up(weights.get(), batch, weight_size, gradients->weight);
    if (gradients->bias) add_up(biases.get(), batch, channels, gradients->bias);
    return nullptr;
}
