// Depthwise convolution on the patch grid, at the cells that still hold a token, or along a sequence (a grid of one
// row), forward and backward.
//
// SiLU is applied to bias + convolution. A task is a few blocks of channels of one sample. Sums over samples are
// computed in the order of the samples, regardless of the threads.

#include <algorithm>
#include <memory>

#include "arguments.h"
#include "channel_block.h"
#include "grid_cells.h"
#include "parallel.h"
#include "vectors.h"

namespace {

constexpr int kBlocksPerTask = 256 / kBlock;  // they share a list of neighbours

// The memory is reused.
struct Workspace {
    SparseCells sparse;
    BlockRows weight, inputs, sums, grads, grad_weight;
};

thread_local Workspace thread_workspace;

template <typename Cells>
void load_tokens(const ConvolutionArguments& arguments, const ChannelBlock& block, const Cells& cells,
                 const Rows& tokens, BlockRows& target) {
    target.assign(cells.places * kVectors, Vec{});
    with_type(tokens.data.type, [&](auto type) {
        for (int64_t i = 0; i < arguments.tokens; ++i) {
            const int64_t place = block.sample * tokens.batch_stride + i * tokens.row_stride;
            block.load_row<type.value>(tokens.data.template at<type.value>(place), &target[cells.place(i) * kVectors]);
        }
    });
}

// `rows` has a row for each cell, `target` one for each token of all samples. `change` is applied to each vector first.
template <typename Cells, typename Change>
void store_tokens(const ConvolutionArguments& arguments, const ChannelBlock& block, const Cells& cells,
                  const BlockRows& rows, Target target, const Change& change) {
    with_type(target.type, [&](auto type) {
        for (int64_t i = 0; i < arguments.tokens; ++i) {
            Vec row[kVectors];
            for (int v = 0; v < kVectors; ++v) row[v] = change(rows[cells.place(i) * kVectors + v]);
            const int64_t place = (block.sample * arguments.tokens + i) * arguments.channels;
            block.store_row<type.value>(row, target.template at<type.value>(place));
        }
    });
}

// Loads a block, and writes the input of SiLU to work.sums.
template <typename Cells>
void convolve(const ConvolutionArguments& arguments, const ChannelBlock& block, const Cells& cells, Workspace& work) {
    block.load_columns(static_cast<const float*>(arguments.weight.data), arguments.window.taps(), work.weight);
    load_tokens(arguments, block, cells, arguments.hidden_states, work.inputs);
    Vec bias[kVectors] = {};
    if (arguments.bias.data) {
        with_type(arguments.bias.type, [&](auto type) { block.load_row<type.value>(arguments.bias.data, bias); });
    }
    work.sums.resize(cells.places * kVectors);
    for (int64_t i = 0; i < cells.places; ++i) std::copy_n(bias, kVectors, &work.sums[i * kVectors]);
    cells.convolve(work.weight, work.inputs, work.sums);
}

template <typename Cells>
void forward_block(const ConvolutionArguments& arguments, const ChannelBlock& block, const Cells& cells,
                   Workspace& work, Target output) {
    convolve(arguments, block, cells, work);
    if (arguments.silu) {
        store_tokens(arguments, block, cells, work.sums, output, [](Vec sum) { return silu(sum); });
    } else {
        store_tokens(arguments, block, cells, work.sums, output, [](Vec sum) { return sum; });
    }
}

// `partial_weight` (channels, taps) and `partial_bias` (channels) are this sample's part of the sums.
template <typename Cells>
void backward_block(const ConvolutionArguments& arguments, const Rows& grad_output, const ChannelBlock& block,
                    const Cells& cells, Workspace& work, Target grad_hidden_states, float* partial_weight,
                    float* partial_bias) {
    const int64_t taps = arguments.window.taps();
    convolve(arguments, block, cells, work);
    load_tokens(arguments, block, cells, grad_output, work.grads);
    Vec grad_bias[kVectors] = {};
    for (int64_t token = 0; token < arguments.tokens; ++token) {
        Vec* grad = &work.grads[cells.place(token) * kVectors];
        const Vec* sum = &work.sums[cells.place(token) * kVectors];
        for (int v = 0; v < kVectors; ++v) {
            if (arguments.silu) grad[v] *= silu_derivative(sum[v]);
            grad_bias[v] += grad[v];
        }
    }
    block.store_row<kFloat32>(grad_bias, partial_bias);

    work.grad_weight.assign(taps * kVectors, Vec{});
    cells.correlate(work.grads, work.inputs, work.grad_weight);
    block.store_columns(work.grad_weight, taps, partial_weight);

    work.sums.assign(cells.places * kVectors, Vec{});
    cells.spread(work.weight, work.grads, work.sums);
    store_tokens(arguments, block, cells, work.sums, grad_hidden_states, [](Vec sum) { return sum; });
}

// Calls work(block, cells, workspace) for all blocks, with the cells that `prepare(sample, workspace)` returns.
template <typename Prepare, typename Work>
void for_blocks(const ConvolutionArguments& arguments, int threads, const Prepare& prepare, const Work& work) {
    constexpr int64_t channels_per_task = kBlock * kBlocksPerTask;
    const int64_t tasks_per_sample = (arguments.channels + channels_per_task - 1) / channels_per_task;
    parallel_for(arguments.batch * tasks_per_sample, threads, [&](int64_t task) {
        const int64_t sample = task / tasks_per_sample, first = task % tasks_per_sample * channels_per_task;
        const int64_t last = std::min(first + channels_per_task, arguments.channels);
        const auto& cells = prepare(sample, thread_workspace);
        for (int64_t channel = first; channel < last; channel += kBlock) {
            work(ChannelBlock(sample, channel, arguments.channels), cells, thread_workspace);
        }
    });
}

// As above, with the cells that suit the arguments.
template <typename Work>
void for_blocks(const ConvolutionArguments& arguments, int threads, const Work& work) {
    const Window& window = arguments.window;
    const auto dense = [&](const auto& cells) {
        for_blocks(arguments, threads, [&](int64_t, Workspace&) -> const auto& { return cells; }, work);
    };
    if (!arguments.kept && window.height == 7) return dense(DenseGrid<7>(arguments.height, arguments.width));
    if (!arguments.kept && window.height == 3) return dense(DenseGrid<3>(arguments.height, arguments.width));
    if (!arguments.kept && arguments.height == 1 && window.height == 1 && window.width == 4) {
        return dense(DenseSequence<4>(arguments.tokens, window.left));
    }
    const auto list = [&](int64_t sample, Workspace& workspace) -> const SparseCells& {
        const int32_t* kept = arguments.kept ? arguments.kept + sample * arguments.tokens : nullptr;
        const int64_t cells = arguments.height * arguments.width;
        const int32_t* stand_ins = arguments.stand_ins ? arguments.stand_ins + sample * cells : nullptr;
        workspace.sparse.list(kept, stand_ins, arguments.tokens, arguments.height, arguments.width, window);
        return workspace.sparse;
    };
    for_blocks(arguments, threads, list, work);
}

// sum[i] = the sum of partials[sample][i], in the order of the samples.
void add_up(const float* partials, int64_t batch, int64_t size, float* sum) {
    std::fill_n(sum, size, 0.0f);
    for (int64_t sample = 0; sample < batch; ++sample) {
        for (int64_t i = 0; i < size; ++i) sum[i] += partials[sample * size + i];
    }
}

// The arguments with the weight in float32, because the loops over the kernel read it number by number.
ConvolutionArguments with_floats(const ConvolutionArguments& given, Floats& floats) {
    ConvolutionArguments arguments = given;
    arguments.weight = floats.of(given.weight, given.channels * given.window.taps());
    return arguments;
}

bool within(const int32_t* indices, int64_t count, int64_t limit) {
    bool all = true;
    for (int64_t i = 0; i < count; ++i) all &= indices[i] >= 0 && indices[i] < limit;
    return all;
}

const char* find_error(const ConvolutionArguments& arguments) {
    const int64_t cells = arguments.height * arguments.width;
    if (arguments.kept && !within(arguments.kept, arguments.batch * arguments.tokens, cells)) {
        return "`kept` must be in [0, height * width)";
    }
    if (arguments.stand_ins && !within(arguments.stand_ins, arguments.batch * cells, arguments.tokens)) {
        return "`stand_ins` must be in [0, tokens)";
    }
    return nullptr;
}

}  // namespace

// Both return null or an error message.

extern "C" const char* depthwise_conv2d_forward(const ConvolutionArguments* given, const Target* output, int threads) {
    if (const char* error = find_error(*given)) return error;
    return with_memory([&] {
        Floats floats;
        const ConvolutionArguments arguments = with_floats(*given, floats);
        for_blocks(arguments, threads, [&](const ChannelBlock& block, const auto& cells, Workspace& work) {
            forward_block(arguments, block, cells, work, *output);
        });
    });
}

extern "C" const char* depthwise_conv2d_backward(const ConvolutionArguments* given, const Rows* grad_output,
                                                 const ConvolutionGradients* gradients, int threads) {
    if (const char* error = find_error(*given)) return error;
    const int64_t batch = given->batch, channels = given->channels;
    const int64_t weight_size = given->window.taps() * channels;
    return with_memory([&] {
        Floats floats;
        const ConvolutionArguments arguments = with_floats(*given, floats);
        const std::unique_ptr<float[]> weights(new float[batch * weight_size]), biases(new float[batch * channels]);
        for_blocks(arguments, threads, [&](const ChannelBlock& block, const auto& cells, Workspace& work) {
            backward_block(arguments, *grad_output, block, cells, work, gradients->hidden_states,
                           weights.get() + block.sample * weight_size, biases.get() + block.sample * channels);
        });
        add_up(weights.get(), batch, weight_size, gradients->weight);
        if (gradients->bias) add_up(biases.get(), batch, channels, gradients->bias);
    });
}
