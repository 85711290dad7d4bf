"""Papers, and what they report about a model family, for use in its configuration. None of it was measured by this
project."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Paper(NamedTuple):
    """A paper, for model cards. `flops_convention` describes what a family's FLOPs include."""

    name: str  # name of the family or method
    title: str
    arxiv: str
    citation: str | None = None  # BibTeX
    repository: str | None = None
    flops_convention: str | None = None

    @property
    def source(self) -> str:
        """What tables of results call it."""
        return f"{self.name}, arXiv {self.arxiv}"


class PublishedResult(NamedTuple):
    """One row of a paper's table: the metric in percent, and FLOPs in the form given by the paper, if it reports
    them."""

    method: str
    source: str
    value: float
    flops: str | None = None


class PublishedModel(NamedTuple):
    """A preset whose weights were published.

    Attributes:
        weights: location of the weights.
        token_pruning: pruning options that reach the FLOPs reported by a paper for this model or a similar one.
        results: results reported in papers.
        dataset: name of the data set of these results.
        dataset_id: its id on the Hub.
        metric: name of their metric.
        options: options of the configuration that override those of the preset.
        sizes: sizes of the inputs in these results, each as options that override the preset's.
    """

    weights: str
    token_pruning: dict[str, Any]
    results: tuple[PublishedResult, ...] = ()
    dataset: str = "ImageNet-1k"
    dataset_id: str = "ILSVRC/imagenet-1k"
    metric: str = "top-1"
    options: Mapping[str, Any] = MappingProxyType({})
    sizes: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)


# Of pruning methods.
TOP_PAPER = Paper(
    name="ToP",
    title="Exploring Token Pruning in Vision State Space Models",
    arxiv="2409.18962",
    citation="""@inproceedings{zhan2024exploring,
  title     = {Exploring Token Pruning in Vision State Space Models},
  author    = {Zhan, Zheng and Kong, Zhenglun and Gong, Yifan and Wu, Yushu and Meng, Zichong and Zheng, Hangyu and
               Shen, Xuan and Ioannidis, Stratis and Niu, Wei and Zhao, Pu and Wang, Yanzhi},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}""",
)
EVIT_PAPER = Paper("EViT", "Not All Patches are What You Need: Expediting Vision Transformers", "2202.07800")
TOME_PAPER = Paper("ToMe", "Token Merging: Your ViT But Faster", "2210.09461")
R_MEETO_PAPER = Paper("R-MeeTo", "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training", "2412.12496")
UTR_PAPER = Paper("UTR", "Rethinking Token Reduction for State Space Models", "2410.14725")
MTR_PAPER = Paper("MTR", "Training-free Token Reduction for Vision Mamba", "2507.14042")
STM_PAPER = Paper("STM", "Sequential Token Merging: Revisiting Hidden States", "2509.22691")
DYVM_PAPER = Paper("DyVM", "Dynamic Vision Mamba", "2504.04787")

# The sources of results.
TOP, R_MEETO, DYVM = TOP_PAPER.source, R_MEETO_PAPER.source, DYVM_PAPER.source
TOP_LOGS = "logs in the repository of ToP's authors"
STORM = "STORM, arXiv 2606.19932"
PLAINMAMBA_REPOSITORY = "repository of PlainMamba's authors"
VIM_REPOSITORY = "repository of Vim's authors"
VIDEOMAMBA = "VideoMamba, arXiv 2403.06977"
TOP_REDUCTION = 0.416  # the fraction of PlainMamba-L3's FLOPs that ToP removes

NOTES_ON_SOURCES = MappingProxyType(
    {
        TOP: "ToP's authors published code of naive pruning for Vim (https://github.com/ZLKong/ToP-ViM, October 2024). "
        "It has no alignment, and scores tokens by the output of the backward scan, in that scan's own order.",
        TOP_LOGS: "The logs are from that code's history. Older runs there end 2.7 to 3.0 points lower; what changed "
        "between them is not recorded.",
    }
)
