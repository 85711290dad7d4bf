"""What a study is made of: its file, and the list of pieces that follows from it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from hf_vssm_prune.training.recipes import read_recipe


# `token_pruning` by its own names, and what scripts/finetune.py calls it.
PRUNING_OPTIONS = {
    "layers": "prune_layers",
    "method": "prune_method",
    "alignment": "prune_alignment",
    "importance": "importance",
}
LOSSES_OF_A_TEACHER = ("kd_weight", "alignment_weight")


@dataclass(frozen=True)
class Variant:
    """A way to prune and to fine-tune.

    Attributes:
        pruning: `layers`, `method`, `alignment` and `importance` of `token_pruning`; what is left out is the default.
        training: options of scripts/finetune.py, over those of the study.
    """

    pruning: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        seeds: each piece is run with each.
        budgets: shares of FLOPs to remove.
        main_budget: the one of them at which all variants are compared.
        max_eval_samples: images that every evaluation draws, by the seed.
        datasets: by name `dataset_name`, and options of scripts/train.py in `dense`.
        families: by name options of scripts/train.py; with `model_name_or_path` their dense models go on from weights
            that are there.
        training, dense, finetuning: options of all pieces that train, of scripts/train.py, of scripts/finetune.py.
        elastic: the `variant` that is trained for all budgets at once, and options over its own.
        variants: by name; the first is the baseline.
        more_variants: others, which are run after everything else.
        every_budget: names of those that are fine-tuned for every budget.
    """

    seeds: list[int]
    budgets: list[float]
    main_budget: float
    max_eval_samples: int
    datasets: dict[str, dict[str, Any]]
    families: dict[str, dict[str, Any]]
    training: dict[str, Any]
    dense: dict[str, Any]
    finetuning: dict[str, Any]
    elastic: dict[str, Any]
    variants: dict[str, Variant]
    more_variants: dict[str, Variant]
    every_budget: list[str]

    @property
    def trained(self) -> dict[str, Any]:
        """Options of every piece that trains."""
        return {"max_eval_samples": self.max_eval_samples, **self.training}

    @property
    def baseline(self) -> str:
        return next(iter(self.variants))

    @property
    def all_variants(self) -> dict[str, Variant]:
        return {**self.variants, **self.more_variants}


def read_study(file: Path) -> Study:
    """Reads a study's file. What it leaves out is as in the file that its `base` names, in the same folder.

    Raises:
        ValueError: it is missing, or its content is not that of a study; the message names what is wrong.
    """
    content = read_recipe(file)
    if (base := content.pop("base", None)) is not None:
        content = {**read_recipe(file.parent / base), **content}
    names = [each.name for each in fields(Study)]
    if sorted(content) != sorted(names):
        raise ValueError(f"{file} has {sorted(content)}; a study has exactly {sorted(names)}.")
    variants, more_variants = (
        {name: _read_variant(file, name, parts) for name, parts in content[key].items()}
        for key in ("variants", "more_variants")
    )
    if unknown := sorted(set(content["every_budget"]) - set(variants)):
        raise ValueError(f"{file}: every_budget has {unknown}, which are no variants: {sorted(variants)}.")
    if content["elastic"].get("variant") not in variants:
        raise ValueError(f"{file}: elastic has no 'variant' that is one of {sorted(variants)}.")
    if content["main_budget"] not in content["budgets"]:
        raise ValueError(f"{file}: main_budget {content['main_budget']} is none of {content['budgets']}.")
    return Study(**{**content, "variants": variants, "more_variants": more_variants})


def _read_variant(file: Path, name: str, parts: dict[str, Any]) -> Variant:
    if unknown := sorted(set(parts) - {"pruning", "training"}):
        raise ValueError(f"{file}: variant {name!r} has {unknown}; allowed are 'pruning' and 'training'.")
    variant = Variant(**parts)
    if unknown := sorted(set(variant.pruning) - set(PRUNING_OPTIONS)):
        raise ValueError(f"{file}: variant {name!r} prunes by {unknown}; allowed are {sorted(PRUNING_OPTIONS)}.")
    return variant


@dataclass(frozen=True)
class Piece:
    """One run of a script.

    Attributes:
        script: "train", "finetune" or "compare_methods".
        dataset, family, seed: for which.
        name: what it is, unique among those of the same data set, family and seed.
        options: of the script, without paths.
        start: name of the piece whose weights it begins with.
    """

    script: str
    dataset: str
    family: str
    seed: int
    name: str
    options: dict[str, Any]
    start: str | None = None

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.family}/{self.seed}/{self.name}"

    def key_of_start(self) -> str | None:
        return None if self.start is None else f"{self.dataset}/{self.family}/{self.seed}/{self.start}"


class Template(NamedTuple):
    """A piece before its data set, family and seed; fields as in `Piece`."""

    script: str
    start: str | None
    options: dict[str, Any]


def list_pieces(study: Study) -> list[Piece]:
    """All pieces in the order in which they are run: a piece comes after the one that it starts from, and what is
    compared over seeds comes together."""
    return [
        Piece(script, dataset, family, seed, name, options, start)
        for dataset in study.datasets
        for family in study.families
        for name, (script, start, options) in _templates(study, dataset, family).items()
        for seed in study.seeds
    ]


def _templates(study: Study, dataset: str, family: str) -> dict[str, Template]:
    """Of every piece of a data set and a family, by its name."""
    evaluated = {"max_eval_samples": study.max_eval_samples}
    of_dataset, of_family = study.datasets[dataset]["dense"], study.families[family]
    begins = {} if "model_name_or_path" in of_family else {"family": family}
    dense = {**study.trained, **study.dense, **begins, **of_dataset, **of_family}
    at_other_budgets = [
        (name, budget) for name in study.every_budget for budget in study.budgets if budget != study.main_budget
    ]
    return {
        "dense": Template("train", None, dense),
        "dense tuned": Template("train", "dense", {**study.trained, **study.finetuning}),
        **_tuned(study, [(name, study.main_budget) for name in study.variants]),
        "untrained": Template("compare_methods", "dense", evaluated | {"schedules": _untrained_schedules(study)}),
        **_tuned(study, at_other_budgets),
        "elastic": Template("finetune", "dense", _elastic_options(study)),
        "elastic compared": Template(
            "compare_methods", "elastic", {**evaluated, "schedules": _elastic_schedules(study)}
        ),
        **_tuned(study, [(name, study.main_budget) for name in study.more_variants]),
    }


def _tuned(study: Study, choices: list[tuple[str, float]]) -> dict[str, Template]:
    """Variants at budgets."""
    return {
        tuned_name(name, budget): Template("finetune", "dense", _tuned_options(study, name, budget))
        for name, budget in choices
    }


def _elastic_options(study: Study) -> dict[str, Any]:
    options = _tuned_options(study, study.elastic["variant"], study.main_budget)
    return {**options, **{name: value for name, value in study.elastic.items() if name != "variant"}}


def _elastic_schedules(study: Study) -> dict[str, dict[str, Any]]:
    pruning = study.variants[study.elastic["variant"]].pruning
    return {tuned_name("elastic", budget): {"flops_reduction": budget, **pruning} for budget in study.budgets}


def _untrained_schedules(study: Study) -> dict[str, dict[str, Any]]:
    """Every way to prune once, by the name of the first variant that does."""
    schedules: dict[str, dict[str, Any]] = {}
    for name, variant in study.all_variants.items():
        for budget in study.budgets if name in study.every_budget else [study.main_budget]:
            schedule = {"flops_reduction": budget, **variant.pruning}
            if schedule not in schedules.values():
                schedules[tuned_name(name, budget)] = schedule
    return schedules


def _tuned_options(study: Study, name: str, budget: float) -> dict[str, Any]:
    """The options of scripts/finetune.py; no teacher, unless the variant has one."""
    variant = study.all_variants[name]
    return {
        **study.trained,
        **dict.fromkeys(LOSSES_OF_A_TEACHER, 0),
        **study.finetuning,
        "flops_reduction": budget,
        **{PRUNING_OPTIONS[option]: value for option, value in variant.pruning.items()},
        **variant.training,
    }


def tuned_name(variant: str, budget: float) -> str:
    return f"{variant} at {budget:.1%}"
