"""Golden cases with weights in half precision: how much rounding changes logits and scores.

If models keep different tokens at a stage, their scores and logits cannot be compared afterwards. All models therefore
keep the official model's tokens at every stage; the tokens that each would have kept follow from its scores.

A kernel must not round worse than plain PyTorch operators with the same weights. Both errors are measured against the
same rounded weights in float32. The weights of the golden cases are random, and some of the models amplify small
differences a hundredfold, so a single result says little, and errors are averaged over a case.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from golden import GoldenCase
from torch import Tensor

from hf_vssm_prune.pruning_methods import METHODS, PAPERS_METHOD
from hf_vssm_prune.pruning_stage import Reduction, Stage
from hf_vssm_prune.token_pruning import gather_tokens, select_tokens


# Our errors, as multiples of plain PyTorch's.
MOST_ERROR = 2.0
# Both a token's score and the threshold can be off by the largest error of a score.
FARTHEST = 2.0


class Errors(NamedTuple):
    """Root mean square errors compared with float32 and rounded weights, relative to the exact values' spread."""

    ours: float
    plain: float


class StageInHalf(NamedTuple):
    """A stage that all models enter with the same tokens.

    Attributes:
        scores: the errors of the scores.
        moved: the number of tokens that either the official model or ours in half precision keeps, but not both.
        farthest: the largest distance of such a token's official score from the threshold, which is halfway between the
            last kept and the first dropped token, in units of plain PyTorch's largest error of a score in that image.
    """

    scores: Errors
    moved: int
    farthest: float


class VariantInHalf(NamedTuple):
    name: str
    logits: Errors
    stages: list[StageInHalf]


@torch.no_grad()
def run_in_half(case: GoldenCase, model: Any, dtype: torch.dtype = torch.bfloat16) -> list[VariantInHalf]:
    """Runs all variants of a case: dense, and pruned.

    Args:
        model: the model with the official weights in float32.
        dtype: the type to which the weights are rounded.
    """
    pixel_values = case.pixel_values().to(model.device)
    half = copy.deepcopy(model).to(dtype)
    plain = copy.deepcopy(half)
    plain.config.scan_backend = "torch"
    models = {"official": model, "ours": half, "plain": plain, "exact": copy.deepcopy(half).float()}
    variants = []
    for variant in [{"name": "dense"}, *case.recipe["pruned"]]:
        schedule, rows = schedule_of(variant), []
        outputs = {}
        for name, each in models.items():
            each.set_token_pruning(schedule)
            with recorded_rows(rows) if name == "official" else kept_rows(rows):
                outputs[name] = each(pixel_values)
        variants.append(_compare(case, variant["name"], outputs, rows))
    return variants


def schedule_of(variant: dict[str, Any]) -> dict[str, Any] | None:
    """The schedule of a variant of a golden case. None: dense."""
    if "layers" not in variant:
        return None
    options = {name: variant[name] for name in ("layers", "alignment", "importance")}
    return {**options, "keep_ratios": variant["keep"], "method": PAPERS_METHOD}


@contextmanager
def recorded_rows(rows: list[Tensor]) -> Iterator[None]:
    """Records which rows models keep at each stage with the paper's method."""
    reduce = METHODS[PAPERS_METHOD].reduce

    def record(stage: Stage) -> Reduction:
        reduction = reduce(stage)
        rows.append(reduction.rows)
        return reduction

    with _method(record):
        yield


@contextmanager
def kept_rows(rows: Sequence[Tensor]) -> Iterator[None]:
    """Makes models keep these rows at each stage with the paper's method, whatever their scores."""
    following = iter(rows)

    def keep(stage: Stage) -> Reduction:
        kept = next(following)
        return Reduction(kept, gather_tokens(stage.hidden_states, kept), stage.scores())

    with _method(keep):
        yield


@contextmanager
def _method(reduce: Callable[[Stage], Reduction]) -> Iterator[None]:
    method = METHODS[PAPERS_METHOD]
    METHODS[PAPERS_METHOD] = method._replace(reduce=reduce)
    try:
        yield
    finally:
        METHODS[PAPERS_METHOD] = method


def _compare(case: GoldenCase, name: str, outputs: dict[str, Any], rows: Sequence[Tensor]) -> VariantInHalf:
    stages = []
    for index, kept in enumerate(rows):
        expected = torch.from_numpy(case.expected[f"{name}.kept{index}"])
        assert torch.equal(outputs["official"].kept_tokens[index].cpu(), expected)
        scores = {model: each.token_scores[index].double().cpu() for model, each in outputs.items()}
        scores["official"] = torch.from_numpy(case.expected[f"{name}.scores{index}"]).double()
        stages.append(StageInHalf(_errors(scores), *_moved(scores, kept.cpu())))
    logits = {model: each.logits.double().cpu() for model, each in outputs.items()}
    return VariantInHalf(name, _errors(logits), stages)


def _errors(values: dict[str, Tensor]) -> Errors:
    spread = values["exact"].std()
    return Errors(*(float((values[name] - values["exact"]).pow(2).mean().sqrt() / spread) for name in Errors._fields))


def _moved(scores: dict[str, Tensor], kept: Tensor) -> tuple[int, float]:
    """See `StageInHalf`."""
    official, count = scores["official"], kept.shape[1]
    if count == official.shape[1]:
        return 0, 0.0
    none = torch.zeros_like(official, dtype=torch.bool)
    moved = none.scatter(1, kept, True) != none.scatter(1, select_tokens(scores["ours"], count), True)
    ordered = official.sort(dim=1, descending=True).values
    cut = ordered[:, count - 1 : count + 1].mean(dim=1, keepdim=True)
    unit = (scores["plain"] - official).abs().amax(dim=1, keepdim=True)
    return int(moved.sum()), float(((official - cut).abs() / unit * moved).max())


def over_all(errors: Sequence[Errors]) -> Errors:
    """Root mean square of several errors."""
    return Errors(*(float(torch.tensor(each).pow(2).mean().sqrt()) for each in zip(*errors, strict=True)))


def complaints(variants: Sequence[VariantInHalf]) -> list[str]:
    """Errors that half precision does not explain."""
    stages = [stage for variant in variants for stage in variant.stages]
    results = {"logits": over_all([variant.logits for variant in variants])}
    results["scores"] = over_all([stage.scores for stage in stages])
    found = [
        f"{name} are off by {errors.ours:.1e} of their spread, with plain PyTorch by {errors.plain:.1e}"
        for name, errors in results.items()
        if not errors.ours <= MOST_ERROR * errors.plain
    ]
    farthest = max(stage.farthest for stage in stages)
    if not farthest <= FARTHEST:
        found.append(f"a token is kept or dropped {farthest:.1f} errors of a score from the cut")
    return found
