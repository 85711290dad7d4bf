"""Each pruning method compared with a slow reference, token by token in float64; guarantees of all methods; and methods
in models."""

import itertools
import math
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    CLS_TOKEN_IDS,
    MAKE_CONFIG,
    NUM_CLS_TOKENS,
    TOKEN_PRUNING,
    gradients_with_checkpointing,
    make_model,
    same_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_vssm_prune import count_flops, modeling_bidirectional, modeling_plainmamba
from hf_vssm_prune.convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.mixer_output import MixerOutput, ScanInputs
from hf_vssm_prune.modeling_common import is_pruning_parameter, mean_over_patches
from hf_vssm_prune.pruning_dyvm import TokenPredictor
from hf_vssm_prune.pruning_importances import IMPORTANCES
from hf_vssm_prune.pruning_methods import METHODS, RECOMMENDED_METHOD, PruningMethod
from hf_vssm_prune.pruning_stage import Reduction, Stage
from hf_vssm_prune.token_pruning import gather_tokens
from hf_vssm_prune.visualization import merged_patches


HIDDEN, CHANNELS, STATES = 6, 5, 3


# ---- Stages made up ----------------------------------------------------------------------------------------------


def make_scans(family: str, batch: int, num_tokens: int) -> tuple[ScanInputs, ...]:
    def inputs(**options) -> ScanInputs:
        time_step, B, C = (torch.randn(batch, num_tokens, size) for size in (CHANNELS, STATES, STATES))
        return ScanInputs(time_step, torch.randn(CHANNELS), B, C, **options)

    if family != "plainmamba":
        return inputs(), inputs(reversed=True)
    order = torch.stack([torch.stack([torch.randperm(num_tokens) for _ in range(4)]) for _ in range(batch)])
    moves = torch.randint(5, (batch, 4, num_tokens))
    return (inputs(order=order, direction_B=torch.randn(5, STATES), moves=moves),)


def make_stage(
    family: str, grid: tuple[int, ...], num_tokens: int, num_kept: int, batch: int = 2, merged: bool = False
) -> Stage:
    """Random tokens in some cells of a grid. If the family has a class token, it is in a random row of each sample."""
    cells = torch.stack([torch.randperm(math.prod(grid))[:num_tokens].sort().values for _ in range(batch)])
    patch_rows, cls_row, cls_token, total = None, None, None, num_tokens
    if NUM_CLS_TOKENS[family]:
        total += 1
        cls_row, cls_token = torch.randint(total, (batch, 1)), torch.randn(batch, HIDDEN)
        patch_rows = torch.arange(num_tokens) + (torch.arange(num_tokens) >= cls_row)
    mixer = MixerOutput(
        torch.randn(batch, total, CHANNELS),
        torch.randn(batch, total, HIDDEN),
        make_scans(family, batch, total),
        None if family == "plainmamba" else torch.randn(batch, total, CHANNELS),
    )
    sizes = torch.randint(1, 5, (batch, num_tokens)).to(torch.get_default_dtype()) if merged else None
    return Stage(
        torch.randn(batch, num_tokens, HIDDEN),
        num_kept,
        cells,
        grid,
        mixer,
        patch_rows,
        cls_row,
        cls_token,
        sizes,
        importance=IMPORTANCES["clip"],
        module=TokenPredictor(HIDDEN).eval(),
    )


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- References --------------------------------------------------------------------------------------------------


class Sample:
    """One sample of a stage in NumPy. Index i of each attribute belongs to patch token i."""

    def __init__(self, stage: Stage, index: int) -> None:
        scans = stage.mixer.scans
        total = stage.mixer.gated.shape[1]
        self.rows = list(range(total)) if stage.patch_rows is None else stage.patch_rows[index].tolist()
        self.tokens = stage.hidden_states[index].numpy()
        self.gated = stage.mixer.gated[index].numpy()[self.rows]
        self.projected = stage.mixer.projected[index].numpy()[self.rows]
        self.cells, self.grid, self.num_kept = stage.cells[index].tolist(), stage.grid, stage.num_kept
        self.sizes = np.ones(len(self.cells)) if stage.sizes is None else stage.sizes[index].numpy()
        self.predictor = stage.module
        cls_row = None if stage.cls_row is None else stage.cls_row[index].item()
        self.is_near_cls = [cls_row is not None and abs(row - cls_row) <= 3 for row in self.rows]
        self.steps, self.own_steps, self.own_B, self.influences = [], [], [], []
        for scan in scans:
            time_step, B, C = (tensor[index].numpy() for tensor in (scan.time_step, scan.B, scan.C))
            step = np.log1p(np.exp(time_step + scan.time_step_bias.numpy())).mean(-1)
            own = [total - 1 - row if scan.reversed else row for row in self.rows]
            self.own_steps.append(step[own])
            self.own_B.append(B[own])
            if scan.order is None:
                self.steps.append(step[own])
                self.influences.append([step[t] * norm(B[t]) * norm(C[t]) for t in own])
                continue
            for order, moves in zip(scan.order[index].tolist(), scan.moves[index].tolist(), strict=True):
                at = [order.index(row) for row in self.rows]
                self.steps.append(step[at])
                direction_B = scan.direction_B.numpy()
                self.influences.append([step[t] * norm(B[t] + direction_B[moves[t]]) * norm(C[t]) for t in at])


def norm(vector: np.ndarray) -> float:
    return math.sqrt(sum(float(value) ** 2 for value in vector))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / (norm(a) * norm(b))


class Expected(NamedTuple):
    """Indices of the remaining tokens, their hidden states, and the number of patches in each."""

    kept: list[int]
    tokens: list[np.ndarray]
    sizes: list[float] | None = None


def best(scores, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def clip(sample: Sample) -> list[float]:
    return [float(np.maximum(y, 0).mean()) for y in sample.gated]


def means(sample: Sample, into: dict[int, int], weights) -> tuple[list[int], list[np.ndarray], list[float]]:
    kept = sorted(set(into.values()))
    groups = [[i for i in into if into[i] == k] for k in kept]
    totals = [sum(weights[i] for i in group) for group in groups]
    tokens = [
        sum(weights[i] * sample.tokens[i] for i in group) / total for group, total in zip(groups, totals, strict=True)
    ]
    return kept, tokens, totals


def match(features, num_kept: int, split: Callable) -> dict[int, int]:
    into = {i: i for i in range(len(features))}
    while len(left := sorted(set(into.values()))) > num_kept:
        pairs = []
        sources, targets = split(left)
        for source in sources:
            target = max(targets, key=lambda b: (cosine(features[source], features[b]), -b))
            pairs.append((-cosine(features[source], features[target]), source, target))
        for _, source, target in sorted(pairs)[: min(len(left) - num_kept, len(left) // 2)]:
            into = {i: target if goes == source else goes for i, goes in into.items()}
    return into


def reference_top(sample: Sample) -> Expected:
    kept = best(clip(sample), sample.num_kept)
    return Expected(kept, [sample.tokens[i] for i in kept])


def reference_evit(sample: Sample) -> Expected:
    scores = clip(sample)
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    carrier = ranking[sample.num_kept - 1]
    into = {i: i if i in ranking[: sample.num_kept] else carrier for i in range(len(scores))}
    return Expected(*means(sample, into, [score + 1e-12 for score in scores])[:2])


def reference_tome(sample: Sample) -> Expected:
    keys = np.concatenate(sample.own_B, axis=-1)
    return Expected(*means(sample, match(keys, sample.num_kept, lambda left: (left[::2], left[1::2])), sample.sizes))


def reference_r_meeto(sample: Sample) -> Expected:
    into = match(sample.projected, sample.num_kept, lambda left: (left[::2], left[1::2]))
    return Expected(*means(sample, into, sample.sizes))


def reference_utr(sample: Sample) -> Expected:
    scores = clip(sample)

    def split(left):
        ranking = sorted(left, key=lambda i: (-scores[i], i))
        important = ranking[: len(left) - len(left) // 2]
        return sorted(set(left) - set(important)), sorted(important)

    into = match(sample.gated, sample.num_kept, split)
    return Expected(*means(sample, into, np.ones(len(scores)))[:2])


def reference_mtr(sample: Sample) -> Expected:
    scores = sum(sample.own_steps)
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept, sources = ranking[: sample.num_kept], ranking[sample.num_kept :]
    targets = sorted(kept[max(0, len(kept) - len(sources)) :])
    into = {i: i for i in kept}
    for source in sources:
        into[source] = max(targets, key=lambda b: (cosine(sample.tokens[source], sample.tokens[b]), -b))
    return Expected(*means(sample, into, np.ones(len(scores)))[:2])


def reference_stm(sample: Sample) -> Expected:
    keys, near_cls = np.concatenate(sample.own_B, axis=-1), sample.is_near_cls
    left = list(range(len(sample.tokens)))
    tokens, weights = dict(enumerate(sample.tokens)), dict.fromkeys(left, 1.0)
    while len(left) > sample.num_kept:
        beside = {left[i]: [left[j] for j in (i - 1, i + 1) if 0 <= j < len(left)] for i in range(0, len(left), 2)}
        unlike = {
            i: sum(10 * (near_cls[i] or near_cls[j]) - cosine(keys[i], keys[j]) for j in others) / len(others)
            for i, others in beside.items()
        }
        for i in sorted(beside, key=lambda i: (unlike[i], i))[: min(len(left) - sample.num_kept, len(left) // 2)]:
            left.remove(i)
            for j in beside[i]:
                share = weights[i] / len(beside[i])
                tokens[j] = (weights[j] * tokens[j] + share * tokens[i]) / (weights[j] + share)
                weights[j] += share
    return Expected(left, [tokens[i] for i in left])


def reference_dyvm(sample: Sample) -> Expected:
    weights = {name: value.numpy() for name, value in sample.predictor.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return np.array([value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x])

    features = []
    for x in sample.tokens:
        normalized = (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
        features.append(gelu(linear("input", normalized)))
    shared = sum(features)[HIDDEN // 2 :] / len(features)
    scores = []
    for feature in features:
        x = np.concatenate([feature[: HIDDEN // 2], shared])
        stay, go = linear("output", gelu(linear("second", gelu(linear("first", x)))))
        scores.append(stay - math.log(math.exp(stay) + math.exp(go)))
    kept = best(np.float32(scores), sample.num_kept)
    return Expected(kept, [sample.tokens[i] for i in kept])


def bayer(size: int) -> np.ndarray:
    """Recursively: four copies of the next smaller matrix, times 4, plus 0, 2, 3, 1."""
    if size == 1:
        return np.zeros((1, 1), dtype=int)
    smaller = 4 * bayer(size // 2)
    return np.block([[smaller, smaller + 2], [smaller + 3, smaller + 1]])


def reference_uniform(sample: Sample) -> Expected:
    matrix = bayer(16)[: 2 ** (max(sample.grid) - 1).bit_length(), : 2 ** (max(sample.grid) - 1).bit_length()]
    matrix = bayer(len(matrix))
    ranks = [matrix[cell // sample.grid[1], cell % sample.grid[1]] for cell in sample.cells]
    kept = best([-rank for rank in ranks], sample.num_kept)
    return Expected(kept, [sample.tokens[i] for i in kept])


def reference_state_merge(sample: Sample) -> Expected:
    kept = best(clip(sample), sample.num_kept)
    into, weights = {}, []
    for j, cell in enumerate(sample.cells):
        i = into[j] = j if j in kept else min(kept, key=lambda k: (abs(sample.cells[k] - cell), k))
        shares = [
            (step[j] * B[j] @ B[i]) / (step[i] * B[i] @ B[i])
            for step, B in zip(sample.own_steps, sample.own_B, strict=True)
        ]
        weights.append(1.0 if i == j else max(0.0, sum(shares) / len(shares)))
    return Expected(*means(sample, into, weights)[:2])


def reference_stand_in(sample: Sample) -> Expected:
    kept = best(clip(sample), sample.num_kept)
    return Expected(kept, [sample.tokens[i] for i in kept])


def nearest_rows(kept: list[int], places: list[tuple[int, int] | None]) -> list[int]:
    """For each place of a sequence, the row of the nearest kept token. A class token, whose place is None, is nearest
    only to itself."""

    def distance(row: int, place: tuple[int, int] | None) -> float:
        other = places[kept[row]]
        if place is None or other is None:
            return 0 if place == other else math.inf
        return sum(abs(a - b) for a, b in zip(place, other, strict=True))

    return [min(range(len(kept)), key=lambda row: (distance(row, place), row)) for place in places]


def windows_of(sample: Sample) -> dict[tuple[int, int], list[int]]:
    windows: dict[tuple[int, int], list[int]] = {}
    for i, cell in enumerate(sample.cells):
        windows.setdefault((cell // sample.grid[1] // 2, cell % sample.grid[1] // 2), []).append(i)
    return windows


def best_in_turns(sample: Sample, scores) -> list[int]:
    turns = [
        (turn, -scores[i], i)
        for window in windows_of(sample).values()
        for turn, i in enumerate(sorted(window, key=lambda i: (-scores[i], i)))
    ]
    return sorted(i for _, _, i in sorted(turns)[: sample.num_kept])


def reference_local_top(sample: Sample) -> Expected:
    kept = best_in_turns(sample, clip(sample))
    return Expected(kept, [sample.tokens[i] for i in kept])


def reference_local_merge(sample: Sample) -> Expected:
    normal = [(x - x.mean()) / math.sqrt(x.var() + 1e-5) for x in sample.tokens]
    distances = dict.fromkeys(range(len(normal)), 0.0)
    for window in windows_of(sample).values():
        for i, j in itertools.permutations(window, 2):
            distances[i] += ((normal[i] - normal[j]) ** 2).mean() / (len(window) - 1)
    kept = best_in_turns(sample, distances)
    places: list[tuple[int, int] | None] = [divmod(cell, sample.grid[1]) for cell in sample.cells]
    into = {i: kept[row] for i, row in enumerate(nearest_rows(kept, places))}
    return Expected(*means(sample, into, np.ones(len(places)))[:2])


REFERENCES = {
    name.removeprefix("reference_"): function
    for name, function in list(globals().items())
    if name.startswith("reference_")
}


def test_every_method_has_a_reference() -> None:
    assert set(REFERENCES) == set(METHODS)


@pytest.mark.parametrize("merged", [False, True], ids=["patches", "merged before"])
@pytest.mark.parametrize("num_kept", [1, 3, 7, 10, 13, 14])
@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", METHODS)
def test_against_a_slow_reference(method, family, num_kept, merged, float64) -> None:
    stage = make_stage(family, (4, 5), num_tokens=14, num_kept=num_kept, merged=merged)
    with torch.no_grad():
        reduction = METHODS[method].reduce(stage)
    for index in range(2):
        expected = REFERENCES[method](Sample(stage, index))
        assert reduction.rows[index].tolist() == expected.kept
        np.testing.assert_allclose(reduction.hidden_states[index].numpy(), np.stack(expected.tokens), rtol=1e-9)
        if expected.sizes is None:
            assert reduction.sizes is None
        else:
            np.testing.assert_allclose(reduction.sizes[index].numpy(), expected.sizes)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_influence(family, float64) -> None:
    stage = make_stage(family, (3, 4), num_tokens=9, num_kept=4)
    for importance, reduce in (("influence", np.mean), ("worst_influence", partial(np.linalg.norm, ord=4))):
        scores = stage._replace(importance=IMPORTANCES[importance]).scores()
        assert scores.dtype == torch.float64
        for index in range(2):
            expected = reduce(np.array(Sample(stage, index).influences), axis=0)
            np.testing.assert_allclose(scores[index].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("family", ["vim", "videomamba"])
def test_mirrored_backward(family, float64) -> None:
    stage = make_stage(family, (3, 4), num_tokens=9, num_kept=4)
    scores = stage._replace(importance=IMPORTANCES["mirrored_backward"]).scores()
    for index in range(2):
        values = stage.mixer.backward_gated[index].mean(-1).tolist()
        expected = [values[len(values) - 1 - row] for row in stage.patch_rows[index].tolist()]
        np.testing.assert_allclose(scores[index].numpy(), expected)


def test_mirrored_backward_is_the_backward_scans_own_order(float64) -> None:
    """Compared with a model: the backward scan's output, read from the last token on."""
    config = MAKE_CONFIG["vim"](
        token_pruning={"layers": [1], "keep_ratios": [0.5], "method": "top", "importance": "mirrored_backward"}
    )
    model = FAMILIES["vim"].classifier(config).eval()
    gated: list[Tensor] = []
    model.vim.layers[0].mixer.backward_scan.register_forward_hook(lambda *call: gated.append(call[-1][0]))
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 32, 32))
    values = gated[0].mean(-1).flip(1)
    cls_place = CLS_TOKEN_IDS["vim"]
    expected = torch.cat([values[:, :cls_place], values[:, cls_place + 1 :]], dim=1)
    torch.testing.assert_close(outputs.token_scores[0], expected)


def test_mirrored_backward_needs_a_backward_scan() -> None:
    stage = make_stage("plainmamba", (3, 4), num_tokens=9, num_kept=4)
    with pytest.raises(ValueError, match="needs a backward scan"):
        stage._replace(importance=IMPORTANCES["mirrored_backward"]).scores()
    with pytest.raises(ValueError, match=r"but PlainMambaConfig's models have no .*'l2', 'random'"):
        MAKE_CONFIG["plainmamba"](token_pruning={"flops_reduction": 0.3, "importance": "mirrored_backward"})


# ---- Promises ----------------------------------------------------------------------------------------------------


@st.composite
def stages(draw) -> Stage:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    num_tokens = draw(st.integers(1, math.prod(grid)))
    family, merged = draw(st.sampled_from(sorted(MAKE_CONFIG))), draw(st.booleans())
    stage = make_stage(family, grid, num_tokens, draw(st.integers(1, num_tokens)), merged=merged)
    impossible = {"mirrored_backward"} if stage.mixer.backward_gated is None else set()
    return stage._replace(importance=IMPORTANCES[draw(st.sampled_from(sorted(set(IMPORTANCES) - impossible)))])


def reduce(method: str, stage: Stage) -> Reduction:
    with torch.no_grad():
        return METHODS[method].reduce(stage)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40)
@given(stage=stages())
def test_promises(method, stage) -> None:
    num_tokens = stage.hidden_states.shape[1]
    reduction = reduce(method, stage)
    assert reduction.rows.shape == (2, stage.num_kept)
    assert reduction.rows.dtype == torch.int64
    assert reduction.hidden_states.shape == (2, stage.num_kept, HIDDEN)
    assert reduction.scores.shape == (2, num_tokens)
    assert reduction.scores.isfinite().all()
    assert not reduction.scores.requires_grad
    assert (reduction.rows.diff(dim=1) > 0).all()
    assert 0 <= reduction.rows.min() <= reduction.rows.max() < num_tokens
    # Every token that is left is a mean of tokens that were there.
    low, high = (extreme(stage.hidden_states, dim=1, keepdim=True) for extreme in (torch.amin, torch.amax))
    assert (reduction.hidden_states >= low - 1e-5).all()
    assert (reduction.hidden_states <= high + 1e-5).all()
    if reduction.sizes is not None:
        before = torch.full((2,), float(num_tokens)) if stage.sizes is None else stage.sizes.sum(1)
        torch.testing.assert_close(reduction.sizes.sum(1), before)
    if stage.num_kept == num_tokens:
        assert reduction.rows.tolist() == [list(range(num_tokens))] * 2
        torch.testing.assert_close(reduction.hidden_states, stage.hidden_states)


def one_sample(stage: Stage, index: int) -> Stage:
    def one(tensor: Tensor | None) -> Tensor | None:
        return tensor[index : index + 1] if tensor is not None and len(tensor) == 2 and tensor.ndim > 1 else tensor

    scans = tuple(
        ScanInputs(*(value if isinstance(value, bool) else one(value) for value in scan)) for scan in stage.mixer.scans
    )
    mixer = MixerOutput(one(stage.mixer.gated), one(stage.mixer.projected), scans)
    tensors = {name: one(value) for name, value in stage._asdict().items() if isinstance(value, Tensor)}
    return stage._replace(mixer=mixer, **tensors)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", METHODS)
def test_samples_do_not_touch_one_another(method, family) -> None:
    stage = make_stage(family, (4, 4), num_tokens=12, num_kept=5)
    both = reduce(method, stage)
    for index in range(2):
        alone = reduce(method, one_sample(stage, index))
        assert torch.equal(alone.rows[0], both.rows[index])
        torch.testing.assert_close(alone.hidden_states[0], both.hidden_states[index])


TIES = {
    **{method: [0, 1, 2, 3, 4] for method in ("top", "evit", "mtr", "dyvm", "state_merge")},
    # Of two groups that are all alike the first sources go: of 0 2 4 6, of 4 5 6 7.
    **{method: [1, 3, 5, 6, 7] for method in ("tome", "r_meeto")},
    "utr": [0, 1, 2, 3, 7],
}


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", TIES)
def test_of_equal_tokens_the_earlier_comes_first(method, family) -> None:
    stage = make_stage(family, (2, 4), num_tokens=8, num_kept=5)
    scans = tuple(
        scan._replace(time_step=torch.zeros_like(scan.time_step), B=torch.ones_like(scan.B), C=torch.ones_like(scan.C))
        for scan in stage.mixer.scans
    )
    mixer = MixerOutput(torch.ones_like(stage.mixer.gated), torch.ones_like(stage.mixer.projected), scans)
    stage = stage._replace(mixer=mixer, hidden_states=torch.ones_like(stage.hidden_states))
    assert reduce(method, stage).rows.tolist() == [TIES[method]] * 2


@pytest.mark.parametrize(
    ("cls_row", "num_kept", "kept"),
    [
        # Of 0 2 4 ... 14 the first three go.
        (None, 13, [1, 3, 5, *range(6, 16)]),
        # The class token is between 4 and 5: 2 to 7 are to stay as they are, so that 0, 10 and 12 go.
        (5, 13, [*range(1, 10), 11, *range(13, 16)]),
        # 0, 10, 12 and 14 can go without them; then 8, half of which goes into 7; then the first of them.
        (5, 10, [1, *range(3, 8), 9, 11, 13, 15]),
    ],
)
def test_stm_leaves_the_tokens_around_the_class_token(cls_row, num_kept, kept) -> None:
    stage = make_stage("plainmamba" if cls_row is None else "vim", (4, 4), num_tokens=16, num_kept=num_kept)
    scans = tuple(scan._replace(B=torch.ones_like(scan.B)) for scan in stage.mixer.scans)
    stage = stage._replace(mixer=stage.mixer._replace(scans=scans))
    if cls_row is not None:
        patch_rows = torch.arange(16) + (torch.arange(16) >= cls_row)
        stage = stage._replace(cls_row=torch.full((2, 1), cls_row), patch_rows=patch_rows.expand(2, -1))
    reduction = reduce("stm", stage)
    assert reduction.rows.tolist() == [kept] * 2
    assert ((reduction.merged_into - torch.arange(16)).abs() <= 1).all(), "no token moves further than one place"


@pytest.mark.parametrize("method", METHODS)
def test_gradients_through_a_stage(method, float64) -> None:
    """Gradients of the kept and merged tokens with respect to the input tokens, against finite differences."""
    stage = make_stage("vim", (3, 4), num_tokens=9, num_kept=4)

    def tokens(hidden_states: Tensor) -> Tensor:
        return METHODS[method].reduce(stage._replace(hidden_states=hidden_states)).hidden_states

    assert torch.autograd.gradcheck(tokens, stage.hidden_states.requires_grad_())


def test_half_precision_tokens_are_merged_in_float32() -> None:
    stage = make_stage("plainmamba", (16, 16), num_tokens=256, num_kept=1)
    stage = stage._replace(hidden_states=torch.full((2, 256, HIDDEN), 0.1, dtype=torch.bfloat16))
    merged = METHODS["r_meeto"].reduce(stage)
    assert merged.hidden_states.dtype == torch.bfloat16
    assert torch.equal(
        merged.hidden_states, stage.hidden_states[:, :1]
    )  # 256 summands of bfloat16 would not come to it
    assert merged.sizes.tolist() == [[256.0]] * 2


def test_uniform_is_nested_and_even() -> None:
    previous = set(range(64))
    for num_kept in (32, 16, 4):
        stage = make_stage("plainmamba", (8, 8), num_tokens=64, num_kept=num_kept, batch=1)
        kept = set(reduce("uniform", stage).rows[0].tolist())
        quadrants = [
            sum(cell // 8 // 4 == row and cell % 8 // 4 == column for cell in kept)
            for row in (0, 1)
            for column in (0, 1)
        ]
        assert quadrants == [num_kept // 4] * 4
        assert kept < previous
        previous = kept


@pytest.mark.parametrize("method", ["local_top", "local_merge"])
def test_no_window_is_left_empty(method) -> None:
    stage = make_stage("plainmamba", (5, 7), num_tokens=35, num_kept=12, batch=3)
    for positions in reduce(method, stage).rows.tolist():
        assert len({(cell // 7 // 2, cell % 7 // 2) for cell in positions}) == 12  # as many as there are


# ---- Ties --------------------------------------------------------------------------------------------------------


# By what `local_merge` compares, two tokens that are alone in a window tie; `tome`, `r_meeto` and `stm` score those
# that were never up for merging alike. Both are decided by the tokens' order and never by rounding.
RANKS_ALL = [name for name in METHODS if name not in ("local_merge", "tome", "r_meeto", "stm")]


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize(
    "options",
    [*({"method": name} for name in RANKS_ALL), *({"method": "top", "importance": name} for name in IMPORTANCES)],
    ids=lambda options: "-".join(options.values()),
)
def test_distinct_tokens_have_distinct_scores(options, family) -> None:
    """Otherwise rounding would decide, and backends would keep different tokens. The grid has a centre and axes of
    symmetry."""
    if family == "plainmamba" and options.get("importance") == "mirrored_backward":
        pytest.skip("a PlainMamba has no backward scan")
    config = MAKE_CONFIG[family](image_size=72, token_pruning={"layers": [1], "keep_ratios": [0.5], **options})
    model = make_model(config)
    with torch.no_grad():
        scores = model(torch.randn(2, *config.pixel_values_shape(1)[1:])).token_scores[0].double()
    gaps = scores.sort(dim=1).values.diff(dim=1)
    assert (gaps > 0).all(), f"{(gaps == 0).sum()} of {gaps.numel()} neighbours tie"
    mirrored = torch.isclose(scores, scores.flip(1), rtol=1e-6, atol=0).sum(1) - 1  # the middle is its own image
    assert (mirrored <= 1).all()


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", METHODS)
def test_backends_keep_the_same_tokens(method, family) -> None:
    config = MAKE_CONFIG[family](image_size=72, token_pruning=pruning(method))
    model = FAMILIES[family].classifier(config).eval()
    images = torch.randn(4, *config.pixel_values_shape(1)[1:])
    kept = []
    for backend in ("torch", "auto"):
        config.scan_backend = backend
        with torch.no_grad():
            kept.append(model(images).kept_tokens)
    assert same_tensors(*kept)


# ---- DyVM's predictor --------------------------------------------------------------------------------------------


def test_gates_are_one_with_the_gradient_of_the_probabilities(float64) -> None:
    stage = make_stage("vim", (3, 4), num_tokens=9, num_kept=4)
    assert reduce("dyvm", stage).view.scale is None
    predictor = stage.module.train()
    reduction = METHODS["dyvm"].reduce(stage)
    assert torch.equal(reduction.view.scale, torch.ones(2, 4))
    weights = torch.randn(2, 4)
    (reduction.view.scale * weights).sum().backward()
    found = [parameter.grad.clone() for parameter in predictor.parameters()]

    predictor.zero_grad()
    (predictor(stage.hidden_states).exp().gather(1, reduction.rows) * weights).sum().backward()
    for gradient, parameter in zip(found, predictor.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_loss_trains_the_predictors_through_the_layers(use_reentrant, tiny_config, pixel_values) -> None:
    """Each layer starts with a norm, which would hide a factor on the tokens. Activation checkpointing must not hide it
    either."""
    tiny_config.token_pruning = tiny_config.complete_token_pruning(pruning("dyvm"))
    model = make_model(tiny_config).double().train()
    predictors, labels = [*model.base_model.token_predictors.parameters()], torch.tensor([0, 2])
    gradients = gradients_with_checkpointing(
        model, lambda: model(pixel_values.double(), labels=labels).loss, predictors, use_reentrant
    )
    for plain, checkpointed in gradients:
        assert plain.abs().max() > 1e-9
        torch.testing.assert_close(checkpointed, plain)


def test_training_draws_by_probability() -> None:
    """Gumbel-top-1 draws each token with its probability."""
    stage = make_stage("plainmamba", (1, 3), num_tokens=3, num_kept=1, batch=1)
    with torch.no_grad():
        stage.module.output.weight.mul_(8)
        shares = torch.softmax(stage.module(stage.hidden_states)[0], dim=0)
    many = stage._replace(hidden_states=stage.hidden_states.expand(20_000, -1, -1), patch_rows=None)
    stage.module.train()
    drawn = METHODS["dyvm"].reduce(many).rows.flatten().bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, shares, atol=0.015, rtol=0)


def test_missing_predictor() -> None:
    stage = make_stage("vim", (2, 2), 4, 2)._replace(module=None)
    with pytest.raises(ValueError, match=r"needs a predictor .* `model.set_token_pruning` creates it"):
        METHODS["dyvm"].reduce(stage)


# ---- In models ---------------------------------------------------------------------------------------------------


def pruning(method: str, **changes) -> dict:
    return {"layers": [1, 3], "keep_ratios": [0.7, 0.3], "method": method, **changes}


@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_token_changes_nothing(method, tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    with torch.no_grad():
        dense = model(pixel_values).logits
        for alignment in ("none", "repeat"):
            model.set_token_pruning(pruning(method, keep_ratios=[1.0, 1.0], alignment=alignment))
            torch.testing.assert_close(model(pixel_values).logits, dense)


@pytest.mark.parametrize("method", METHODS)
def test_counts_gradients_and_loading(method, tiny_config, pixel_values, tmp_path) -> None:
    model = make_model(tiny_config)
    model.set_token_pruning(pruning(method, alignment="learned"))
    class_tokens, cls_token_id = (table[tiny_config.model_type] for table in (NUM_CLS_TOKENS, CLS_TOKEN_IDS))
    outputs = model.train()(pixel_values, labels=torch.tensor([0, 2]))
    assert [kept.shape for kept in outputs.kept_tokens] == [(2, 12 + class_tokens), (2, 4 + class_tokens)]
    assert [scores.shape for scores in outputs.token_scores] == [(2, 16), (2, 12)]
    for kept in outputs.kept_tokens:
        assert (kept.diff(dim=1) > 0).all()
        assert class_tokens == 0 or (kept == cls_token_id).any(dim=1).all()
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    offsets = [p.grad for name, p in model.named_parameters() if "hole_time_step" in name]
    assert len(offsets) == 3 * (2 if class_tokens else 1)  # in the layers behind the first stage
    # A class token that comes first is what the last layer's forward scan begins with, before any hole.
    unreached = 1 if cls_token_id == 0 else 0
    assert sum(not gradient.any() for gradient in offsets) == unreached

    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.token_pruning == model.config.token_pruning
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("method", METHODS)
def test_class_token_goes_through_a_stage_untouched(method, pixel_values) -> None:
    model = make_model(MAKE_CONFIG["vim"](token_pruning=pruning(method)))
    seen: dict[str, Tensor] = {}
    layers = model.vim.layers
    layers[2].register_forward_hook(lambda _module, _inputs, output: seen.update(before=output[0]))
    layers[3].register_forward_pre_hook(lambda _module, inputs: seen.update(after=inputs[0], layout=inputs[1]))
    layers[2].register_forward_pre_hook(lambda _module, inputs: seen.update(layout_before=inputs[1]))
    with torch.no_grad():
        model(pixel_values)
    for sample in range(2):
        before = seen["before"][sample, seen["layout_before"].cls_row[sample]]
        assert torch.equal(seen["after"][sample, seen["layout"].cls_row[sample]], before)


def test_methods_differ(tiny_config, pixel_values) -> None:
    model, logits = make_model(tiny_config), {}
    for method in METHODS:
        model.set_token_pruning(pruning(method, alignment="repeat"))
        with torch.no_grad():
            logits[method] = model(pixel_values).logits
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(logits.values(), 2))


def test_convolutions_see_stand_ins(tiny_config, pixel_values, monkeypatch) -> None:
    """Convolutions see a token at every place: its own, or a copy of the nearest one."""
    model = make_model(tiny_config)
    with torch.no_grad():
        model.set_token_pruning(pruning("top"))
        without = model(pixel_values).logits
        model.set_token_pruning(pruning("stand_in"))
        logits = model(pixel_values).logits
    assert not torch.allclose(logits, without, atol=1e-5)

    places: list[tuple[int, int] | None] = list(itertools.product(*map(range, tiny_config.grid_size)))
    if (cls_token_id := CLS_TOKEN_IDS[tiny_config.model_type]) is not None:
        places.insert(cls_token_id, None)

    filled = []

    def fill(hidden_states, kept):
        filled.append(kept.shape[1])
        rows = [nearest_rows(ids, places) for ids in kept.tolist()]
        return torch.stack([tokens[each] for tokens, each in zip(hidden_states, rows, strict=True)])

    def over_the_grid(hidden_states, weight, bias, grid, kept, silu, stand_ins, backend):
        if kept is None:
            return depthwise_conv2d_torch(hidden_states, weight, bias, grid, silu=silu)
        return gather_tokens(depthwise_conv2d_torch(fill(hidden_states, kept), weight, bias, grid, silu=silu), kept)

    def along_the_sequence(hidden_states, weight, bias, reverse, kept, stand_ins, backend):
        if kept is None:
            return causal_conv1d_torch(hidden_states, weight, bias, reverse)
        return gather_tokens(causal_conv1d_torch(fill(hidden_states, kept), weight, bias, reverse), kept)

    monkeypatch.setattr(modeling_plainmamba, "depthwise_conv2d", over_the_grid)
    monkeypatch.setattr(modeling_bidirectional, "causal_conv1d", along_the_sequence)
    with torch.no_grad():
        assert torch.allclose(model(pixel_values).logits, logits, atol=1e-5)
    class_tokens, directions = NUM_CLS_TOKENS[tiny_config.model_type], 2 if cls_token_id is not None else 1
    assert filled == [count + class_tokens for count in (12, 12, 4) for _ in range(directions)]  # from layer 1 on


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_under_autocast(method, tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    model.set_token_pruning(pruning(method))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(pixel_values)
    assert outputs.logits.isfinite().all()
    assert outputs.kept_tokens[-1].shape[0] == len(pixel_values)


def test_no_method_means_the_recommended_one(tiny_config) -> None:
    """The default is the same everywhere. It has its own ranking, so if an importance is given, the paper's method is
    meant."""
    stages = {name: TOKEN_PRUNING[name] for name in ("layers", "keep_ratios")}
    assert tiny_config.complete_token_pruning(stages)["method"] == RECOMMENDED_METHOD == "local_merge"
    options = stages | {"importance": "clip", "alignment": "repeat"}
    assert tiny_config.complete_token_pruning(options) == TOKEN_PRUNING


def test_defaults_are_the_methods_own(tiny_config) -> None:
    for name, method in METHODS.items():
        completed = tiny_config.complete_token_pruning(pruning(name))
        assert completed["alignment"] == method.alignment
        assert completed.get("importance") == method.importance


def test_mean_over_merged_tokens_counts_patches(pixel_values) -> None:
    """If tokens are merged after the last layer that mixes them, their mean must not change."""
    tokens, sizes = torch.randn(2, 3, 5), torch.tensor([[1.0, 4, 2], [3, 1, 1]])
    expected = torch.stack([torch.repeat_interleave(tokens[i], sizes[i].long(), dim=0).mean(0) for i in range(2)])
    torch.testing.assert_close(mean_over_patches(tokens, sizes), expected)
    model = make_model(MAKE_CONFIG["plainmamba"](token_pruning=pruning("r_meeto")))
    with torch.no_grad():
        base = model.plainmamba(pixel_values)
    assert not torch.allclose(base.pooler_output, base.last_hidden_state.mean(1), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_over_merged_tokens_is_not_biased_by_rounding(dtype) -> None:
    tokens, sizes = (2 + torch.randn(4, 196, 64)).to(dtype), torch.randint(1, 5, (4, 196)).float()
    expected = (tokens.double() * sizes.double().unsqueeze(-1)).sum(1) / sizes.double().sum(1, keepdim=True)
    error = mean_over_patches(tokens, sizes).double() - expected
    assert abs(error.mean()) < torch.finfo(dtype).eps / 16


# ---- The learned step of a hole ----------------------------------------------------------------------------------


def test_learned_holes_begin_as_zero_input(tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    logits = {}
    with torch.no_grad():
        for alignment in ("zero_input", "learned"):
            model.set_token_pruning(TOKEN_PRUNING | {"alignment": alignment})
            logits[alignment] = model(pixel_values).logits
        assert torch.equal(logits["learned"], logits["zero_input"])
        for name, parameter in model.named_parameters():
            if "hole_time_step" in name:
                parameter.fill_(2.0)
        assert not torch.equal(model(pixel_values).logits, logits["learned"])


@pytest.mark.parametrize("method", ["top", "dyvm"])
def test_parameters_of_pruning_outlive_a_dense_pass(method, tiny_config, pixel_values, tmp_path) -> None:
    model = make_model(tiny_config)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    options = pruning(method, alignment="learned")
    model.set_token_pruning(options)
    new = {name: nn.init.normal_(p) for name, p in model.named_parameters() if name not in dense}
    assert len(new) > 0
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.set_token_pruning(None)
        model(pixel_values)
        model.set_token_pruning(options)
        assert torch.equal(model(pixel_values).logits, expected)

    model.set_token_pruning(None)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == dense.keys()
    pruned = type(model).from_pretrained(tmp_path, token_pruning=options).eval()
    with torch.no_grad():
        assert torch.equal(pruned(pixel_values).logits, expected)


def test_new_parameters_are_on_the_devices_of_their_layers() -> None:
    model = make_model(MAKE_CONFIG["vim"]())
    model.vim.layers[2:].to("meta")
    model.set_token_pruning(pruning("dyvm", alignment="learned", block_keep_ratio=0.9))
    devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
    of_pruning = {name: device for name, device in devices.items() if is_pruning_parameter(name)}
    assert len(of_pruning) == 2 * 10 + 3 * 2 + 4 * 2
    for name, device in of_pruning.items():
        index = int(re.search(r"\d+", name)[0]) - ("predictors" in name)  # those of a stage are on the layer before it
        assert device == ("meta" if index >= 2 else "cpu"), name


def test_parameters_of_pruning_that_are_not_there(tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    for options, message in (
        (pruning("dyvm"), "needs a predictor"),
        (pruning("top", alignment="learned"), "no learned"),
    ):
        model.config.token_pruning = options  # past `set_token_pruning`
        with pytest.raises(ValueError, match=message):
            model(pixel_values)


@pytest.mark.parametrize("created_by", ["the configuration", "loading", "set_token_pruning"])
def test_predictors_start_with_pytorchs_weights(created_by, tmp_path) -> None:
    """With the small initial weights of the models, almost nothing would pass through them."""
    config, schedule = MAKE_CONFIG["vim"](), pruning("dyvm")
    if created_by == "the configuration":
        config.token_pruning = config.complete_token_pruning(schedule)
    model = FAMILIES["vim"].classifier(config)
    if created_by == "loading":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, token_pruning=schedule)
    elif created_by == "set_token_pruning":
        model.set_token_pruning(schedule)
    for predictor in model.base_model.token_predictors.values():
        assert predictor.input.weight.abs().max().item() == pytest.approx(16**-0.5, rel=0.1)
        assert not predictor.input.bias.any()


def test_new_parameters_take_the_models_precision_and_mode(tiny_config) -> None:
    model = FAMILIES[tiny_config.model_type].classifier(tiny_config).to(torch.bfloat16).train()
    before = set(dict(model.named_parameters()))
    model.set_token_pruning(pruning("dyvm", alignment="learned"))
    new = [parameter for name, parameter in model.named_parameters() if name not in before]
    assert {parameter.dtype for parameter in new} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).logits.isfinite().all()


# ---- What went where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", METHODS)
def test_merged_tokens_are_composed_over_stages(method, family) -> None:
    config = MAKE_CONFIG[family](token_pruning=pruning(method))
    output = run(make_model(config), config)
    if output.merged_tokens is None:
        return
    num_tokens = math.prod(config.grid_size) + NUM_CLS_TOKENS[family]
    before = torch.arange(num_tokens).expand(2, -1)
    for kept, merged in zip(output.kept_tokens, output.merged_tokens, strict=True):
        assert merged.shape == (2, num_tokens)
        assert torch.equal(merged.gather(1, kept), kept), "what is left went into itself"
        moved = merged != torch.arange(num_tokens)
        assert moved.any()
        for row, move, left in zip(merged, moved, kept, strict=True):
            assert set(row[move].tolist()) <= set(left.tolist())
        assert torch.equal(merged.gather(1, before), merged), "what met at an earlier stage stays together"
        before = merged


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_that_keeps_everything_is_a_stage(method) -> None:
    config = MAKE_CONFIG["vim"](token_pruning=pruning(method, keep_ratios=[1.0, 0.3]))
    output = run(make_model(config), config)
    assert len(output.kept_tokens) == len(output.token_scores) == 2
    if output.merged_tokens is not None:
        first, second = output.merged_tokens
        assert torch.equal(first, torch.arange(17).expand(2, -1))
        assert not torch.equal(first, second)


def run(model: nn.Module, config) -> Any:
    with torch.no_grad():
        return model(torch.randn(config.pixel_values_shape(2)))


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", METHODS)
def test_maps_filled_by_merged_tokens(method, family) -> None:
    """They differ from maps filled with last states only where tokens were merged."""
    config = MAKE_CONFIG[family](out_indices=[0, 2, 4], token_pruning=pruning(method))
    model = FAMILIES[family].classes["Backbone"](config).eval()
    images = torch.randn(config.pixel_values_shape(2))
    maps = {}
    for fill in ("last", "merged"):
        config.feature_fill = fill
        with torch.no_grad():
            output = model(images)
        maps[fill] = [feature_map.flatten(2) for feature_map in output.feature_maps]
    merged = None if output.merged_tokens is None else merged_patches(output.merged_tokens, config)
    for level, stages in enumerate([0, 1, 2]):
        last, filled = maps["last"][level], maps["merged"][level]
        if stages == 0 or merged is None:
            assert torch.equal(last, filled)
            continue
        into = merged[stages - 1].unsqueeze(1).expand_as(last)
        assert torch.equal(filled, last.gather(2, into))
        assert not torch.equal(filled, last)


# ---- How much is computed ----------------------------------------------------------------------------------------


KEEP_RATIOS = ((0.7, 0.6), (0.3, 0.2), (1.0, 1.0))


@cache
def multiply_adds_that_run(family: str, method: str, keep_ratios: tuple[float, float]) -> int:
    config = MAKE_CONFIG[family](scan_backend="torch", token_pruning=pruning(method, keep_ratios=list(keep_ratios)))
    model = FAMILIES[family].classifier(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    return counter.get_total_flops() // 2


# Each method with each ratio and in each family.
@pytest.mark.parametrize(
    ("method", "family", "keep_ratios"),
    [
        (method, family, KEEP_RATIOS[(i + j) % 3])
        for i, method in enumerate(METHODS)
        for j, family in enumerate(sorted(MAKE_CONFIG))
    ],
)
def test_matrix_products_of_a_stage_are_those_that_run(method, family, keep_ratios) -> None:
    """For one image, the difference from a method that computes none. With stand-ins, the plain PyTorch convolution
    covers all places; FLOPs count only the remaining tokens, which is all that a kernel computes."""
    config = MAKE_CONFIG[family](token_pruning=pruning(method, keep_ratios=list(keep_ratios)))
    flops = count_flops(config).pruned
    without = "stand_in" if method in ("stand_in", "local_top", "local_merge") else "top"
    counted, others = (multiply_adds_that_run(family, name, keep_ratios) for name in (method, without))
    assert flops.breakdown.get("pruning", 0) == counted - others
    assert sum(flops.breakdown.values()) == flops.total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("size", [32, 128])
def test_budget_counts_the_methods_own_cost(method, family, size) -> None:
    narrow = {"stem_channels": 4} if family == "plainmamba" else {}
    config = MAKE_CONFIG[family](
        image_size=size, num_hidden_layers=8, token_pruning={"flops_reduction": 0.3, "method": method}, **narrow
    )
    assert count_flops(config).reduction == pytest.approx(0.3, abs=0.005)
    assert config.token_pruning["method"] == method


# ---- Static shapes -----------------------------------------------------------------------------------------------


class MethodModule(nn.Module):
    """A method as a module of plain tensors, for Vim's two scans."""

    def __init__(self, method: str, stage: Stage) -> None:
        super().__init__()
        self.reduce, self.grid, self.num_kept = METHODS[method].reduce, stage.grid, stage.num_kept
        self.module = stage.module
        self.biases = [scan.time_step_bias for scan in stage.mixer.scans]

    def forward(self, hidden_states, gated, projected, rows, cells, time_step, B, C) -> tuple[Tensor, Tensor]:
        scans = tuple(
            ScanInputs(time_step[:, i], bias, B[:, i], C[:, i], reversed=i == 1) for i, bias in enumerate(self.biases)
        )
        mixer = MixerOutput(gated, projected, scans)
        clip = IMPORTANCES["clip"]
        stage = Stage(hidden_states, self.num_kept, cells, self.grid, mixer, rows, importance=clip, module=self.module)
        return self.reduce(stage)[:2]


@pytest.mark.parametrize("method", METHODS)
def test_export_with_dynamic_batch(method) -> None:
    def tensors(stage: Stage) -> tuple[Tensor, ...]:
        scans = [
            torch.stack([getattr(scan, name) for scan in stage.mixer.scans], 1) for name in ("time_step", "B", "C")
        ]
        return stage.hidden_states, stage.mixer.gated, stage.mixer.projected, stage.patch_rows, stage.cells, *scans

    stage, other = (make_stage("vim", (3, 4), num_tokens=10, num_kept=4, batch=batch) for batch in (2, 5))
    module = MethodModule(method, stage).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, tensors(stage), dynamic_shapes=({0: batch},) * 8)
    with torch.no_grad():
        expected, exported = module(*tensors(other)), program.module()(*tensors(other))
    assert torch.equal(exported[0], expected[0])
    torch.testing.assert_close(exported[1], expected[1])


def test_importance_needs_no_gradient() -> None:
    stage = make_stage("vim", (2, 2), num_tokens=4, num_kept=2)
    stage = stage._replace(mixer=stage.mixer._replace(gated=stage.mixer.gated.requires_grad_()))
    for importance in IMPORTANCES.values():
        assert not importance(stage).requires_grad


def test_a_new_method_is_one_entry(monkeypatch, tiny_config, pixel_values) -> None:
    def keep_first(stage: Stage) -> Reduction:
        positions = torch.arange(stage.num_kept).expand(len(stage.hidden_states), -1)
        return Reduction(positions, stage.hidden_states[:, : stage.num_kept], stage.cells.float())

    monkeypatch.setitem(METHODS, "first", PruningMethod(keep_first, "none"))
    model = make_model(tiny_config)
    model.set_token_pruning(pruning("first"))
    kept = model(pixel_values).kept_tokens[0]
    tokens = [*range(16)]  # as patches, counted without the class token
    if (cls_token_id := CLS_TOKEN_IDS[tiny_config.model_type]) is not None:
        tokens.insert(cls_token_id, -1)
    assert kept.tolist() == [[place for place, patch in enumerate(tokens) if patch < 12]] * 2
