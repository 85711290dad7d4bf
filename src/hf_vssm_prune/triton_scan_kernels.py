# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of a Triton kernel are pointers and numbers; Triton reads annotations as its own.
"""What `triton_scan` runs on a GPU. A module of its own, because it can be imported only where Triton is installed, and
because TRITON_INTERPRET is read when it is.

Tiles have the layout (states, channels): neighbouring threads hold neighbouring channels, so tokens are read in whole
rows, and a sum over the states stays within a thread.

Rows of tokens are read through a stride for the batch and one for the row; everything else is contiguous.
"""

try:  # in these words, which transformers skips when it looks what a Hub repository's code needs
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this module is for those who have asked for Triton, see `triton_backend.unavailable`") from error


# Under `repeat`, the decay across a hole is a power of the decay that the paths share. Up to this gap it is multiplied
# out, which is cheaper than another exp.
LONGEST_POWER = tl.constexpr(4)


@triton.jit
def scan_forward(
    hidden_states, time_step, A, B, C, D, time_step_bias, order, gaps, hole_time_step, direction_B, moves,
    output,  # float32 (batch, length, channels), zeros where `order` is given
    checkpoints,  # None or float32 (batch, paths, chunks, states, channels): the state before each chunk of steps
    length, channels, chunk_length,
    hidden_states_batch, hidden_states_row, time_step_batch, time_step_row, B_batch, B_row, C_batch, C_row,
    order_batch, gaps_batch, moves_batch,
    PATHS: tl.constexpr, STATES: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program walks all paths of one image and of one block of channels, because they share the decay."""
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    state = tl.arange(0, BLOCK_STATES)
    is_channel, is_state = channel < channels, state < STATES
    is_entry = is_state[:, None] & is_channel[None, :]
    tile = state[:, None] * channels + channel[None, :]

    hidden_states += batch * hidden_states_batch
    time_step += batch * time_step_batch
    B += batch * B_batch
    C += batch * C_batch
    output += batch * length * channels
    exponents = _load(A + channel[None, :] * STATES + state[:, None], is_entry) * 1.4426950408889634
    skip = _load(D + channel, is_channel)
    bias = _load(time_step_bias + channel, is_channel)
    if hole_time_step is not None:
        hole_step = _load(hole_time_step + channel, is_channel)

    states = (tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32),) * PATHS
    for step in range(length):
        if checkpoints is not None:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
            if step % chunk_length == 0:
                chunk = batch * PATHS * tl.cdiv(length, chunk_length) + step // chunk_length
                for path in tl.static_range(PATHS):
                    here = checkpoints + (chunk + path * tl.cdiv(length, chunk_length)) * STATES * channels
                    tl.store(here + tile, states[path], mask=is_entry)

        delta = _softplus(_load(time_step + step * time_step_row + channel, is_channel) + bias)
        B_step = _load(B + step * B_row + state, is_state)
        C_step = _load(C + step * C_row + state, is_state)
        shared_decay = tl.exp2(exponents * delta[None, :])

        new_states = ()
        for path in tl.static_range(PATHS):
            decay = shared_decay
            if gaps is not None:
                gap = tl.load(gaps + batch * gaps_batch + path * length + step)
                if gap > 1:
                    if hole_time_step is not None:
                        decay = tl.exp2(exponents * (delta + (gap - 1).to(tl.float32) * hole_step)[None, :])
                    elif gap <= LONGEST_POWER:
                        for _ in range(1, gap):
                            decay *= shared_decay
                    else:
                        decay = tl.exp2(exponents * (delta * gap.to(tl.float32))[None, :])

            B_path = B_step
            if direction_B is not None:
                move = tl.load(moves + batch * moves_batch + path * length + step)
                B_path += _load(direction_B + move * STATES + state, is_state)

            token = step
            if order is not None:
                token = tl.load(order + batch * order_batch + path * length + step)
            u = _load(hidden_states + token * hidden_states_row + channel, is_channel)

            new_state = decay * states[path] + B_path[:, None] * (delta * u)[None, :]
            y = tl.sum(new_state * C_step[:, None], axis=0) + skip * u
            if order is None:
                tl.store(output + token * channels + channel, y, mask=is_channel)
            else:
                # One thread makes all additions to an entry, in the order of its steps: the sum is reproducible.
                tl.atomic_add(output + token * channels + channel, y, mask=is_channel, sem="relaxed")
            new_states = new_states + (new_state,)  # noqa: RUF005 - Triton has no unpacking
        states = new_states


@triton.jit
def scan_backward(
    hidden_states, time_step, A, B, C, D, time_step_bias, order, gaps, hole_time_step, direction_B, moves,
    grad_output,  # float32 (batch, length, channels)
    checkpoints,  # from `scan_forward`
    chunk_states,  # scratch, float32 (batch, paths, chunk_length, states, channels)
    # The gradients, float32, apart for each program, hence reproducible:
    grad_hidden_states,  # (batch, paths, length, channels), at the token
    grad_time_step,  # (batch, paths, length, channels), at the step
    grad_A,  # (batch, paths, states, channels)
    grad_B, grad_C,  # (batch, paths, blocks of channels, length, states)
    grad_D, grad_hole_time_step,  # (batch, paths, channels)
    length, channels, chunk_length,
    hidden_states_batch, hidden_states_row, time_step_batch, time_step_row, B_batch, B_row, C_batch, C_row,
    order_batch, gaps_batch, moves_batch,
    STATES: tl.constexpr, BLOCK_STATES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program walks one path of one image, for one block of channels, from the last step to the first.

    The states before a chunk's steps are computed again from the chunk's checkpoint when the walk gets there.
    """
    batch, path = tl.program_id(0).to(tl.int64), tl.program_id(1)
    walk = batch * tl.num_programs(1) + path
    channel = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    state = tl.arange(0, BLOCK_STATES)
    is_channel, is_state = channel < channels, state < STATES
    is_entry = is_state[:, None] & is_channel[None, :]
    tile = state[:, None] * channels + channel[None, :]

    hidden_states += batch * hidden_states_batch
    time_step += batch * time_step_batch
    B += batch * B_batch
    C += batch * C_batch
    grad_output += batch * length * channels
    chunks = tl.cdiv(length, chunk_length)
    checkpoints += walk * chunks * STATES * channels
    chunk_states += walk * chunk_length * STATES * channels
    grad_hidden_states += walk * length * channels
    grad_time_step += walk * length * channels
    block = walk * tl.num_programs(2) + tl.program_id(2)
    grad_B += block * length * STATES
    grad_C += block * length * STATES
    if order is not None:
        order += batch * order_batch + path * length
    if gaps is not None:
        gaps += batch * gaps_batch + path * length
    if moves is not None:
        moves += batch * moves_batch + path * length

    decay_rates = _load(A + channel[None, :] * STATES + state[:, None], is_entry)
    skip = _load(D + channel, is_channel)
    bias = _load(time_step_bias + channel, is_channel)
    hole_step = bias  # read only where there is a `hole_time_step`
    if hole_time_step is not None:
        hole_step = _load(hole_time_step + channel, is_channel)

    # What the steps behind say of the state that they were given.
    carry = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32)
    sum_A = tl.full((BLOCK_STATES, BLOCK_CHANNELS), 0, tl.float32)
    sum_D = tl.full((BLOCK_CHANNELS,), 0, tl.float32)
    sum_hole = tl.full((BLOCK_CHANNELS,), 0, tl.float32)
    for chunks_before in range(chunks):
        chunk = chunks - 1 - chunks_before
        start = chunk * chunk_length
        steps = tl.minimum(chunk_length, length - start)

        before = tl.load(checkpoints + chunk * STATES * channels + tile, mask=is_entry, other=0)
        for i in range(steps):
            tl.store(chunk_states + i * STATES * channels + tile, before, mask=is_entry)
            step = start + i
            raw = _load(time_step + step * time_step_row + channel, is_channel) + bias
            delta = _softplus(raw)
            decay_step, _gap = _across_hole(delta, gaps, hole_time_step, hole_step, step)
            token = _token(order, step)
            u = _load(hidden_states + token * hidden_states_row + channel, is_channel)
            B_step = _input_matrix(B + step * B_row, direction_B, moves, step, state, STATES)
            decay = tl.exp2(decay_rates * 1.4426950408889634 * decay_step[None, :])
            before = decay * before + B_step[:, None] * (delta * u)[None, :]
        tl.debug_barrier()

        for steps_before in range(steps):
            i = steps - 1 - steps_before
            step = start + i
            before = tl.load(chunk_states + i * STATES * channels + tile, mask=is_entry, other=0)
            raw = _load(time_step + step * time_step_row + channel, is_channel) + bias
            delta = _softplus(raw)
            decay_step, gap = _across_hole(delta, gaps, hole_time_step, hole_step, step)
            token = _token(order, step)
            u = _load(hidden_states + token * hidden_states_row + channel, is_channel)
            B_step = _input_matrix(B + step * B_row, direction_B, moves, step, state, STATES)
            C_step = _load(C + step * C_row + state, is_state)
            decay = tl.exp2(decay_rates * 1.4426950408889634 * decay_step[None, :])
            after = decay * before + B_step[:, None] * (delta * u)[None, :]

            grad_y = _load(grad_output + token * channels + channel, is_channel)
            grad_after = carry + C_step[:, None] * grad_y[None, :]
            carry = grad_after * decay
            grad_exponent = carry * before
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
            tl.store(grad_hidden_states + token * channels + channel, grad_u, mask=is_channel)
            tl.store(grad_time_step + step * channels + channel, grad_raw, mask=is_channel)
            sum_B = tl.sum(grad_after * (delta * u)[None, :], axis=1)
            sum_C = tl.sum(after * grad_y[None, :], axis=1)
            tl.store(grad_B + step * STATES + state, sum_B, mask=is_state)
            tl.store(grad_C + step * STATES + state, sum_C, mask=is_state)
        tl.debug_barrier()

    tl.store(grad_A + walk * STATES * channels + tile, sum_A, mask=is_entry)
    tl.store(grad_D + walk * channels + channel, sum_D, mask=is_channel)
    if hole_time_step is not None:
        tl.store(grad_hole_time_step + walk * channels + channel, sum_hole, mask=is_channel)


@triton.jit
def _load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def _softplus(x):
    exp = tl.exp(-tl.abs(x))
    # log(1 + exp) with the rounding of 1 + exp divided out again, since time steps are often small.
    rounded = 1 + exp
    log1p = tl.where(rounded == 1, exp, tl.log(rounded) * (exp / (rounded - 1)))
    return tl.maximum(x, 0) + log1p


@triton.jit
def _across_hole(delta, gaps, hole_time_step, hole_step, step):
    """The time over which the state decays before this step, and the gap."""
    decay_step = delta
    gap = 1.0
    if gaps is not None:
        gap = tl.load(gaps + step).to(tl.float32)
        decay_step = delta * gap if hole_time_step is None else delta + (gap - 1) * hole_step
    return decay_step, gap


@triton.jit
def _token(order, step):
    token = step
    if order is not None:
        token = tl.load(order + step)
    return token


@triton.jit
def _input_matrix(B, direction_B, moves, step, state, STATES: tl.constexpr):
    B_step = _load(B + state, state < STATES)
    if direction_B is not None:
        B_step += _load(direction_B + tl.load(moves + step) * STATES + state, state < STATES)
    return B_step
