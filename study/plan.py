"""The plan of a study: its file, and the list of pieces derived from it."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

from hf_vssm_prune.pruning_methods import PAPERS_METHOD
from hf_vssm_prune.training.recipes import read_recipe


# From the keys of `token_pruning` to the options of scripts/finetune.py.
PRUNING_OPTIONS = {
    "layers": "prune_layers",
    "method": "prune_method",
    "alignment": "prune_alignment",
    "importance": "importance",
    "block_keep_ratio": "block_keep_ratio",
}
LOSSES_OF_A_TEACHER = ("kd_weight", "alignment_weight")


@dataclass(frozen=True)
class Variant:
    """A combination of pruning and fine-tuning options.

    Attributes:
        pruning: `layers`, `method`, `alignment`, `importance` and `block_keep_ratio` of `token_pruning`; defaults are
            used for missing ones.
        training: options of scripts/finetune.py that override those of the study.
    """

    pruning: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """The content of a study's file.

    Attributes:
        seeds: each piece is run with each of these.
        budgets: fractions of FLOPs to remove.
        main_budget: the budget with which all variants are compared.
        max_eval_samples: number of images drawn for each evaluation, depending on the seed.
        datasets: for each name, `dataset_name`, for a data set on the Hub also its `dataset_config_name` if it has
            several configurations, and options of scripts/train.py in `dense`.
        families: for each name, options of scripts/train.py; with `model_name_or_path`, dense models start from
            existing weights.
        training, dense, finetuning: options of all training pieces, of scripts/train.py, and of scripts/finetune.py.
        smaller: dense models to compare with. A name is a number and what it counts ("96 pixels"), and the values are
            options of scripts/train.py, such as `image_size`. Each model continues from the dense one, for as long as
            the pruned ones; or from its own `model_name_or_path`, a mapping from families to weights, for only these
            families.
        elastic: the `variant` that is trained for all budgets at once, and options that override its own.
        variants: variants by name; the first one is the baseline.
        more_variants: further variants, which are run after everything else.
        every_budget: names of the variants that are fine-tuned for every budget.
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
    smaller: dict[str, dict[str, Any]]
    elastic: dict[str, Any]
    variants: dict[str, Variant]
    more_variants: dict[str, Variant]
    every_budget: list[str]

    @property
    def trained(self) -> dict[str, Any]:
        """Options of all training pieces."""
        return {"max_eval_samples": self.max_eval_samples, **self.training}

    @property
    def baseline(self) -> str:
        return next(iter(self.variants))

    @property
    def all_variants(self) -> dict[str, Variant]:
        return {**self.variants, **self.more_variants}

    def smaller_models(self, family: str) -> dict[str, dict[str, Any]]:
        """The options of scripts/train.py for a family's smaller dense models, by name."""
        models = {}
        for name, options in self.smaller.items():
            own = options.get("model_name_or_path")
            if own is None:
                models[name] = options
            elif family in own:
                models[name] = {**options, "model_name_or_path": own[family]}
        return models


def read_study(file: Path) -> Study:
    """Reads a study's file. If it has a `base`, missing entries are taken from that file in the same folder.

    Raises:
        ValueError: the file is missing, or is not a study; the message says what is wrong.
    """
    content = read_recipe(file)
    if (base := content.pop("base", None)) is not None:
        content = {**read_recipe(file.parent / base), **content}
    names = [each.name for each in fields(Study)]
    if sorted(content) != sorted(names):
        raise ValueError(f"{file} has {sorted(content)}; a study has exactly {sorted(names)}.")
    for name, hint in get_type_hints(Study).items():
        kind = get_origin(hint) or hint
        if not isinstance(content[name], (int, float) if kind is float else kind):
            raise ValueError(f"{file}: {name} is {content[name]!r}; it must be a {kind.__name__}.")
    for name in ("datasets", "families", "smaller", "variants", "more_variants"):
        if empty := [entry for entry, parts in content[name].items() if not isinstance(parts, dict)]:
            raise ValueError(f"{file}: {name} has {empty} without options; without any, write {{}}.")
    for name, parts in content["datasets"].items():
        if sorted({*parts} - {"dataset_config_name"}) != ["dataset_name", "dense"]:
            raise ValueError(
                f"{file}: data set {name!r} has {sorted(parts)}; it needs 'dataset_name' and 'dense', and may have "
                "'dataset_config_name'."
            )
    variants, more_variants = (
        {name: _read_variant(file, name, parts) for name, parts in content[key].items()}
        for key in ("variants", "more_variants")
    )
    if twice := sorted(set(variants) & set(more_variants)):
        raise ValueError(f"{file}: {twice} are in both variants and more_variants.")
    if unknown := sorted(set(content["every_budget"]) - set(variants)):
        raise ValueError(f"{file}: every_budget has {unknown}; the variants are {sorted(variants)}.")
    if content["elastic"].get("variant") not in variants:
        raise ValueError(f"{file}: elastic needs a 'variant', one of {sorted(variants)}.")
    for name, options in content["smaller"].items():
        _check_smaller(file, name, options, content["families"])
    if content["main_budget"] not in content["budgets"]:
        raise ValueError(
            f"{file}: main_budget is {content['main_budget']}; it must be one of the budgets {content['budgets']}."
        )
    return Study(**{**content, "variants": variants, "more_variants": more_variants})


def _check_smaller(file: Path, name: str, options: dict[str, Any], families: dict[str, Any]) -> None:
    if not re.fullmatch(r"\d+ \w+", name):
        raise ValueError(f"{file}: smaller has {name!r}; a name is a number and what it counts, like '96 pixels'.")
    own = options.get("model_name_or_path", {})
    if not isinstance(own, dict):
        raise ValueError(f"{file}: smaller {name!r} has the weights {own!r}; they must be given by family.")
    if unknown := sorted(set(own) - set(families)):
        raise ValueError(f"{file}: smaller {name!r} has weights of {unknown}; the families are {sorted(families)}.")


def _read_variant(file: Path, name: str, parts: dict[str, Any]) -> Variant:
    if unknown := sorted(set(parts) - {"pruning", "training"}):
        raise ValueError(f"{file}: variant {name!r} has {unknown}; allowed are 'pruning' and 'training'.")
    variant = Variant(**parts)
    if unknown := sorted(set(variant.pruning) - set(PRUNING_OPTIONS)):
        raise ValueError(
            f"{file}: variant {name!r} has the pruning options {unknown}; allowed are {sorted(PRUNING_OPTIONS)}."
        )
    return variant


@dataclass(frozen=True)
class Piece:
    """One run of a script.

    Attributes:
        script: "train", "finetune" or "compare_methods".
        dataset, family, seed: data set, family and seed.
        name: its name, unique within the same data set, family and seed.
        options: options of the script, without paths.
        start: name of the piece from whose weights it starts.
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
    """A piece without data set, family and seed; for its fields, see `Piece`."""

    script: str
    start: str | None
    options: dict[str, Any]


def list_pieces(study: Study) -> list[Piece]:
    """All pieces in the order in which they are run. Each comes after the piece from which it starts, and pieces that
    are compared over seeds are next to one another."""
    return [
        Piece(script, dataset, family, seed, name, options, start)
        for dataset in study.datasets
        for family in study.families
        for name, (script, start, options) in _templates(study, dataset, family).items()
        for seed in study.seeds
    ]


def _templates(study: Study, dataset: str, family: str) -> dict[str, Template]:
    """The pieces for a data set and a family, by name."""
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
        **{
            smaller_name(name): Template(
                "train",
                None if "model_name_or_path" in options else "dense",
                {**study.trained, **study.finetuning, **options},
            )
            for name, options in study.smaller_models(family).items()
        },
        **_tuned(study, at_other_budgets),
        "elastic": Template("finetune", "dense", _elastic_options(study)),
        "elastic compared": Template(
            "compare_methods", "elastic", {**evaluated, "schedules": _elastic_schedules(study)}
        ),
        **_tuned(study, [(name, study.main_budget) for name in study.more_variants]),
    }


def _tuned(study: Study, choices: list[tuple[str, float]]) -> dict[str, Template]:
    """Templates for variants and budgets."""
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


def with_method(schedule: dict[str, Any]) -> dict[str, Any]:
    """A comparison's schedule with its method. In a study, the default is the paper's method; elsewhere, it is that of
    the model, or the one recommended by the study."""
    return {"method": PAPERS_METHOD, **schedule}


def _untrained_schedules(study: Study) -> dict[str, dict[str, Any]]:
    """All different pruning schedules, each under the name of the first variant that uses it."""
    schedules: dict[str, dict[str, Any]] = {}
    for name, variant in study.all_variants.items():
        for budget in study.budgets if name in study.every_budget else [study.main_budget]:
            schedule = {"flops_reduction": budget, **variant.pruning}
            if schedule not in schedules.values():
                schedules[tuned_name(name, budget)] = schedule
    return schedules


def _tuned_options(study: Study, name: str, budget: float) -> dict[str, Any]:
    """The options of scripts/finetune.py, without a teacher unless the variant has one."""
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


def smaller_name(name: str) -> str:
    return f"dense, {name}"
