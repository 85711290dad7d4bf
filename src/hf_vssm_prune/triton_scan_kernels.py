# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# Parameters of a Triton kernel are pointers and numbers; Triton reads annotations as its own.
"""The GPU code of `triton_scan`. It is a separate module because it can be imported only if Triton is installed, and
because TRITON_INTERPRET is read on import.

A program is one warp. It walks one chunk of one path of one image, for a block of channels, `UNROLL` steps at a time.
While the states of one block of steps are computed, the data of the next block is being loaded. The indices are loaded
one block earlier, because they determine which rows to load. The state is a tile (states, channels) in registers. The
loads of A, in which states are contiguous, determine how Triton distributes the tiles over threads: each thread has
four neighbouring states of a channel, so that B and C are read in one piece if they are aligned, and a sum over 16
states takes two shuffles.

A path with several chunks is walked twice. First, each chunk starts from zero, and `carry` passes the final states on
from chunk to chunk; then each chunk starts from the state passed to it. This is possible because the state after a
chunk is linear in the state before it. The same holds for the state's gradient, which is passed from the last chunk to
the first.

Rows of tokens have a stride for the batch and one for the row; everything else is contiguous.
"""

try:  # in this form, which transformers skips when it checks which packages a Hub repository's code needs
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this module needs Triton, see `triton_backend.unavailable`") from error


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scan_forward(
    hidden_states, time_step, A, B, C, D, time_step_bias, gate, order, gaps, hole_time_step, direction_B, moves,
    output,  # (batch, paths, length, channels), at the token; None in the first of two walks
    chunk_states,  # None or float32 (batch, paths, chunks, states, channels): the first walk writes each chunk's last
    # state, the second reads each chunk's first state
    chunk_times,  # None or float32 (batch, paths, chunks, channels): the total decay time, from the first walk
    block_states,  # None or float32 (batch, paths, blocks of steps, states, channels): the states before each block
    paths, length, channels, chunk_length,  # a multiple of UNROLL
    hidden_states_batch, hidden_states_row, time_step_batch, time_step_row, B_batch, B_row, C_batch, C_row,
    gate_batch, gate_row, order_batch, gaps_batch, moves_batch,
    STATES: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gate is applied only for a single path, because it belongs to the sum over paths."""
    walk = tl.program_id(0).to(tl.int64)
    batch, path = walk // paths, walk % paths
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    state = tl.arange(0, BLOCK_STATES)
    is_channel, is_state = channel < channels, state < STATES
    is_entry = is_state[:, None] & is_channel[None, :]
    tile = state[:, None] * channels + channel[None, :]
    chunk = walk * tl.num_programs(2) + tl.program_id(2)
    start = tl.program_id(2) * chunk_length
    end = tl.minimum(start + chunk_length, length)

    hidden_states += batch * hidden_states_batch
    time_step += batch * time_step_batch
    B += batch * B_batch
    C += batch * C_batch
    if gate is not None:
        gate += batch * gate_batch
    if order is not None:
        order += batch * order_batch + path * length
    if gaps is not None:
        gaps += batch * gaps_batch + path * length
    if moves is not None:
        moves += batch * moves_batch + path * length

    exponents = _load(A + channel[None, :] * STATES + state[:, None], is_entry) * LOG2_E
    skip = _load(D + channel, is_channel)
    bias = _load(time_step_bias + channel, is_channel)
    hole_step = bias  # read only where there is a `hole_time_step`
    if hole_time_step is not None:
        hole_step = _load(hole_time_step + channel, is_channel)

    before = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32)
    if output is not None and chunk_states is not None:
        before = _load(chunk_states + chunk * STATES * channels + tile, is_entry)
    time = tl.full((BLOCK_CHANNELS,), 0, tl.float32)

    indices = _indices(order, gaps, moves, start, start, end, UNROLL)
    rows = _rows(
        hidden_states, time_step, B, C, direction_B, gate, indices,
        hidden_states_row, time_step_row, B_row, C_row, gate_row, channel, state, is_channel, STATES, UNROLL,
    )  # fmt: skip
    next_indices = _indices(order, gaps, moves, start + UNROLL, start, end, UNROLL)
    for first in range(start, end, UNROLL):
        next_rows = _rows(
            hidden_states, time_step, B, C, direction_B, gate, next_indices,
            hidden_states_row, time_step_row, B_row, C_row, gate_row, channel, state, is_channel, STATES, UNROLL,
        )  # fmt: skip
        after_next_indices = _indices(order, gaps, moves, first + 2 * UNROLL, start, end, UNROLL)
        if block_states is not None:
            block = walk * tl.cdiv(length, UNROLL) + first // UNROLL
            tl.store(block_states + block * STATES * channels + tile, before, mask=is_entry)
        for i in tl.static_range(UNROLL):
            is_step = end > first + i
            _, token, gap, _ = indices[i]
            u, raw, B_step, C_step, z = _values(rows[i], direction_B, bias)
            delta, decay_step, _ = _times(raw, gap, gaps, hole_time_step, hole_step, is_step)
            decay = tl.exp2(exponents * decay_step[None, :])
            before = decay * before + B_step[:, None] * (delta * u)[None, :]
            if output is None:
                time += decay_step
            else:
                y = tl.sum(before * C_step[:, None], axis=0) + skip * u
                if gate is not None:
                    y *= z / (1 + tl.exp(-z))
                here = output + (walk * length + token) * channels + channel
                tl.store(here, y.to(output.dtype.element_ty), mask=_where(is_step, channel, channels))
        indices, rows, next_indices = next_indices, next_rows, after_next_indices

    if output is None:
        tl.store(chunk_states + chunk * STATES * channels + tile, before, mask=is_entry)
        tl.store(chunk_times + chunk * channels + channel, time, mask=is_channel)


@triton.jit
def scan_backward(
    hidden_states, time_step, A, B, C, D, time_step_bias, order, gaps, hole_time_step, direction_B, moves,
    grad_output,  # float32 (batch, length, channels)
    block_states,  # from `scan_forward`
    chunk_grads,  # None or float32 (batch, paths, chunks, states, channels): the gradient of a chunk's last state from
    # later steps, from `carry`; in the first of two walks, the gradient of its first state from its own steps
    # The gradients, float32, separate for each program and therefore reproducible; None in the first of two walks:
    grad_hidden_states,  # (batch, paths, length, channels), at the token
    grad_time_step,  # (batch, paths, length, channels), at the step
    grad_A,  # (batch, paths, chunks, states, channels)
    grad_B, grad_C,  # (batch, paths, blocks of channels, length, states)
    grad_D, grad_hole_time_step,  # (batch, paths, chunks, channels)
    paths, length, channels, chunk_length,  # a multiple of UNROLL
    hidden_states_batch, hidden_states_row, time_step_batch, time_step_row, B_batch, B_row, C_batch, C_row,
    order_batch, gaps_batch, moves_batch,
    STATES: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Walks from the last step of a chunk to the first. The states are recomputed, one block at a time."""
    walk = tl.program_id(0).to(tl.int64)
    batch, path = walk // paths, walk % paths
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    state = tl.arange(0, BLOCK_STATES)
    is_channel, is_state = channel < channels, state < STATES
    is_entry = is_state[:, None] & is_channel[None, :]
    tile = state[:, None] * channels + channel[None, :]
    chunk = walk * tl.num_programs(2) + tl.program_id(2)
    start = tl.program_id(2) * chunk_length
    end = tl.minimum(start + chunk_length, length)

    hidden_states += batch * hidden_states_batch
    time_step += batch * time_step_batch
    B += batch * B_batch
    C += batch * C_batch
    grad_output += batch * length * channels
    if order is not None:
        order += batch * order_batch + path * length
    if gaps is not None:
        gaps += batch * gaps_batch + path * length
    if moves is not None:
        moves += batch * moves_batch + path * length
    by_state = (walk * tl.num_programs(1) + tl.program_id(1)) * length

    decay_rates = _load(A + channel[None, :] * STATES + state[:, None], is_entry)
    skip = _load(D + channel, is_channel)
    bias = _load(time_step_bias + channel, is_channel)
    hole_step = bias  # read only where there is a `hole_time_step`
    if hole_time_step is not None:
        hole_step = _load(hole_time_step + channel, is_channel)

    # The gradient of the state from later steps.
    carried = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32)
    if grad_A is not None and chunk_grads is not None:
        carried = _load(chunk_grads + chunk * STATES * channels + tile, is_entry)
    sum_A = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32)
    sum_D = tl.full((BLOCK_CHANNELS,), 0, tl.float32)
    sum_hole = tl.full((BLOCK_CHANNELS,), 0, tl.float32)

    first = start + (end - 1 - start) // UNROLL * UNROLL
    indices = _indices(order, gaps, moves, first, start, end, UNROLL)
    rows = _rows(
        hidden_states, time_step, B, C, direction_B, grad_output, indices,
        hidden_states_row, time_step_row, B_row, C_row, channels, channel, state, is_channel, STATES, UNROLL,
    )  # fmt: skip
    next_indices = _indices(order, gaps, moves, first - UNROLL, start, end, UNROLL)
    while first >= start:
        next_rows = _rows(
            hidden_states, time_step, B, C, direction_B, grad_output, next_indices,
            hidden_states_row, time_step_row, B_row, C_row, channels, channel, state, is_channel, STATES, UNROLL,
        )  # fmt: skip
        after_next_indices = _indices(order, gaps, moves, first - 2 * UNROLL, start, end, UNROLL)
        states = ()
        if grad_A is not None:
            block = walk * tl.cdiv(length, UNROLL) + first // UNROLL
            before = _load(block_states + block * STATES * channels + tile, is_entry)
            for i in tl.static_range(UNROLL):
                states = states + (before,)  # noqa: RUF005 - Triton has no unpacking
                _, token, gap, _ = indices[i]
                u, raw, B_step, C_step, grad_y = _values(rows[i], direction_B, bias)
                delta, decay_step, gap = _times(raw, gap, gaps, hole_time_step, hole_step, end > first + i)
                decay = tl.exp2(decay_rates * LOG2_E * decay_step[None, :])
                before = decay * before + B_step[:, None] * (delta * u)[None, :]
            states = states + (before,)  # noqa: RUF005

        for i in tl.static_range(UNROLL - 1, -1, -1):
            is_step = end > first + i
            step, token, gap, _ = indices[i]
            u, raw, B_step, C_step, grad_y = _values(rows[i], direction_B, bias)
            delta, decay_step, gap = _times(raw, gap, gaps, hole_time_step, hole_step, is_step)
            decay = tl.exp2(decay_rates * LOG2_E * decay_step[None, :])
            grad_y = tl.where(is_step, grad_y, 0)
            grad_after = carried + C_step[:, None] * grad_y[None, :]
            carried = grad_after * decay
            if grad_A is not None:
                grad_exponent = carried * states[i]
                grad_input = tl.sum(grad_after * B_step[:, None], axis=0)
                grad_decay_step = tl.sum(grad_exponent * decay_rates, axis=0)

                sum_A += grad_exponent * decay_step[None, :]
                sum_D += grad_y * u
                grad_delta = grad_input * u
                if hole_time_step is None:
                    grad_delta += grad_decay_step * gap
                else:
                    grad_delta += grad_decay_step
                    sum_hole += grad_decay_step * (gap - 1)
                grad_raw = grad_delta / (1 + tl.exp(-raw))

                grad_u = grad_input * delta + grad_y * skip
                is_here = _where(is_step, channel, channels)
                tl.store(grad_hidden_states + (walk * length + token) * channels + channel, grad_u, mask=is_here)
                tl.store(grad_time_step + (walk * length + step) * channels + channel, grad_raw, mask=is_here)
                sum_B = tl.sum(grad_after * (delta * u)[None, :], axis=1)
                sum_C = tl.sum(states[i + 1] * grad_y[None, :], axis=1)
                is_here = _where(is_step, state, STATES)
                tl.store(grad_B + (by_state + step) * STATES + state, sum_B, mask=is_here)
                tl.store(grad_C + (by_state + step) * STATES + state, sum_C, mask=is_here)
        indices, rows, next_indices = next_indices, next_rows, after_next_indices
        first -= UNROLL

    if grad_A is None:
        tl.store(chunk_grads + chunk * STATES * channels + tile, carried, mask=is_entry)
    else:
        tl.store(grad_A + chunk * STATES * channels + tile, sum_A, mask=is_entry)
        tl.store(grad_D + chunk * channels + channel, sum_D, mask=is_channel)
        if hole_time_step is not None:
            tl.store(grad_hole_time_step + chunk * channels + channel, sum_hole, mask=is_channel)


@triton.jit
def carry(
    A,
    chunk_times,  # from `scan_forward`
    chunk_states,  # float32 (batch, paths, chunks, states, channels): a chunk's last state if it starts from zero,
    # which is replaced with the state from which it starts.
    chunks, channels,
    STATES: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
    FROM_LAST: tl.constexpr,
):  # fmt: skip
    walk = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    state = tl.arange(0, BLOCK_STATES)
    is_state = (state < STATES)[:, None]
    tile = state[:, None] * channels + channel[None, :]
    exponents = _load(A + channel[None, :] * STATES + state[:, None], is_state & (channel < channels)[None, :]) * LOG2_E

    given = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32)
    for first in range(0, chunks, UNROLL):
        loaded = ()
        for i in tl.static_range(UNROLL):
            chunk = walk * chunks + (chunks - 1 - (first + i) if FROM_LAST else first + i)
            is_channel = _where(chunks > first + i, channel, channels)
            is_entry = is_state & is_channel[None, :]
            here = chunk_states + chunk * STATES * channels + tile
            time = _load(chunk_times + chunk * channels + channel, is_channel)
            loaded = loaded + ((here, _load(here, is_entry), time, is_entry),)  # noqa: RUF005
        for i in tl.static_range(UNROLL):
            here, from_zero, time, is_entry = loaded[i]
            tl.store(here, given, mask=is_entry)
            given = tl.exp2(exponents * time[None, :]) * given + from_zero


@triton.jit
def gate_sum(
    parts,  # float32 (batch, paths, length, channels): each path's output, at the token
    gate,  # None or (batch, length, channels)
    grad_output,  # None or (batch, length, channels)
    output,  # (batch, length, channels): the gated sum of the parts, or the sum's gradient if `grad_output` is given
    grad_gate,  # None or float32 (batch, length, channels)
    length, channels, gate_batch, gate_row,
    PATHS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length, BLOCK_TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    is_entry = (token < length) & (channel < channels)
    entry = token * channels + channel

    total = _load(parts + batch * PATHS * length * channels + entry, is_entry)
    for path in tl.static_range(1, PATHS):
        total += _load(parts + (batch * PATHS + path) * length * channels + entry, is_entry)
    here = batch * length * channels + entry
    factor = 1.0
    if gate is not None:
        z = _load(gate + batch * gate_batch + token * gate_row + channel, is_entry)
        sigmoid = 1 / (1 + tl.exp(-z))
        factor = z * sigmoid
    if grad_output is None:
        total *= factor
    else:
        grad = _load(grad_output + here, is_entry)
        tl.store(grad_gate + here, grad * total * (sigmoid * (1 + z * (1 - sigmoid))), mask=is_entry)
        total = grad * factor
    tl.store(output + here, total.to(output.dtype.element_ty), mask=is_entry)


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def _where(condition, index, size):
    """Whether indices are smaller than the size; always False if the condition does not hold."""
    return index < tl.where(condition, size, 0)


@triton.jit
def _indices(order, gaps, moves, first, start, end, UNROLL: tl.constexpr):
    """Step, token, gap and move for each step of a block; outside the chunk, those of its nearest step."""
    indices = ()
    for i in tl.static_range(UNROLL):
        step = tl.maximum(tl.minimum(first + i, end - 1), start)
        token, gap, move = step, step, step  # placeholders for arguments that are not given
        if order is not None:
            token = tl.load(order + step).to(tl.int32)
        if gaps is not None:
            gap = tl.load(gaps + step).to(tl.int32)
        if moves is not None:
            move = tl.load(moves + step).to(tl.int32)
        indices = indices + ((step, token, gap, move),)  # noqa: RUF005
    return indices


@triton.jit
def _rows(
    hidden_states, time_step, B, C, direction_B, beside, indices,
    hidden_states_row, time_step_row, B_row, C_row, beside_row, channel, state, is_channel,
    STATES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The data for the steps of a block, as stored in memory: nothing is computed before all of it has been requested.
    `beside`: None, or read at the token like `hidden_states`."""
    is_state = state < STATES
    rows = ()
    for i in tl.static_range(UNROLL):
        step, token, _, move = indices[i]
        raw = tl.load(time_step + step * time_step_row + channel, mask=is_channel, other=0)
        B_step = tl.load(B + step * B_row + state, mask=is_state, other=0)
        C_step = tl.load(C + step * C_row + state, mask=is_state, other=0)
        u = tl.load(hidden_states + token * hidden_states_row + channel, mask=is_channel, other=0)
        direction, z = B_step, u  # placeholders for arguments that are not given
        if direction_B is not None:
            direction = tl.load(direction_B + move * STATES + state, mask=is_state, other=0)
        if beside is not None:
            z = tl.load(beside + token * beside_row + channel, mask=is_channel, other=0)
        rows = rows + ((u, raw, B_step, direction, C_step, z),)  # noqa: RUF005
    return rows


@triton.jit
def _values(row, direction_B, bias):
    """A row from `_rows` in float32: u, the time step before softplus, B, C, and the value of `beside`."""
    u, raw, B_step, direction, C_step, z = row
    B_step = B_step.to(tl.float32)
    if direction_B is not None:
        B_step += direction.to(tl.float32)
    return u.to(tl.float32), raw.to(tl.float32) + bias, B_step, C_step.to(tl.float32), z.to(tl.float32)


@triton.jit
def _times(raw, gap, gaps, hole_time_step, hole_step, is_step):
    """The time step, the time over which the state decays before it, and the gap. Outside the chunk, no time passes."""
    delta = tl.where(is_step, _softplus(raw), 0)
    decay_step = delta
    if gaps is not None:
        gap = tl.where(is_step, gap, 1).to(tl.float32)
        decay_step = delta * gap if hole_time_step is None else delta + (gap - 1) * hole_step
    else:
        gap = 1.0
    return delta, decay_step, gap


@triton.jit
def _softplus(x):
    # log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3: seven terms of its series are exact in float32,
    # for small e as well, and cheaper than a logarithm.
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    w = s * s
    series = 1 / 9 + w * (1 / 11 + w * (1 / 13))
    series = 1 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * series)))
    return tl.maximum(x, 0) + 2 * s * series
