"""What papers say about a family of models: the classes in which its configuration tells it.

None of it was measured by this project.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Paper:
    """A paper that model cards refer to.

    Attributes:
        name: of the family or method.
        title: of the paper.
        arxiv: its number on arXiv.
        citation: a BibTeX entry. None: the link alone.
        repository: address of the authors' code.
        flops_convention: what its figures count, for a model family.
    """

    name: str
    title: str
    arxiv: str
    citation: str | None = None
    repository: str | None = None
    flops_convention: str | None = None


@dataclass(frozen=True)
class PublishedResult:
    """One row of a paper's table.

    Attributes:
        method: what was done to the model.
        source: the paper that reports it.
        top1: accuracy in percent.
        flops: as the paper states it, in multiply-adds or as a share of the dense model's; None where it does not.
    """

    method: str
    source: str
    top1: float
    flops: str | None = None


@dataclass(frozen=True)
class PublishedModel:
    """A preset whose weights its authors published, for ImageNet-1k at 224 x 224.

    Attributes:
        weights: where they are, as the authors' README links them.
        token_pruning: a schedule that comes to the FLOPs that a paper states for it, else one like a sibling's.
        results: what papers report for it.
    """

    weights: str
    token_pruning: dict[str, Any]
    results: list[PublishedResult] = field(default_factory=list)


TOP = "ToP, arXiv 2409.18962"
R_MEETO = "R-MeeTo, arXiv 2412.12496"
DYVM = "DyVM, arXiv 2504.04787"
STORM = "STORM"
