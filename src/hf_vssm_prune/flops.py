"""Counts how much a model computes, dense and pruned, from its configuration, and finds a schedule for a budget.

One multiply-add counts as one FLOP, as is usual in this field. The count includes linear layers, convolutions, 9 L E N
for each scan over L tokens with E channels and N states, and the matrix products of a pruning method. A configuration's
`count_flops` defines the parts of a forward pass, and which of them the published figures of the family count. With
`block_keep_ratio`, a scan direction counts as this fraction of itself in each layer that selects blocks: this is the
mean that training aims at. What a given model does can be measured, and be given as `block_fraction`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from .documentation import see
from .pruning_block_selection import count_flops as count_selectors
from .pruning_methods import METHODS, RECOMMENDED_METHOD, PruningMethod
from .pruning_options import is_number, unread_layers
from .token_pruning import count_kept


FLOPS_PER_SCAN_STATE = 9


@dataclass(frozen=True)
class FlopCount:
    """FLOPs (multiply-adds) of one image.

    Attributes:
        total: everything counted.
        published: counted in the same way as the model's published figures.
        breakdown: `total` by part.
    """

    total: int
    published: int
    breakdown: dict[str, int]

    @classmethod
    def of_parts(cls, parts: Counter[str], unpublished: int = 0) -> "FlopCount":
        """The sum of the parts; published figures leave out the given number of multiply-adds."""
        return cls(parts.total(), parts.total() - unpublished, dict(parts))


@dataclass(frozen=True)
class ModelFlops:
    """The counts of a model without and with its pruning schedule (equal if it has none)."""

    dense: FlopCount
    pruned: FlopCount

    @property
    def reduction(self) -> float:
        """The fraction of the published FLOPs that pruning removes, 0 to 1."""
        return 1 - self.pruned.published / self.dense.published


def count_flops(
    config: PreTrainedConfig, image_size: int | tuple[int, ...] | None = None, block_fraction: float | None = None
) -> ModelFlops:
    """Counts the FLOPs of one image, or of one clip.

    Args:
        config: configuration of a model of this package.
        image_size: pixels, (height, width), or for videos (frames, height, width); None for `config.image_size`.
        block_fraction: the fraction of the scan directions that ran in layers that select blocks, if it was measured
            (the mean of `block_gates`); None for `block_keep_ratio`.

    Raises:
        ValueError: the inputs are smaller than a patch.
    """
    size = config.input_size if image_size is None else config.input_size_for(image_size)
    if min(grid := config.grid_size_for(*size)) < 1:
        raise ValueError(f"`image_size` is {image_size}, which is too small for a patch.")
    num_patches = math.prod(grid)
    count = dense = config.count_flops(size, tokens_per_layer(num_patches, config.num_hidden_layers, None))
    if (schedule := config.token_pruning) is not None:
        tokens = tokens_per_layer(num_patches, config.num_hidden_layers, schedule)
        ratio = schedule.get("block_keep_ratio")
        ratio = block_fraction if ratio is not None and block_fraction is not None else ratio
        selection = _Selection(config, schedule.method, schedule["layers"], ratio)
        count = selection.count_layers(size, tokens)
        stages = [(tokens[layer - 1], tokens[layer]) for layer in schedule["layers"]]
        if flops := _count_pruning(config, schedule.method, stages) + selection.selectors:
            count = FlopCount(count.total + flops, count.published + flops, count.breakdown | {"pruning": flops})
    return ModelFlops(dense, count)


class _Selection:
    """The layers that select blocks, if there are any.

    Attributes:
        selectors: multiply-adds of the selectors.
    """

    def __init__(
        self, config: Any, method: PruningMethod, layers: Sequence[int], block_keep_ratio: float | None
    ) -> None:
        self.config, self.selectors = config, 0
        self._arguments: list[list[float]] = []  # only families that can select blocks have another argument
        if block_keep_ratio is not None:
            depth = config.num_hidden_layers
            selecting = unread_layers(method, layers, depth)
            self.selectors = count_selectors(config, len(selecting))
            self._arguments.append([block_keep_ratio if layer in selecting else 1.0 for layer in range(depth)])

    def count_layers(self, input_size: tuple[int, ...], tokens: Sequence[int]) -> FlopCount:
        """See `VisionMambaConfig.count_flops`."""
        return self.config.count_flops(input_size, tokens, *self._arguments)


def _count_pruning(config: PreTrainedConfig, method: PruningMethod, stages: list[tuple[int, int]]) -> int:
    """The FLOPs of a method in stages with these numbers of tokens before and after."""
    return sum(method.count_flops(there, kept, config) for there, kept in stages)


def tokens_per_layer(num_patches: int, num_hidden_layers: int, token_pruning: dict[str, Any] | None) -> list[int]:
    """Patch tokens that each layer sees."""
    ratios = (
        {} if token_pruning is None else dict(zip(token_pruning["layers"], token_pruning["keep_ratios"], strict=True))
    )
    tokens = [num_patches]
    for layer in range(1, num_hidden_layers):
        tokens.append(count_kept(tokens[-1], ratios[layer]) if layer in ratios else tokens[-1])
    return tokens


def count_projections(config: PreTrainedConfig, length: int) -> Counter[str]:
    """A mixer's input and output projections for this number of tokens."""
    return Counter(in_and_out_projections=length * 3 * config.hidden_size * config.intermediate_size)


def count_scans(config: PreTrainedConfig, length: int, kernel_size: int, num_paths: int = 1) -> Counter[str]:
    """Selective scans with one set of parameters, and the layers before them.

    Args:
        config: configuration of the model.
        length: number of tokens.
        kernel_size: number of weights of the depthwise convolution per channel.
        num_paths: number of scan paths.
    """
    width, states = config.intermediate_size, config.state_size
    return Counter(
        convolutions=length * width * kernel_size,
        # x_proj, which makes time-step features, B and C from each token, and dt_proj.
        input_projections=length * width * (2 * config.time_step_rank + 2 * states),
        scans=num_paths * FLOPS_PER_SCAN_STATE * length * width * states,
    )


# ---- A schedule from a budget ------------------------------------------------------------------------------------

BUDGET_TOLERANCE = 0.005
# Positions of the stages, as fractions of the depth. Later entries are used only if earlier ones cannot save enough.
STAGES = ((1 / 6, 1 / 3, 1 / 2), (1 / 12, 1 / 6, 1 / 4), (1 / 24, 1 / 12, 1 / 8))
# The search for unequal ratios tries (number of tokens) ** (number of stages - 1) schedules. With more tokens than
# this, one token is less than the tolerance, so that equal ratios come close enough.
MOST_STAGES_OF_UNEQUAL_RATIOS, MOST_TOKENS_OF_UNEQUAL_RATIOS = 3, 256


def schedule_for_budget(
    config: PreTrainedConfig,
    flops_reduction: float,
    method: PruningMethod = METHODS[RECOMMENDED_METHOD],
    layers: Sequence[int] | None = None,
    block_keep_ratio: float | None = None,
) -> dict[str, list]:
    """Finds the pruning schedule that removes a fraction of the published FLOPs, at `config.image_size`.

    Tokens are dropped in three stages, at a sixth, a third and half of the depth (layers 6, 12 and 18 in the paper's
    model of 36 layers), or earlier if that cannot save enough. All stages have the same keep ratio if one meets the
    budget, and otherwise, for up to 256 tokens, different ratios. Among the schedules that remove at least the
    requested fraction, the one that removes least is chosen.

    Args:
        config: of a model of this package.
        flops_reduction: in (0, 1), for instance 0.416.
        method: the pruning method, whose own FLOPs count as well.
        layers: layers before which tokens are dropped, ascending, instead of those above.
        block_keep_ratio: the fraction of the scan directions that run, which counts towards the budget. None: all.

    Returns:
        `layers` and `keep_ratios`.

    Raises:
        ValueError: no schedule comes within half a point of the fraction; the message says what is possible.
    """
    if not is_number(flops_reduction) or not 0 < flops_reduction < 1:
        raise ValueError(f"`flops_reduction` is {flops_reduction!r}; it must be between 0 and 1, for instance 0.416.")
    select = partial(_Selection, config, method, block_keep_ratio=block_keep_ratio)
    num_patches = math.prod(config.grid_size)
    all_patches = tokens_per_layer(num_patches, config.num_hidden_layers, None)
    dense = config.count_flops(config.input_size, all_patches).published

    def cost(counts: Counts) -> float:
        steps = list(zip((num_patches, *counts), counts, strict=False))
        return _count_pruning(config, method, steps) / dense

    stages, skipped, savings = _stages_in_reach(config, flops_reduction, layers, select, cost)

    def reduction(counts: Counts) -> float:
        saved = sum(saving * (num_patches - count) for saving, count in zip(savings, counts, strict=True))
        return skipped + saved - cost(counts)

    def distance(counts: Counts) -> float:
        return abs(reduction(counts) - flops_reduction)

    def best(candidates: Iterable[Counts], least: Callable[[Counts], float]) -> Counts | None:
        """The best schedule within the tolerance; one that removes too little only if there is no other."""
        fitting = [counts for counts in candidates if distance(counts) <= BUDGET_TOLERANCE]
        return min(fitting, key=lambda counts: (reduction(counts) < flops_reduction, least(counts)), default=None)

    equal = {_chain(num_patches, (step / 1000,) * len(stages)): (step / 1000,) * len(stages) for step in range(1, 1000)}
    if (counts := best(equal, distance)) is not None:
        return {"layers": stages, "keep_ratios": list(equal[counts])}
    exact = [min(equal, key=distance)]
    if len(stages) <= MOST_STAGES_OF_UNEQUAL_RATIOS and num_patches <= MOST_TOKENS_OF_UNEQUAL_RATIOS:
        exact = _counts_near(flops_reduction + cost(exact[0]) - skipped, savings, num_patches)
    if (counts := best(exact, partial(_spread, num_patches))) is not None:
        return {"layers": stages, "keep_ratios": _ratios(num_patches, counts)}
    nearest = reduction(min(exact, key=distance))
    raise ValueError(
        f"`flops_reduction` is {flops_reduction}; with {num_patches} tokens and stages at {stages}, no schedule "
        f"comes within half a point of this; the nearest one removes {nearest:.3f}. {see('budget-out-of-reach')}"
    )


Counts = tuple[int, ...]


def _stages_in_reach(
    config: PreTrainedConfig,
    flops_reduction: float,
    layers: Sequence[int] | None,
    select: Callable[[Sequence[int]], _Selection],
    cost: Callable[[Counts], float],
) -> tuple[list[int], float, list[float]]:
    """Layers before which this much can be dropped (the given ones, or the first sufficient ones of the standard
    positions), what is saved if no token is dropped there (by block selection), and what they save per token."""
    depth = config.num_hidden_layers
    if depth < 2:
        raise ValueError(f"a model of {depth} layer has no layer before which tokens could be dropped.")
    for stages in [list(layers)] if layers is not None else _standard_layers(depth):
        skipped, savings = _savings(config, stages, select(stages))
        most = skipped + sum(savings) * (math.prod(config.grid_size) - 1) - cost((1,) * len(stages))
        if flops_reduction <= most:
            break
    if flops_reduction > most + BUDGET_TOLERANCE:
        raise ValueError(
            f"`flops_reduction` is {flops_reduction}; dropping all but one token at {stages} removes {most:.3f}. "
            f"{see('budget-out-of-reach')}"
        )
    return stages, skipped, savings


def _standard_layers(depth: int) -> list[list[int]]:
    return [sorted({max(1, round(depth * share)) for share in shares}) for shares in STAGES]


def _savings(config: PreTrainedConfig, layers: Sequence[int], selection: _Selection) -> tuple[float, list[float]]:
    """The fractions of the dense FLOPs that block selection saves if no token is dropped, and that one token takes from
    the layer of each stage to that of the next."""
    dense = tokens_per_layer(math.prod(config.grid_size), config.num_hidden_layers, None)
    cost = config.count_flops(config.input_size, dense).published
    whole = selection.count_layers(config.input_size, dense).published
    savings = []
    for first, last in zip(layers, [*layers[1:], len(dense)], strict=True):
        one_less = [count - (first <= layer < last) for layer, count in enumerate(dense)]
        savings.append((whole - selection.count_layers(config.input_size, one_less).published) / cost)
    return 1 - (whole + selection.selectors) / cost, savings


def _chain(num_patches: int, keep_ratios: tuple[float, ...]) -> Counts:
    """The number of tokens left after each stage."""
    return tuple(itertools.accumulate(keep_ratios, count_kept, initial=num_patches))[1:]


def _ratios(num_patches: int, counts: Counts) -> list[float]:
    """Keep ratios that leave exactly these counts."""
    return [kept / there for there, kept in zip((num_patches, *counts), counts, strict=False)]


def _spread(num_patches: int, counts: Counts) -> float:
    ratios = _ratios(num_patches, counts)
    return max(ratios) - min(ratios)


def _counts_near(flops_reduction: float, savings: list[float], num_patches: int) -> list[Counts]:
    """For all token counts of the stages except the last, the two counts of the last stage that come closest to the
    reduction."""
    found = []
    for counts in itertools.combinations_with_replacement(range(num_patches, 0, -1), len(savings) - 1):
        saved = sum(saving * (num_patches - count) for saving, count in zip(savings, counts, strict=False))
        last = num_patches - (flops_reduction - saved) / savings[-1]
        most = (num_patches, *counts)[-1]
        found += [(*counts, min(max(1, count), most)) for count in (math.floor(last), math.ceil(last))]
    return found
