# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of a Triton kernel are pointers and numbers; Triton reads annotations as its own.
"""The GPU code of `triton_convolution`, in a separate module for the reasons given in `triton_scan_kernels`.

A program computes a strip of STRIP neighbouring cells in a row of the grid. For each row of the convolution kernel, it
loads the STRIP + COLUMNS - 1 cells covered by the strip's windows into registers once, and uses them for all cells of
the strip.

A table (batch, cells) contains the token in each cell, or -1 if there is none; without a table, each cell has its own
token. Rows of tokens have a stride for the batch and one for the row; everything else is contiguous.
"""

try:  # in this form, which transformers skips when it checks which packages a Hub repository's code needs
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this module needs Triton, see `triton_backend.unavailable`") from error


@triton.jit(do_not_specialize=["tokens"])
def list_places(
    kept,  # (batch, tokens): the cell of each token
    places,  # int32 (batch, cells): the token in each cell
    tokens, cells,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program lists the tokens of one image."""
    image = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK)
    for first in range(0, cells, BLOCK):
        tl.store(places + image * cells + first + entry, -1, mask=first + entry < cells)
    tl.debug_barrier()
    for first in range(0, tokens, BLOCK):
        is_token = first + entry < tokens
        cell = tl.load(kept + image * tokens + first + entry, mask=is_token, other=0)
        tl.store(places + image * cells + cell, first + entry, mask=is_token)


# Not specialised for the numbers of remaining tokens and images, which would cause recompilation.
@triton.jit(do_not_specialize=["tokens"])
def convolve(
    hidden_states, weight, bias,
    shown,  # None or (batch, cells): the token that windows see in each cell
    places,  # None or (batch, cells): the token whose row of the output is computed
    grad_output,  # None or (batch, tokens, channels): converts the output to the gradient of the input of SiLU
    output,  # (batch, tokens, channels)
    height, width, tokens, channels,
    hidden_states_batch, hidden_states_row, grad_output_batch, grad_output_row, weight_channel, weight_tap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_BEFORE: tl.constexpr, COLUMNS_BEFORE: tl.constexpr,
    MIRRORED: tl.constexpr, SILU: tl.constexpr, STRIP: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program computes one strip of one image, for one block of channels."""
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    image, row, first = _strip(tl.program_id(0), height, width, STRIP)
    hidden_states += image * hidden_states_batch
    output += image * tokens * channels
    if shown is not None:
        shown += image * height * width
    if places is not None:
        places += image * height * width

    start = tl.full((BLOCK_CHANNELS,), 0, tl.float32)
    if bias is not None:
        start += tl.load(bias + channel, mask=is_channel, other=0).to(tl.float32)
    sums = (start,) * STRIP
    for y in range(tl.maximum(ROWS_BEFORE - row, 0), tl.minimum(ROWS, height + ROWS_BEFORE - row)):
        source = (row + y - ROWS_BEFORE) * width
        window = ()
        for i in tl.static_range(STRIP + COLUMNS - 1):
            column = first + i - COLUMNS_BEFORE
            is_there = (column >= 0) & (column < width)
            cell = _cell(hidden_states, hidden_states_row, shown, source + column, is_there, channel, channels)
            window = window + (cell,)  # noqa: RUF005 - Triton has no unpacking
        for x in tl.static_range(COLUMNS):
            tap = y * COLUMNS + x
            if MIRRORED:
                tap = ROWS * COLUMNS - 1 - tap
            factor = tl.load(weight + channel * weight_channel + tap * weight_tap, mask=is_channel, other=0)
            factor = factor.to(tl.float32)
            new_sums = ()
            for i in tl.static_range(STRIP):
                new_sums = new_sums + (sums[i] + factor * window[i + x],)  # noqa: RUF005
            sums = new_sums

    for i in tl.static_range(STRIP):
        token, is_there = _token(places, row * width + first + i, first + i < width)
        is_entry = channel < tl.where(is_there, channels, 0)
        value = sums[i]
        if grad_output is not None:
            from_row = grad_output + image * grad_output_batch + token * grad_output_row
            gradient = tl.load(from_row + channel, mask=is_entry, other=0).to(tl.float32)
            share = 1 / (1 + tl.exp(-value))
            value = gradient * share * (1 + value * (1 - share))
        elif SILU:
            value = value / (1 + tl.exp(-value))
        tl.store(output + token * channels + channel, value.to(output.dtype.element_ty), mask=is_entry)


@triton.jit(do_not_specialize=["strips"])
def sum_weight_gradients(
    hidden_states, shown, places,
    grad_sums,  # (batch, tokens, channels): the gradient of the input of SiLU
    grad_weight,  # float32 (parts, ROWS * COLUMNS, channels), separate for each program and therefore reproducible
    grad_bias,  # None or float32 (parts, channels)
    strips, height, width, channels,
    hidden_states_batch, hidden_states_row, grad_sums_batch, grad_sums_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_BEFORE: tl.constexpr, COLUMNS_BEFORE: tl.constexpr,
    MIRRORED: tl.constexpr, STRIP: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program sums over a part of the strips of all images, for one row of the convolution kernel and one block of
    channels."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    y = tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels

    zero = tl.full((BLOCK_CHANNELS,), 0, tl.float32)
    sums = (zero,) * COLUMNS
    sum_bias = zero
    for strip in range(part, strips, parts):
        image, row, first = _strip(strip, height, width, STRIP)
        shown_here, places_here = shown, places
        if shown is not None:
            shown_here = shown + image * height * width
        if places is not None:
            places_here = places + image * height * width
        gradients = ()
        for i in tl.static_range(STRIP):
            from_image = grad_sums + image * grad_sums_batch
            is_there, cell = first + i < width, row * width + first + i
            gradient = _cell(from_image, grad_sums_row, places_here, cell, is_there, channel, channels)
            sum_bias += gradient
            gradients = gradients + (gradient,)  # noqa: RUF005
        source_row = row + y - ROWS_BEFORE
        is_row = (source_row >= 0) & (source_row < height)
        window = ()
        for i in tl.static_range(STRIP + COLUMNS - 1):
            column = first + i - COLUMNS_BEFORE
            is_there = is_row & (column >= 0) & (column < width)
            cell, from_image = source_row * width + column, hidden_states + image * hidden_states_batch
            seen = _cell(from_image, hidden_states_row, shown_here, cell, is_there, channel, channels)
            window = window + (seen,)  # noqa: RUF005
        new_sums = ()
        for x in tl.static_range(COLUMNS):
            total = sums[x]
            for i in tl.static_range(STRIP):
                total += gradients[i] * window[i + x]
            new_sums = new_sums + (total,)  # noqa: RUF005
        sums = new_sums

    for x in tl.static_range(COLUMNS):
        tap = y * COLUMNS + x
        if MIRRORED:
            tap = ROWS * COLUMNS - 1 - tap
        tl.store(grad_weight + (part * ROWS * COLUMNS + tap) * channels + channel, sums[x], mask=is_channel)
    if grad_bias is not None:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
        if y == 0:
            tl.store(grad_bias + part * channels + channel, sum_bias, mask=is_channel)


@triton.jit(do_not_specialize=["tokens"])
def sum_cells(
    grad_cells,  # float32 (batch, cells, channels)
    order,  # (batch, cells): cells sorted by the token seen in them
    starts,  # (batch, tokens + 1): where the cells of each token start in this order
    output,  # (batch, tokens, channels)
    cells, tokens, channels,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program sums over the cells in which a token is seen, for one token and one block of channels."""
    image, token = (tl.program_id(0) // tokens).to(tl.int64), tl.program_id(0) % tokens
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    start = tl.load(starts + image * (tokens + 1) + token)
    end = tl.load(starts + image * (tokens + 1) + token + 1)
    total = tl.full((BLOCK_CHANNELS,), 0, tl.float32)
    for i in range(start, end):
        cell = tl.load(order + image * cells + i)
        total += tl.load(grad_cells + (image * cells + cell) * channels + channel, mask=is_channel, other=0)
    target = output + (image * tokens + token) * channels + channel
    tl.store(target, total.to(output.dtype.element_ty), mask=is_channel)


@triton.jit
def _strip(strip, height, width, STRIP: tl.constexpr):
    """The image of a strip, its row and its first column."""
    in_row = tl.cdiv(width, STRIP)
    return (strip // (height * in_row)).to(tl.int64), strip // in_row % height, strip % in_row * STRIP


@triton.jit
def _token(table, cell, is_there):
    """The token in a cell of the grid, and whether there is one."""
    token = cell
    if table is not None:
        token = tl.load(table + cell, mask=is_there, other=-1)
        is_there = token >= 0
    return token, is_there


@triton.jit
def _cell(rows, stride, table, cell, is_there, channel, channels):
    """The values of channels in a cell, as float32; zeros if there is no token."""
    token, is_there = _token(table, cell, is_there)
    is_entry = channel < tl.where(is_there, channels, 0)
    return tl.load(rows + token * stride + channel, mask=is_entry, other=0).to(tl.float32)
