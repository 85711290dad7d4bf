"""Options: the pruning schedule, and budgets for elastic training."""

from dataclasses import dataclass, field
from typing import Any

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.pruning_importances import IMPORTANCES
from hf_vssm_prune.pruning_methods import METHODS, RECOMMENDED_METHOD
from hf_vssm_prune.pruning_options import TokenPruning
from hf_vssm_prune.token_pruning import ALIGNMENTS
from hf_vssm_prune.training.arguments.parsing import check_range, describe, exclude


@dataclass
class PruningArguments:
    """The schedule of token pruning, explicit or from a budget."""

    _argument_group_name = "pruning"

    prune_layers: list[int] | None = field(
        default=None, metadata=describe("layers before which tokens are dropped, e.g. 6 12 18")
    )
    keep_ratios: list[float] | None = field(
        default=None, metadata=describe("fraction of the tokens to keep at each of --prune_layers")
    )
    flops_reduction: float | None = field(
        default=None,
        metadata=describe("fraction of FLOPs to remove, instead of --keep_ratios; at --prune_layers if given"),
    )
    prune_method: str | None = field(
        default=None,
        metadata=describe(
            "pruning method; `top` is the paper's; by default the checkpoint's, or for a dense checkpoint "
            f"{RECOMMENDED_METHOD} (top if --importance is given)",
            choices=tuple(METHODS),
        ),
    )
    prune_alignment: str | None = field(
        default=None,
        metadata=describe("state alignment across dropped tokens; by default the method's", choices=ALIGNMENTS),
    )
    importance: str | None = field(
        default=None,
        metadata=describe(
            "measure of a token's importance, for methods that use one; by default the method's",
            choices=tuple(IMPORTANCES),
        ),
    )
    block_keep_ratio: float | None = field(
        default=None,
        metadata=describe(
            "fraction of the scan directions that run, chosen for each image and layer as in DyVM; for models with a "
            "class token; by default the checkpoint's, or all"
        ),
    )

    def __post_init__(self) -> None:
        exclude("keep_ratios", self.keep_ratios, "flops_reduction", self.flops_reduction)
        if self.flops_reduction is None and (self.prune_layers is None) != (self.keep_ratios is None):
            raise ValueError(
                "--prune_layers and --keep_ratios must be given together: give both, or use --flops_reduction."
            )
        if self.keep_ratios is not None and len(self.prune_layers or ()) != len(self.keep_ratios):
            raise ValueError(
                f"--prune_layers {self.prune_layers} and --keep_ratios {self.keep_ratios} differ in length: give one "
                "ratio for each layer."
            )
        if outside := [ratio for ratio in self.keep_ratios or () if not 0 < ratio <= 1]:
            raise ValueError(f"--keep_ratios has {outside}: each must be greater than 0 and at most 1.")
        check_range("block_keep_ratio", self.block_keep_ratio, 0, 1, above=True)
        if self.flops_reduction is not None and not 0 < self.flops_reduction < 1:
            raise ValueError(
                f"--flops_reduction is {self.flops_reduction}: it must be between 0 and 1, for instance 0.416."
            )

    def schedule(self, config: VisionMambaConfig) -> dict[str, Any] | None:
        """Complete `token_pruning` options for a checkpoint with this configuration. Options that were not given are
        taken from the checkpoint's own schedule; None if there is no schedule at all.

        Raises:
            ValueError: the options are not allowed for this model, or specify a method without a schedule.
        """
        own = config.token_pruning
        if (stages := self._stages() or _stages_of(own)) is None:
            names = ("prune_method", "prune_alignment", "importance", "block_keep_ratio")
            if idle := [name for name in names if getattr(self, name)]:
                raise ValueError(
                    f"--{idle[0]} is {getattr(self, idle[0])!r}, but there is no schedule: give "
                    "--flops_reduction, or --prune_layers and --keep_ratios."
                )
            return None
        given = {
            "method": self.prune_method,
            "alignment": self.prune_alignment,
            "importance": self.importance,
            "block_keep_ratio": self.block_keep_ratio,
        }
        choices = {name: value for name, value in given.items() if value is not None}
        if own is not None and "block_keep_ratio" in own:  # belongs to no method, so another one does not replace it
            choices.setdefault("block_keep_ratio", own["block_keep_ratio"])
        return config.complete_token_pruning(stages | choices)

    def _stages(self) -> dict[str, Any] | None:
        """The given layers and keep ratios, or the budget; None if none were given."""
        given = {
            "flops_reduction": self.flops_reduction,
            "layers": self.prune_layers,
            "keep_ratios": self.keep_ratios,
        }
        return {name: value for name, value in given.items() if value is not None} or None


def _stages_of(token_pruning: dict[str, Any] | None) -> dict[str, Any] | None:
    """The layers and keep ratios in complete options."""
    return None if token_pruning is None else {name: token_pruning[name] for name in ("layers", "keep_ratios")}


@dataclass
class ElasticArguments:
    """Training with a different budget at each step, so that one set of weights serves all budgets."""

    _argument_group_name = "elastic"

    elastic_budgets: list[float] = field(
        default_factory=list,
        metadata=describe(
            "FLOPs reductions, one of which is drawn at each step, e.g. 0 0.2 0.4; evaluation and the saved model "
            "use the model's own schedule"
        ),
    )
    elastic_importance: str | None = field(
        default=None,
        metadata=describe(
            "measure of importance with --elastic_budgets; by default the model's own",
            choices=tuple(IMPORTANCES),
        ),
    )

    def __post_init__(self) -> None:
        if outside := [budget for budget in self.elastic_budgets if not 0 <= budget < 1]:
            raise ValueError(f"--elastic_budgets has {outside}: each must be at least 0 and less than 1.")
        if self.elastic_importance is not None and not self.elastic_budgets:
            raise ValueError(f"--elastic_importance is {self.elastic_importance!r}: it needs --elastic_budgets.")

    def schedules(self, config: VisionMambaConfig) -> list[TokenPruning | None]:
        """`token_pruning` options for each budget and a model with this configuration; None for a budget of 0.

        Raises:
            ValueError: no schedule of this model comes close to a budget.
        """
        choices = {} if self.elastic_importance is None else {"importance": self.elastic_importance}
        return [
            config.complete_token_pruning({"flops_reduction": budget, **choices}) if budget > 0 else None
            for budget in self.elastic_budgets
        ]
