"""transformers' `Trainer` with this package's losses: for notebooks, hyperparameter search, DeepSpeed and everything
else that works with it. The commands use our own loop, `training.loop`, instead."""

import copy
import inspect
import logging
import shutil
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
from hf_vssm_prune.hub.model_card import ModelCardInfo, TrainingRecipe
from hf_vssm_prune.hub.saving import CODE_LICENSE, NOTICE, has_adapters, write_card
from hf_vssm_prune.label_maps import names_by_id
from hf_vssm_prune.modeling_common import is_pruning_parameter
from hf_vssm_prune.pruned_heads import PrunedHead
from hf_vssm_prune.training.arguments import ElasticArguments
from hf_vssm_prune.training.batch_norm import freeze_batch_norm
from hf_vssm_prune.training.cards import datasets_on_hub, model_on_hub
from hf_vssm_prune.training.distribution import share_buffers
from hf_vssm_prune.training.elastic import add_schedules, draw_schedule, what_is_pruned
from hf_vssm_prune.training.losses import LossWeights, run_teacher, training_loss
from hf_vssm_prune.training.models import check_states, match_teacher
from hf_vssm_prune.training.optimization import decays, parameter_groups
from hf_vssm_prune.training.sampling import StreamSampler
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.task import PrunableModel, Task, predict


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
        teacher: the dense model, with the model's labels in the same order if there is distillation; default: a copy of
            the model without pruning, if the losses need one.
        losses: weights of distillation and alignment; default: 1 for each. See `training.losses`.
        task: computes the loss of a batch and mixes its images (mixup, CutMix); default: classification of images (or
            of videos, for a video model) without mixing, with label smoothing by the arguments'
            `label_smoothing_factor`. A model with a head on a backbone needs a task; a detector also needs
            `data_collator=task.collate`.
        elastic_budgets: fractions of FLOPs to remove. Each step uses one of them, drawn at random (0 means dense); the
            model's own schedule is then used for evaluation only.
        layer_decay: factor by which the learning rate decreases from each layer to the previous one. It needs an
            optimizer that is created here and takes parameter groups.

    Raises:
        ValueError: a layer to align does not exist, a budget cannot be met, the losses cannot compare the teacher with
            the model, labels would be smoothed twice, there is no task for a model with a head or for a classifier
            with another `problem_type` than one label per image, or an option is not supported.
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
        self._batch_of_step = 0
        self._stream_sampler: StreamSampler | None = None
        super().__init__(model, args, **options)
        self.add_callback(_PlaceCallback(self))
        if layer_decay is not None and self.optimizer is not None:
            raise ValueError("layer_decay and `optimizers` cannot be combined: give one of them.")
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
        if self.model.config.problem_type not in (None, "single_label_classification"):
            raise ValueError(
                f"`problem_type` of the model is {self.model.config.problem_type!r}, but the default task is for one "
                "label per image or video: give a `task` with another loss."
            )
        task = TASKS[f"{self.model.config.modality}-classification"]
        return task(task.training_arguments(mixup=0, cutmix=0, smoothing=self.args.label_smoothing_factor))

    def _prepare_teacher(self, teacher: PrunableModel | None) -> PrunableModel:
        if teacher is None:
            teacher = copy.deepcopy(self.model)
            teacher.set_token_pruning(None)
        else:
            self._check_teacher(teacher)
        return teacher.to(self.args.device).eval().requires_grad_(False)

    def _check_teacher(self, teacher: PrunableModel) -> None:
        student, dense = pruned_config(self.model.config), pruned_config(teacher.config) or teacher.config
        if teacher is self.model or getattr(dense, "token_pruning", None) is not None:
            raise ValueError("The teacher must be another model, without pruning: load it with `token_pruning=None`.")
        name = teacher.config._name_or_path or type(teacher).__name__
        names, own_names = (names_by_id(model.config.id2label) for model in (teacher, self.model))
        match = match_teacher(name, names, own_names, self.losses)
        if match is not None and match.ids != sorted(match.ids):
            raise ValueError(f"The teacher {name} has the model's labels in another order: {names}, not {own_names}.")
        check_states(name, dense, student, self.losses, "patch_spacing" if has_head(self.model.config) else "grid_size")

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
            has_views = inputs["pixel_values"].ndim > len(pruned_config(self.model.config).input_size) + 2
            outputs = predict(self.task, model, inputs) if has_views else model(**self.task.inputs(inputs))
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
        with self.accelerator.autocast():  # a prepared model does this itself
            teacher = None if self.teacher is None else run_teacher(self.teacher, keywords)
        terms = training_loss(self.task, outputs, teacher, batch, self.losses, layers, block_keep_ratio)
        loss = terms.pop("loss")
        for name, value in terms.items():
            self._terms[name].append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Evaluates the batch norm statistics that are saved: those of the main process."""
        if all(buffer.device.type == self.args.device.type for buffer in self.model.buffers()):
            share_buffers(self.model)
        return super().evaluation_loop(*arguments, **options)

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
        place = [self.args.seed, self.state.global_step, self._batch_of_step, self.args.process_index]
        self._batch_of_step += 1
        return np.random.default_rng(place)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss term to the training logs."""
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean").item()
            self._terms.clear()
        super().log(logs, start_time)

    # The data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        stream = getattr(self.train_dataset if train_dataset is None else train_dataset, "stream", None)
        if stream is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._stream_sampler = StreamSampler(stream, seed)
        return self._stream_sampler

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
        given = self.optimizer_cls_and_kwargs
        kind, keywords = self.get_optimizer_cls_and_kwargs(self.args, whole) if given is None else given
        if not issubclass(kind, torch.optim.Optimizer) or {"params", "model", "optimizer_dict"} & keywords.keys():
            raise ValueError(f"layer_decay cannot be combined with {kind.__name__}, which groups parameters itself.")
        learning_rate = keywords.get("lr", self.args.learning_rate)
        groups = parameter_groups(whole, learning_rate, self.args.weight_decay, self.layer_decay)
        self.optimizer = kind(groups, **keywords)
        return self.optimizer

    # The Hub

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Also pushes the model's code, to which the configuration refers."""
        if self.is_world_process_zero():
            for file in Path(checkpoint_folder).iterdir():
                if file.suffix == ".py" or file.name in (CODE_LICENSE.name, NOTICE):
                    shutil.copy(file, self.args.output_dir or ".")
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Writes this package's model card and notices into the output folder: how the model is pruned and trained.

        Args:
            arguments, options: as for transformers' method. `model_name` (default: the folder's name), `license`,
                `tags`, and, if they are on the Hub, `finetuned_from` (default: where the model was loaded from) and
                `dataset` are used.
        """
        model = self.accelerator.unwrap_model(self.model)
        if has_adapters(model) or not isinstance(model, VisionMamba | PrunedHead):  # adapters are saved without a model
            return super().create_model_card(*arguments, **options)
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        given = inspect.signature(super().create_model_card).bind(*arguments, **options).arguments
        model_name, dataset, tags = (given.get(name) for name in ("model_name", "dataset", "tags"))
        info = ModelCardInfo(
            name=model_name or folder.absolute().name,
            model_id=self.hub_model_id or model_name,
            license=given.get("license"),
            base_model=model_on_hub(given.get("finetuned_from") or self.model.config._name_or_path or None),
            datasets=datasets_on_hub([dataset] if isinstance(dataset, str) else dataset or []),
            tags=[tags] if isinstance(tags, str) else tags or [],
            training=TrainingRecipe(
                description="Fine-tuned with `hf_vssm_prune.training.TokenPruningTrainer`.",
                hyperparameters=self._hyperparameters(),
            ),
        )
        write_card(model, folder, self.processing_class, info)  # type: ignore[arg-type]

    def _hyperparameters(self) -> dict[str, Any]:
        arguments = self.args
        names = [
            "max_steps" if arguments.max_steps > 0 else "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "weight_decay",
            "label_smoothing_factor",
            "seed",
        ]
        values = {name: getattr(arguments, name) for name in names}
        values["lr_scheduler_type"] = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
        values["layer_decay"] = self.layer_decay
        if self.elastic_schedules:
            values["elastic_budgets"] = self.elastic.elastic_budgets
        if self.losses.needs_teacher:
            values |= asdict(self.losses)
        return {name: value for name, value in values.items() if value is not None}


class _PlaceCallback(transformers.TrainerCallback):
    """Tells the trainer and the training items the place in the run, on which their randomness depends.

    Accelerate's data loaders tell the items the epoch, too, but not with several processes or when a run is resumed
    within an epoch.
    """

    def __init__(self, trainer: TokenPruningTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.trainer._terms.clear()  # those of an earlier run since its last log

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **options: Any) -> None:
        epoch = int(state.epoch or 0)
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(epoch)
        if self.trainer._stream_sampler is not None:
            self.trainer._stream_sampler.start_at(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.trainer._batch_of_step = 0


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
