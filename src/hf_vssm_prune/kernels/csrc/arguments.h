// The arguments that Python passes to the kernels, as arrays of 64-bit numbers and addresses; cpu.py writes them field
// by field. Strides are in elements; a null pointer means that an argument was not given.
#pragma once

#include <cstdint>

#include "elements.h"

// A tensor of shape (batch, length, width) whose rows are contiguous.
struct Rows {
    Source data;
    int64_t batch_stride, row_stride;

    Source row(int64_t sample, int64_t index) const { return data + (sample * batch_stride + index * row_stride); }
};

// Contiguous integers of shape (batch or 1, paths, length); the batch stride is 0 if all samples share them.
struct Paths {
    const int32_t* data;
    int64_t batch_stride;
};

// hidden_states, time_step, gate, the output and its gradient have one type.
struct ScanArguments {
    int64_t batch, length, channels, states, paths, move_kinds;
    Rows hidden_states, time_step, B, C, gate;
    Source A, D, time_step_bias, hole_time_step, direction_B;  // contiguous
    Paths order, gaps, moves;
};

// All contiguous.
struct ScanGradients {
    Target hidden_states, time_step, gate;
    float *A, *B, *C, *D, *time_step_bias, *hole_time_step, *direction_B;
};

// The window of a convolution at a cell: a square around it or, in a sequence, the cell and those to its left or to its
// right.
struct Window {
    int64_t height, width, left;  // left: number of cells to the left of the cell itself

    int64_t above() const { return height / 2; }
    int64_t taps() const { return height * width; }
};

struct ConvolutionArguments {
    int64_t batch, tokens, channels, height, width;
    Window window;
    Rows hidden_states;
    Source weight, bias;              // weight: (channels, taps), row by row of the window
    const int32_t *kept, *stand_ins;  // (batch, tokens), (batch, height * width)
    int64_t silu;
};

// All contiguous.
struct ConvolutionGradients {
    Target hidden_states;
    float *weight, *bias;
};
