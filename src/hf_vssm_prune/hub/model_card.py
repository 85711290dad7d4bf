"""Model cards: what a checkpoint is, how to use it, how it was pruned, and how accurate it is.

Parameters, FLOPs and the pruning schedule are taken from the model. Everything else comes from a `ModelCardInfo`;
sections without information are left out.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.image_processing_base import ImageProcessingMixin

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head, pruned_config
from hf_vssm_prune.families import VisionMamba
from hf_vssm_prune.flops import tokens_per_layer
from hf_vssm_prune.flops_of_heads import count_flops
from hf_vssm_prune.heads import auto_class_of
from hf_vssm_prune.hub.published_results import published_model
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.publication import DYVM_PAPER, NOTES_ON_SOURCES, TOP_PAPER, Paper, PublishedModel


# Of what a card shows, by the names that the Hub has for metrics. Others are shown by those.
METRIC_NAMES = {
    "accuracy": "Top-1 accuracy",
    "top_5_accuracy": "Top-5 accuracy",
    "mean_iou": "Mean IoU",
    "mean_accuracy": "Mean accuracy of classes",
    "overall_accuracy": "Pixel accuracy",
    "map": "Mean average precision (COCO)",
    "map_50": "Mean average precision at IoU 0.5",
    "map_75": "Mean average precision at IoU 0.75",
}

# The metrics of an evaluation that a card shows.
SHOWN_METRICS = ("top1", "top5", *METRIC_NAMES)

# ---- What is known about a checkpoint ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """The results of one variant of the model on the evaluation images.

    Args:
        name: name of the variant, for instance "dense" or "pruned, fine-tuned".
        top1: accuracy in percent.
        top5: accuracy in percent; None if it was not measured.
        images_per_second: None if it was not measured.
        pruned: whether this model's pruning schedule was used; this determines which FLOPs are shown.
        others: metrics of other tasks than classification, in percent, by their names on the Hub.
        multiply_adds: those of the published convention for one image. None: those of this model, pruned or dense. A
            variant with another method or another image size has its own.
    """

    name: str
    top1: float | None = None
    top5: float | None = None
    images_per_second: float | None = None
    pruned: bool = False
    others: Mapping[str, float] = field(default_factory=dict)
    multiply_adds: int | None = None

    def __post_init__(self) -> None:
        for metric, value in {"top1": self.top1, "top5": self.top5, **self.others}.items():
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"`{metric}` of {self.name!r} is {value}; it must be a percentage from 0 to 100.")
        if self.images_per_second is not None and not self.images_per_second > 0:
            raise ValueError(f"`images_per_second` of {self.name!r} is {self.images_per_second}; it must be above 0.")

    @classmethod
    def of_metrics(cls, name: str, metrics: Mapping[str, float], **fields: Any) -> "Measurement":
        """Creates it from a task's metrics by name, fractions from 0 to 1: from top-1 and top-5 accuracy if they are
        among them, otherwise from all of them. `fields`: the other fields."""
        percent = {metric: 100 * value for metric, value in metrics.items()}
        if "top1" in percent:
            return cls(name, percent["top1"], percent["top5"], **fields)
        return cls(name, others=percent, **fields)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metrics in percent, by their names on the Hub; None: not measured."""
        return dict(self.others) or {"accuracy": self.top1, "top_5_accuracy": self.top5}


@dataclass(frozen=True)
class Evaluation:
    """The results on one data set.

    Args:
        dataset_name: display name, for instance "Fashion-MNIST".
        dataset_id: id on the Hub, or a short name if it is not on the Hub.
        split: split of the data set.
        num_images: number of classified images.
        this_model: the checkpoint of the card.
        others: models that it is compared with, for instance the dense model.
        hardware: hardware on which images per second were measured.
    """

    dataset_name: str
    dataset_id: str
    split: str
    num_images: int
    this_model: Measurement
    others: Sequence[Measurement] = ()
    hardware: str | None = None

    @classmethod
    def from_results(cls, file: str | os.PathLike[str], **about: Any) -> "Evaluation":
        """Reads what `hf-vssm-prune evaluate` wrote with `--json` or `--save_results`. The pruned model is taken as the
        card's model, or the dense one if there is no other.

        Args:
            file: the JSON.
            about: the other fields except `num_images`.

        Raises:
            ValueError: the file was not written by that command.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            # `evaluate.save` adds names such as _timestamp.
            results = {name: result for name, result in content.items() if not name.startswith("_")}
            for result in results.values():
                if (older := result.get("accuracy")) is not None:  # of version 0.1
                    result |= {"metrics": older, "num_images": older["num_images"]}
            measured = {
                name: Measurement.of_metrics(
                    name,
                    {metric: result["metrics"][metric] for metric in result["metrics"] if metric in SHOWN_METRICS},
                    images_per_second=result["images_per_second"],
                    pruned=name == "pruned",
                    multiply_adds=_multiply_adds(result),
                )
                for name, result in results.items()
            }
            this_model = measured.pop("pruned" if "pruned" in measured else "dense")
            num_images = results[this_model.name]["num_images"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} was not written by `hf-vssm-prune evaluate --json`: {error!r}") from error
        return cls(num_images=num_images, this_model=this_model, others=list(measured.values()), **about)


def _multiply_adds(result: Mapping[str, Any]) -> int | None:
    gflops = result.get("gflops_published")
    return None if gflops is None else round(1e9 * gflops)


@dataclass(frozen=True)
class TrainingRecipe:
    """How the checkpoint was trained.

    Args:
        command: the command line that trained it; None if it was trained from Python.
        description: how it was trained, in a sentence or two.
        hyperparameters: by name.
    """

    command: str | None = None
    description: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.hyperparameters, Mapping):
            raise ValueError(
                f"`hyperparameters` of a model card are {self.hyperparameters!r}; it must be a dict of names and "
                "values."
            )


@dataclass(frozen=True)
class ModelCardInfo:
    """The information for a model card that cannot be read from the model itself. None or empty fields are left out.

    Args:
        name: name of the model, used as the card's title.
        model_id: what the example code loads: `organisation/name` on the Hub, or a folder. None: the folder that the
            model is saved to.
        summary: what the model is for, a sentence or two.
        license: licence of the weights, as an identifier of the Hub such as "apache-2.0".
        license_notice: notices that the weights' licence requires, and the licences of the data.
        base_model: Hub id of the checkpoint that was fine-tuned or pruned.
        original_weights: where the weights were first published.
        datasets: Hub ids of the data sets that the model was trained on.
        training: how it was trained.
        evaluation: what was measured.
        picture: an image file that shows the kept tokens; it is copied to the model's folder.
        limits: what the model cannot do or was not tested for, one sentence each.
        tags: additional tags for searching.
    """

    name: str
    model_id: str | None = None
    summary: str | None = None
    license: str | None = None
    license_notice: str | None = None
    base_model: str | None = None
    original_weights: str | None = None
    datasets: Sequence[str] = ()
    training: TrainingRecipe | None = None
    evaluation: Evaluation | None = None
    picture: str | os.PathLike[str] | None = None
    limits: Sequence[str] = ()
    tags: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("`name` of a model card is empty; the model needs a title.")
        for name in ("datasets", "limits", "tags"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"`{name}` of a model card is {value!r}; it must be a list.")
        if self.picture is not None and not Path(self.picture).is_file():
            raise FileNotFoundError(f"`picture` of the model card is missing: there is no file {self.picture}.")


# ---- The card ----------------------------------------------------------------------------------------------------

TEMPLATE = Path(__file__).with_name("model_card_template.md")


def create_model_card(
    model: VisionMamba, info: ModelCardInfo, image_processor: ImageProcessingMixin | None = None
) -> ModelCard:
    """Creates the model card for a model of this package.

    Args:
        model: provides parameters, FLOPs, image size and pruning schedule.
        info: everything else.
        image_processor: the image processor that is saved with the model. None: the card has no code that needs one.

    Raises:
        ValueError: the evaluation is of the pruned model, and the given one is dense, or the reverse.
    """
    config, flops = pruned_config(model.config), count_flops(model.config)
    _check_evaluation(info.evaluation, is_pruned=config.token_pruning is not None)
    published = published_model(model.config) if _is_classifier(model) or has_head(model.config) else None
    return ModelCard.from_template(
        _metadata(model, info, has_image_processor=image_processor is not None),
        template_path=str(TEMPLATE),
        info=info,
        config=config,
        num_parameters=model.num_parameters(),
        flops=flops,
        format_flops=format_flops,
        cell=_cell,
        is_classifier=_is_classifier(model),
        head=_Head.of(model),
        num_labels=model.config.num_labels,
        metric_names=_column_names(info),
        has_image_processor=image_processor is not None,
        model_id=info.model_id or info.name,
        picture=None if info.picture is None else quote(Path(info.picture).name),
        stages=_stages(config),
        measurements=[] if info.evaluation is None else [*info.evaluation.others, info.evaluation.this_model],
        published=published,
        notes_on_sources=[] if published is None else _notes_on_sources(published),
        papers=_papers(config),
        method_is_published=_method_paper(config) is not None,
    )


def _check_evaluation(evaluation: Evaluation | None, is_pruned: bool) -> None:
    if evaluation is not None and evaluation.this_model.pruned != is_pruned:
        kinds = ("dense", "pruned")
        raise ValueError(
            f"The results of the card's model, {evaluation.this_model.name!r}, are those of a {kinds[not is_pruned]} "
            f"model, but the model is {kinds[is_pruned]}: evaluate it with the schedule with which it is saved."
        )


def _column_names(info: ModelCardInfo) -> dict[str, str]:
    """The headings of an evaluation's metrics, by the names that the Hub has for them."""
    if info.evaluation is None:
        return {}
    short = {"accuracy": "top-1", "top_5_accuracy": "top-5"}
    return {name: short.get(name) or METRIC_NAMES.get(name, name) for name in info.evaluation.this_model.metrics}


def _cell(value: Any) -> str:
    """A value as the text of a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _notes_on_sources(published: PublishedModel) -> list[str]:
    sources = dict.fromkeys(result.source for result in published.results)
    return [NOTES_ON_SOURCES[source] for source in sources if source in NOTES_ON_SOURCES]


def _papers(config: VisionMambaConfig) -> list[Paper]:
    """Of the family, the pruning method and the selection of blocks; our own methods follow the paper of `top`."""
    if config.token_pruning is None:
        return [config.paper]
    of_blocks = [DYVM_PAPER] if "block_keep_ratio" in config.token_pruning else []
    return list(dict.fromkeys([config.paper, _method_paper(config) or TOP_PAPER, *of_blocks]))


def _method_paper(config: VisionMambaConfig) -> Paper | None:
    return None if config.token_pruning is None else METHODS[config.token_pruning["method"]].paper


def format_flops(count: int) -> str:
    """Formats a number of multiply-adds: 14.41 G, 86.3 M."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _is_classifier(model: VisionMamba) -> bool:
    return type(model).__name__.endswith("Classification")


@dataclass(frozen=True)
class _Head:
    """The head on a backbone.

    Attributes:
        kind: its model type.
        auto_class: transformers' Auto class of such models, by name.
        pipeline: name of transformers' pipeline for it, which is also the task on the Hub.
        logits: the entry of its output that has the scores of pixels, queries or masks.
    """

    kind: str
    auto_class: str
    pipeline: str
    logits: str

    @classmethod
    def of(cls, model: Any) -> "_Head | None":
        if not has_head(model.config):
            return None
        auto_class = auto_class_of(model.config).__name__
        return cls(
            model.config.model_type,
            auto_class,
            "object-detection" if auto_class.endswith("ObjectDetection") else "image-segmentation",
            "masks_queries_logits" if auto_class.endswith("UniversalSegmentation") else "logits",
        )


@dataclass(frozen=True)
class _Stage:
    """One stage of a pruning schedule: at the input of `layer`, `num_kept` of `num_tokens` patch tokens are kept."""

    layer: int
    keep_ratio: float
    num_tokens: int
    num_kept: int


def _stages(config: VisionMambaConfig) -> list[_Stage]:
    if config.token_pruning is None:
        return []
    tokens = tokens_per_layer(math.prod(config.grid_size), config.num_hidden_layers, config.token_pruning)
    schedule = zip(config.token_pruning["layers"], config.token_pruning["keep_ratios"], strict=True)
    return [_Stage(layer, keep_ratio, tokens[layer - 1], tokens[layer]) for layer, keep_ratio in schedule]


def _metadata(model: VisionMamba, info: ModelCardInfo, has_image_processor: bool) -> ModelCardData:
    is_classifier, head, config = _is_classifier(model), _Head.of(model), pruned_config(model.config)
    kinds = [config.model_type, model.config.model_type]
    pruning_tags = ["token-pruning"] if config.token_pruning else []
    own_tags = model.model_tags or []  # from transformers' `add_model_tags`
    task = f"{config.modality}-classification" if is_classifier else "image-feature-extraction"
    if head is not None:
        task = head.pipeline
    # The pipelines make images RGB. For features of videos, the Hub has no task.
    has_pipeline = config.num_channels == 3 and (is_classifier or config.modality == "image")
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task if has_pipeline and (has_image_processor or not is_classifier) else None,
        license=info.license,
        base_model=info.base_model,
        base_model_relation="finetune" if info.base_model else None,
        datasets=list(info.datasets) or None,
        metrics=[next(iter(info.evaluation.this_model.metrics))] if info.evaluation else None,
        tags=list(dict.fromkeys([*kinds, "vision", "mamba", *pruning_tags, "custom_code", *info.tags, *own_tags])),
        **_model_index(info, task),
    )


def _model_index(info: ModelCardInfo, task: str) -> dict[str, Any]:
    if info.evaluation is None:
        return {}
    evaluation = info.evaluation
    measured = evaluation.this_model.metrics
    results = [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=evaluation.dataset_id,
            dataset_name=evaluation.dataset_name,
            dataset_split=evaluation.split,
            metric_type=metric,
            metric_name=METRIC_NAMES.get(metric, metric),
            metric_value=round(percent / 100, 6),
        )
        for metric, percent in measured.items()
        if percent is not None
    ]
    return {"model_name": info.name, "eval_results": results}
