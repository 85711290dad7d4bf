"""What papers report about a model family, for use in its configuration. None of it was measured by this project."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """A paper, for model cards. `flops_convention` describes what the family's FLOPs include."""

    name: str  # name of the family or method
    title: str
    arxiv: str
    citation: str | None = None  # BibTeX
    repository: str | None = None
    flops_convention: str | None = None


class PublishedResult(NamedTuple):
    """One row of a paper's table: top-1 in percent, and FLOPs in the form given by the paper, if it reports them."""

    method: str
    source: str
    top1: float
    flops: str | None = None


class PublishedModel(NamedTuple):
    """A preset whose weights were published.

    Attributes:
        weights: location of the weights.
        token_pruning: pruning options that reach the FLOPs reported by a paper for this model or a similar one.
        results: results reported in papers.
        dataset: name of the data set of these results.
        dataset_id: its id on the Hub.
        options: options of the configuration that override those of the preset.
        sizes: sizes of the inputs in these results, each as options that override the preset's.
    """

    weights: str
    token_pruning: dict[str, Any]
    results: tuple[PublishedResult, ...] = ()
    dataset: str = "ImageNet-1k"
    dataset_id: str = "ILSVRC/imagenet-1k"
    options: Mapping[str, Any] = MappingProxyType({})
    sizes: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)


TOP = "ToP, arXiv 2409.18962"
TOP_LOGS = "logs in the repository of ToP's authors"
R_MEETO = "R-MeeTo, arXiv 2412.12496"
DYVM = "DyVM, arXiv 2504.04787"
STORM = "STORM"
VIDEOMAMBA = "VideoMamba, arXiv 2403.06977"

NOTES_ON_SOURCES = MappingProxyType(
    {
        TOP: "ToP's authors published code of naive pruning for Vim (https://github.com/ZLKong/ToP-ViM, October 2024). "
        "It has no alignment, and scores tokens by the output of the backward scan, in that scan's own order.",
        TOP_LOGS: "The logs are from that code's history. Older runs there end 2.7 to 3.0 points lower; what changed "
        "between them is not recorded.",
    }
)
