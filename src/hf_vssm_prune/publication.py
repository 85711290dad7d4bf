"""What papers say about a family of models, for its configuration to tell. None of it was measured by this project."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """A paper, for model cards; `flops_convention` says what the figures of a family's count."""

    name: str  # of the family or method
    title: str
    arxiv: str
    citation: str | None = None  # BibTeX
    repository: str | None = None
    flops_convention: str | None = None


class PublishedResult(NamedTuple):
    """One row of a paper's table: top-1 in percent, and FLOPs as the paper states them, if it does."""

    method: str
    source: str
    top1: float
    flops: str | None = None


class PublishedModel(NamedTuple):
    """A preset whose weights were published.

    Attributes:
        weights: where.
        token_pruning: the pruning that comes to the FLOPs that a paper states for it, or for a sibling.
        results: what papers report.
        dataset: of these results, by name.
        dataset_id: the same on the Hub.
        options: of the configuration, over the preset's.
    """

    weights: str
    token_pruning: dict[str, Any]
    results: tuple[PublishedResult, ...] = ()
    dataset: str = "ImageNet-1k"
    dataset_id: str = "ILSVRC/imagenet-1k"
    options: Mapping[str, Any] = MappingProxyType({})


TOP = "ToP, arXiv 2409.18962"
R_MEETO = "R-MeeTo, arXiv 2412.12496"
DYVM = "DyVM, arXiv 2504.04787"
STORM = "STORM"
VIDEOMAMBA = "VideoMamba, arXiv 2403.06977"
