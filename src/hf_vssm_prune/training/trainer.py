"""transformers' `Trainer` with this package's losses: for notebooks, hyperparameter search, DeepSpeed and everything
else that works with it. The commands use our own loop, `training.loop`, instead."""

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from hf_vssm_prune.configuration_common import has_head, pruned_config
from hf_vssm_prune.families import VisionMamba
from hf_vssm_prune.hub.model_card import ModelCardInfo, TrainingRecipe, create_model_card
from hf_vssm_prune.hub.saving import CARD
from hf_vssm_prune.modeling_common import is_pruning_parameter
from hf_vssm_prune.pruned_heads import PrunedHead
from hf_vssm_prune.training.arguments import ElasticArguments
from hf_vssm_prune.training.batch_norm import freeze_batch_norm
from hf_vssm_prune.training.elastic import add_schedules, draw_schedule, what_is_pruned
from hf_vssm_prune.training.losses import LossWeights, run_teacher, training_loss
from hf_vssm_prune.training.optimization import decays, parameter_groups
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.task import PrunableModel, Task


logger = logging.getLogger(__name__)


class TokenPruningTrainer(transformers.Trainer):
    """Fine-tunes a model of this package, pruned or dense, with a dense teacher.

    Everything not listed here works as in transformers' `Trainer`, including metrics, saving and resuming. Pass the
    image processor as `processing_class`. A `datasets.Dataset` with a transform needs `remove_unused_columns=False`.
    When adapters (PEFT) are trained, batch norm statistics are frozen, because they are not saved with adapters. For
    the same reason, parameters of pruning are then frozen, except those in the adapters' `modules_to_save`.

    Args:
        model, args, options: as for `Trainer`, except that `compute_loss_func` is not supported. A model with a head on
            a backbone must have been passed through `prunable`.
        teacher: the dense model; default: a copy of the model without pruning, if the losses need one.
        losses: weights of distillation and alignment; default: 1 for each. See `training.losses`.
        task: computes the loss of a batch and mixes its images (mixup, CutMix); default: classification of images (or
            of videos, for a video model) without mixing, with label smoothing by the arguments'
            `label_smoothing_factor`. A model with a head on a backbone needs a task.
        elastic_budgets: fractions of FLOPs to remove. Each step uses one of them, drawn at random (0 means dense); the
            model's own schedule is then used for evaluation only.
        layer_decay: factor by which the learning rate decreases from each layer to the previous one.

    Raises:
        ValueError: a layer to align does not exist, a budget cannot be met, labels would be smoothed twice, a model
            with a head has no task, or there is a `compute_loss_func`.
    """

    model: PrunableModel
    processing_class: Any

    def __init__(
        self,
        model: PrunableModel | None = None,
        args: transformers.TrainingArguments | None = None,
        *,
        teacher: PrunableModel | None = None,
        losses: LossWeights | None = None,
        task: Task | None = None,
        elastic_budgets: Sequence[float] = (),
        layer_decay: float | None = None,
        **options: Any,
    ) -> None:
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported, because the loss is that of `losses` and `task`.")
        self.losses = LossWeights(kd_weight=1.0, alignment_weight=1.0) if losses is None else losses
        self.elastic = ElasticArguments(list(elastic_budgets))
        self.layer_decay = layer_decay
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._step, self._batch_of_step = -1, 0
        super().__init__(model, args, **options)
        if model is not None:
            self._add_schedules(self.model)
        self.task = self._default_task() if task is None else task
        if task is not None and self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor and a task that smooths labels cannot be combined: give one.")
        self.losses.check_layers(pruned_config(self.model.config).num_hidden_layers)
        # Our loss is a mean over the batch, whether or not the model's own loss accepts a number of items.
        self.model_accepts_loss_kwargs = False
        self.teacher = self._prepare_teacher(teacher) if self.losses.needs_teacher else None

    def _default_task(self) -> Task:
        if has_head(self.model.config):
            raise ValueError(
                f"{type(self.model).__name__} is not a classifier: give a `task`, such as `SemanticSegmentation()`."
            )
        task = TASKS[f"{self.model.config.modality}-classification"]
        return task(task.training_arguments(mixup=0, cutmix=0, smoothing=self.args.label_smoothing_factor))

    def _prepare_teacher(self, teacher: PrunableModel | None) -> PrunableModel:
        if teacher is None:
            teacher = copy.deepcopy(self.model)
            teacher.set_token_pruning(None)
        return teacher.to(self.args.device).eval().requires_grad_(False)

    def call_model_init(self, trial: Any = None) -> PrunableModel:
        """A new model for each trial of a hyperparameter search."""
        model = super().call_model_init(trial)
        self._add_schedules(model)
        return model

    def _add_schedules(self, model: PrunableModel) -> None:
        self.elastic_schedules = add_schedules(model, self.elastic)
        if getattr(model, "peft_config", None):
            _freeze_unsaved_parameters(model)

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the loss from `training.losses`; in evaluation, only the task's own terms."""
        if not model.training:
            outputs = model(**self.task.inputs(inputs))
            loss = torch.stack(list(self.task.losses(outputs, inputs).values())).sum()
            return (loss, outputs) if return_outputs else loss
        if getattr(self.model, "peft_config", None):
            # Adapters are saved without these statistics, which belong to the model and therefore must not change.
            freeze_batch_norm(self.model)
        config, seed = self.model.config, self.args.seed
        batch = self.task.mix(dict(inputs), config, self._generator_of_batch())
        schedule, drawn = pruned_config(config).token_pruning, {}
        if self.elastic_schedules:
            schedule = draw_schedule(self.elastic_schedules, seed, 0, self.state.global_step)
            drawn = {"token_pruning": schedule}
        layers, block_keep_ratio = what_is_pruned(schedule)
        keywords = self.task.inputs(batch) | self.losses.model_options(block_keep_ratio)
        outputs = model(**keywords, **drawn)
        teacher = None
        if self.teacher is not None:
            with self.accelerator.autocast():  # the student's forward pass has its own
                teacher = run_teacher(self.teacher, keywords)
        terms = training_loss(self.task, outputs, teacher, batch, self.losses, layers, block_keep_ratio)
        loss = terms.pop("loss")
        for name, value in terms.items():
            self._terms[name].append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Leaves the results of pruning out of the predictions: the configuration of a model with a head does not name
        them."""
        if ignore_keys is None:
            config = self.model.config
            own = getattr(config, "keys_to_ignore_at_inference", ())
            ignore_keys = [*own, *pruned_config(config).keys_to_ignore_at_inference]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _generator_of_batch(self) -> np.random.Generator:
        """Depends only on the seed, the step, the batch within the step and the process, so that a run can be resumed
        exactly."""
        same_step = self.state.global_step == self._step
        self._step, self._batch_of_step = self.state.global_step, self._batch_of_step + 1 if same_step else 0
        return np.random.default_rng([self.args.seed, self._step, self._batch_of_step, self.args.process_index])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss term to the training logs."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean").item()
            self._terms.clear()
        super().log(logs, start_time)

    # The optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Excludes norms, biases, `A_log`, `D`, `direction_B`, the class token and embeddings of positions and times
        from weight decay."""
        return [name for name, parameter in model.named_parameters() if decays(name, parameter)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """transformers' optimizer; with `layer_decay`, the learning rate decreases towards the input."""
        if self.layer_decay is None or self.optimizer is not None:
            return super().create_optimizer(model)
        whole: Any = self.model if model is None else model
        groups = parameter_groups(whole, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
        optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = optimizer_class(groups, **keywords)
        return self.optimizer

    # The card

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Writes this package's model card into the output folder: how the model is pruned and how it was trained.

        Args:
            arguments, options: as for transformers' method. `model_name` (default: the folder's name), `license`,
                `tags` and `dataset` are used.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, VisionMamba | PrunedHead):  # a model with adapters has PEFT's card
            return super().create_model_card(*arguments, **options)
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "weight_decay", "seed")
        choices = {name: getattr(self.args, name) for name in names}
        model_name, dataset = options.get("model_name"), options.get("dataset")
        info = ModelCardInfo(
            name=model_name or folder.absolute().name,
            model_id=self.hub_model_id or model_name,
            license=options.get("license"),
            datasets=[dataset] if isinstance(dataset, str) else list(dataset or []),
            tags=[options["tags"]] if isinstance(options.get("tags"), str) else list(options.get("tags") or []),
            training=TrainingRecipe(
                description="Fine-tuned with `hf_vssm_prune.training.TokenPruningTrainer`.",
                hyperparameters={**choices, **asdict(self.losses)},
            ),
        )
        card = create_model_card(model, info, self.processing_class)  # type: ignore[arg-type]
        card.save(folder / CARD)


def _freeze_unsaved_parameters(model: nn.Module) -> None:
    """Freezes the parameters of pruning that are not saved with the adapters, and logs which of them pruning uses."""
    unsaved = {
        name: parameter
        for name, parameter in model.named_parameters()
        if is_pruning_parameter(name) and ".modules_to_save." not in name
    }
    used = [name for name, each in unsaved.items() if each.requires_grad and ".original_module." not in name]
    for parameter in unsaved.values():
        parameter.requires_grad_(False)
    if used:
        logger.warning(
            "%d parameters of pruning (%s, ...) are frozen, because adapters are saved without them: to train them, "
            "add their modules to the adapters' `modules_to_save`.",
            *(len(used), used[0]),
        )
