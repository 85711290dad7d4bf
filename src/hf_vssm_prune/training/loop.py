"""The training loop, based on Accelerate: dense training and pruned fine-tuning for any task, on one or more devices.

It offers more than the loops and checkpoints of transformers' `Trainer` and Accelerate: a run that is killed and
resumed ends with exactly the same weights as an uninterrupted run, its checkpoints can be resumed with another number
of processes and with DDP or FSDP2, and each step can be pruned with another budget. The images in a step do not depend
on the number of processes. All randomness depends only on the seed, the epoch, the batch and the process, and never on
earlier draws.
"""

import copy
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.flops_of_heads import count_flops
from hf_vssm_prune.training.arguments import ElasticArguments, OptimizationArguments, RunArguments, ScaleArguments
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.batch_norm import freeze_batch_norm, synchronize_batch_norm
from hf_vssm_prune.training.checkpoints import (
    RESULTS,
    TrainedParts,
    TrainingState,
    check_output_dir,
    only_run_in,
    save_checkpoint,
    say_last,
)
from hf_vssm_prune.training.data import ImageDatasets
from hf_vssm_prune.training.devices import launch_on_cores
from hf_vssm_prune.training.distribution import (
    choose_deterministic_algorithms,
    lost_processes_named,
    make_accelerator,
    reduce_unused_parameters,
    shard_by_layers,
    share_buffers,
    spread_frozen,
    whole_model_state,
)
from hf_vssm_prune.training.divergence import (
    ForwardWatch,
    TrainingDivergedError,
    describe_divergence,
    gradient_norms,
    weight_not_finite,
)
from hf_vssm_prune.training.elastic import add_schedules, draw_schedule, what_is_pruned
from hf_vssm_prune.training.ema import ExponentialMovingAverage
from hf_vssm_prune.training.evaluation import evaluate_model
from hf_vssm_prune.training.fingerprints import fingerprint_of_rows, fingerprint_of_weights
from hf_vssm_prune.training.interruption import StopRequest, TrainingInterruptedError
from hf_vssm_prune.training.labels import say_labels
from hf_vssm_prune.training.length import plan_steps
from hf_vssm_prune.training.loaders import make_loaders
from hf_vssm_prune.training.losses import LossWeights, run_teacher, training_loss
from hf_vssm_prune.training.memory import enable_activation_checkpointing
from hf_vssm_prune.training.optimization import make_optimizer
from hf_vssm_prune.training.resuming import resume_run
from hf_vssm_prune.training.run_log import LossWindow, RunLog
from hf_vssm_prune.training.run_settings import describe_config, describe_image_processor
from hf_vssm_prune.training.saved_models import SavedModels, WriteCard
from hf_vssm_prune.training.tasks.task import Batch, PrunableModel, Task, image_processor_of, leaves_parameters_idle


# Prefixes for the metrics of the weights and of their average.
PREFIX, EMA_PREFIX = "eval_", "eval_ema_"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: the options of the command, the task with its options, and the losses."""

    optimization: OptimizationArguments
    task: Task
    run: RunArguments
    losses: LossWeights = field(default_factory=LossWeights)
    elastic: ElasticArguments = field(default_factory=ElasticArguments)
    scale: ScaleArguments = field(default_factory=ScaleArguments)
    num_workers: int = 0


class Trainer:
    """Trains one model for the recipe's task, and saves it.

    After training, the output folder contains `best/` (the best weights, or the best average if that is better),
    `last/` and, if there is an average, `last_ema/`, all of which can be loaded with `from_pretrained`;
    `checkpoint-*/`; and `all_results.json`. For a pruned model, a picture drawn by the task is added to the card and
    sent to the trackers after each evaluation.

    Args:
        model: a model of the task, with its pruning schedule.
        datasets: images for training and evaluation.
        image_processor: prepares the images. The task may adapt it; it is saved with the model.
        recipe: how to train.
        teacher: the dense model, if the recipe's losses need one. It is frozen.
        write_card: creates the content of the model card from the metrics and the number of images; None: the card
            contains only information from the model itself.

    Raises:
        ValueError: the losses need a teacher and there is none, a layer to align does not exist, there are too few
            images for one full batch, or the checkpoint to resume from belongs to a different run.
        OSError: the output folder cannot be used; see `check_output_dir`.
    """

    def __init__(
        self,
        model: PrunableModel,
        datasets: ImageDatasets,
        image_processor: BaseImageProcessor,
        recipe: Recipe,
        teacher: PrunableModel | None = None,
        write_card: WriteCard | None = None,
    ) -> None:
        if recipe.losses.needs_teacher and teacher is None:
            raise ValueError("Distillation and alignment need a teacher: give one, or set their weights to 0.")
        recipe.losses.check_layers(pruned_config(model.config).num_hidden_layers)
        check_output_dir(recipe.run)
        self.recipe = recipe
        self.task = recipe.task
        image_processor = image_processor_of(self.task, image_processor)
        self.output_dir = Path(recipe.run.output_dir)
        self.described: dict[str, Any] = {
            "config": describe_config(model.config),
            "image_processor": describe_image_processor(image_processor),
            "label_names": list(datasets.label_names),
            "training_images": fingerprint_of_rows(datasets.train),
            "evaluation_images": fingerprint_of_rows(datasets.evaluation),
            "teacher": None if teacher is None else fingerprint_of_weights(teacher),
        }
        self.elastic_schedules = add_schedules(model, recipe.elastic)
        self.accelerator = make_accelerator(
            mixed_precision=recipe.optimization.mixed_precision,
            gradient_accumulation_steps=recipe.optimization.gradient_accumulation_steps,
            project_dir=recipe.run.output_dir,
            log_with=recipe.run.tracker,
            cpu=recipe.run.use_cpu,
            fsdp=recipe.scale.fsdp,
            timeout=recipe.scale.ddp_timeout,
            # Parameters of stages that are not in a step's schedule get no gradient.
            find_unused_parameters=leaves_parameters_idle(self.task)
            or (bool(self.elastic_schedules) and model.has_pruning_parameters),
        )
        self.log = RunLog(self.accelerator, recipe.run.with_tracking)
        if recipe.scale.deterministic:
            choose_deterministic_algorithms()
        seed, num_workers = recipe.run.seed, recipe.num_workers
        self.loaders = make_loaders(
            self.accelerator, self.task, datasets, image_processor, recipe.optimization, seed, num_workers
        )
        self.saved_models = SavedModels(self.task, image_processor, self.loaders.eval_items, write_card)
        self.length, self.schedule = plan_steps(recipe.optimization, len(self.loaders.train))
        self._prepare(model, teacher)
        self.state = TrainingState()
        self.stop_request = StopRequest()
        self._stop_agreed = False
        if (resume := recipe.run.resume) is not None:
            self.state = resume_run(
                self.accelerator, self.output_dir, resume, self._parts(), self._settings(), self.log.write
            )

    # Preparation

    def _prepare(self, model: PrunableModel, teacher: PrunableModel | None) -> None:
        """Moves the models to the device and distributes them over the processes."""
        options, scale = self.recipe.optimization, self.recipe.scale
        if scale.batch_norm == "sync":
            synchronize_batch_norm(model, self.accelerator.device)
        if scale.gradient_checkpointing:
            enable_activation_checkpointing(model)
        self.plain_model = model.to(self.accelerator.device)
        self.teacher = None
        if teacher is not None:
            teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
            self.teacher = spread_frozen(self.accelerator, teacher)
        self.forward_watch = ForwardWatch(model, self.teacher)
        self.ema = None
        if options.model_ema:
            self.ema = ExponentialMovingAverage(model, options.model_ema_decay, options.model_ema_warmup)
        # An unsharded copy of the model, used for saving and for the picture; see `_whole`.
        self._saved_model = copy.deepcopy(model).cpu() if self.accelerator.is_fsdp2 else None
        if self.ema is not None:
            self.ema.model = spread_frozen(self.accelerator, self.ema.model)
        optimizer = make_optimizer(
            model,
            options.learning_rate,
            options.weight_decay,
            options.layer_decay,
            (options.adam_beta1, options.adam_beta2),
            options.adam_epsilon,
        )
        shard_by_layers(self.accelerator, model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if leaves_parameters_idle(self.task):
            reduce_unused_parameters(self.model)

    def _settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the original run to end with the same weights."""
        options = asdict(self.recipe.optimization)
        del options["per_device_eval_batch_size"]
        return {
            "num_processes": self.accelerator.num_processes,
            "task": self.task.name,
            "images_per_step": self._images_per_step(),
            "steps_per_epoch": self.length.steps_per_epoch,
            "num_training_images": len(self.loaders.train_items),
            "shuffle_buffer_size": self.loaders.shuffle_buffer_size,
            "token_pruning": pruned_config(self.plain_model.config).token_pruning,
            "seed": self.recipe.run.seed,
            **options,
            **asdict(self.task.arguments),
            **asdict(self.recipe.losses),
            **asdict(self.recipe.elastic),
            "mixed_precision": self.accelerator.mixed_precision,
            "batch_norm": self.recipe.scale.batch_norm,
            **self.described,
        }

    def _images_per_step(self) -> int:
        return self.loaders.batch_size * self.length.gradient_accumulation_steps

    def _parts(self) -> TrainedParts:
        return TrainedParts(self.model, self.optimizer.optimizer, self.ema)

    # The run

    def train(self) -> dict[str, Any]:
        """Runs the training and returns the results, which are also saved in `all_results.json`.

        Raises:
            TrainingDivergedError: the loss, its gradient or a weight became NaN or infinite.
            TrainingInterruptedError: a signal stopped the run, and a checkpoint was saved.
            FileExistsError: another run is writing to the output folder.
            ProcessLostError: another process of the run died or did not respond.
        """
        with only_run_in(self.output_dir, self.accelerator), lost_processes_named():
            return self._train()

    def _train(self) -> dict[str, Any]:
        self.log.start_tracking(self._settings())
        self._describe()
        start = time.perf_counter()
        progress = tqdm(
            desc="training",
            total=self.length.num_steps,
            initial=self.state.steps,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        with self.stop_request, logging_redirect_tqdm(), progress:
            for epoch in range(self.state.evaluated_epochs, self.length.num_epochs):
                self._train_epoch(epoch, progress)
                self._evaluate(epoch)
                if self.recipe.run.checkpointing_steps == "epoch":
                    self._save_checkpoint()
        results = self._finish(time.perf_counter() - start)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return results

    def _describe(self) -> None:
        flops = count_flops(self.plain_model.config)
        self.log.write(
            f"{len(self.loaders.train_items)} training and {len(self.loaders.eval_items)} evaluation images, "
            f"{say_labels(self.described['label_names'])}; {self.length.num_epochs} epochs, "
            f"{self.length.num_steps} steps of {self._images_per_step()} images; "
            f"{self.plain_model.num_parameters():,} parameters, "
            f"{flops.pruned.published / 1e9:.4g} GFLOPs ({flops.reduction:.1%} pruned)."
        )
        device, batch_size = self.accelerator.device, self.recipe.optimization.per_device_train_batch_size
        if launch := launch_on_cores(device, self.accelerator.num_processes, batch_size):
            self.log.write(f"On this CPU, training is faster with one single-threaded process per core: {launch}")

    def _train_epoch(self, epoch: int, progress: tqdm) -> None:
        length = self.length
        done = (self.state.steps - epoch * length.steps_per_epoch) * length.gradient_accumulation_steps
        if done >= min(length.batches_per_epoch, length.batches_left(epoch)):
            return
        self.model.train()
        if self.recipe.scale.batch_norm == "frozen":
            freeze_batch_norm(self.model)
        window = LossWindow()
        for index, batch in self.loaders.batches(epoch, done):
            # Accelerate divides by the number of accumulated batches, but the last step of an epoch may have fewer.
            group = length.batches_of_step(index)
            with self.accelerator.accumulate(self.model):
                terms = self._losses(batch, epoch, index)
                self.accelerator.backward(terms["loss"] * (length.gradient_accumulation_steps / group))
                window.add_batch({name: value.detach() for name, value in terms.items()}, group)
            if not self.accelerator.sync_gradients:
                continue
            self._step(window)
            progress.update()
            if self.state.steps % self.recipe.run.logging_steps == 0 or self.state.steps == length.num_steps:
                self._log_losses(epoch, window)
                window = LossWindow()
            self._checkpoint_if_due()
            if self.state.steps == length.num_steps:
                return

    def _losses(self, batch: Batch, epoch: int, index: int) -> dict[str, Tensor]:
        place = [self.recipe.run.seed, epoch, index, self.accelerator.process_index]
        batch = self.task.mix(batch, self.plain_model.config, np.random.default_rng(place))
        # Drop path and random importance use torch's global generator.
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        schedule, drawn = pruned_config(self.plain_model.config).token_pruning, {}
        if self.elastic_schedules:
            step = index // self.length.gradient_accumulation_steps
            schedule = draw_schedule(self.elastic_schedules, self.recipe.run.seed, epoch, step)
            drawn = {"token_pruning": schedule}
        layers, block_keep_ratio = what_is_pruned(schedule)
        inputs = self.task.inputs(batch) | self.recipe.losses.model_options(block_keep_ratio)
        with self.accelerator.autocast():
            student = self.model(**inputs, **drawn)
        teacher = None
        if self.teacher is not None and self.recipe.losses.needs_teacher:
            with self.accelerator.autocast():
                teacher = run_teacher(self.teacher, inputs)
        return training_loss(self.task, student, teacher, batch, self.recipe.losses, layers, block_keep_ratio)

    def _step(self, window: LossWindow) -> None:
        """Updates the weights with the accumulated gradients."""
        values = self._agree(window)
        norms = gradient_norms(self.plain_model)
        largest_norm = self.recipe.optimization.clip_grad or math.inf
        values["gradient_norm"] = float(self.accelerator.clip_grad_norm_(self.model.parameters(), largest_norm))
        finite = {name: math.isfinite(value) for name, value in values.items()}
        # With fp16, an infinite gradient usually means that the loss scale was too large, and the scaler skips the
        # step. If the scale is already low, there is another cause.
        if self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1:
            finite.pop("gradient_norm")
        if not all(finite.values()):
            raise TrainingDivergedError(
                describe_divergence(
                    self.forward_watch,
                    self.accelerator,
                    values,
                    norms,
                    self.state.steps + 1,
                    self.length.num_steps,
                    self.recipe.optimization,
                    say_last(self.output_dir),
                )
            )
        self.forward_watch.clear()
        self.schedule.apply(self.optimizer, self.state.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.steps += 1
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), self.state.steps)
        window.add_step(values)

    def _agree(self, window: LossWindow) -> dict[str, float]:
        """The loss terms of this step, averaged over processes. Also finds out whether any process was asked to
        stop."""
        stop = torch.tensor(float(self.stop_request.received is not None), device=self.accelerator.device)
        values = self.accelerator.reduce(torch.stack([*window.terms.values(), stop]), reduction="mean").tolist()
        self._stop_agreed = values.pop() > 0
        return dict(zip(window.terms, values, strict=True))

    def _should_stop(self) -> bool:
        stop = torch.tensor(float(self.stop_request.received is not None), device=self.accelerator.device)
        self._stop_agreed = self.accelerator.reduce(stop, reduction="sum").item() > 0
        return self._stop_agreed

    # Checkpoints

    def _checkpoint_if_due(self) -> None:
        steps = self.recipe.run.checkpointing_steps
        if self._stop_agreed:
            self._interrupt()
        elif steps != "epoch" and self.state.steps % int(steps) == 0:
            self._save_checkpoint()

    def _save_checkpoint(self) -> Path:
        """Saves a checkpoint unless a weight is not finite: the last good checkpoint must not be replaced then."""
        if name := weight_not_finite(self.plain_model):
            raise TrainingDivergedError(
                f"After step {self.state.steps} of {self.length.num_steps} the weight {name} is not finite; no "
                f"checkpoint was saved. Try a smaller --learning_rate. {say_last(self.output_dir)}"
            )
        run = self.recipe.run
        return save_checkpoint(
            self.accelerator, self.output_dir, self.state, self._parts(), self._settings(), run.save_total_limit
        )

    def _interrupt(self) -> None:
        folder = self._save_checkpoint()
        # A process without a signal of its own stops together with the one that received it.
        raise TrainingInterruptedError(self.stop_request.received or signal.SIGTERM, folder)

    # Evaluation and results

    def _evaluate(self, epoch: int) -> None:
        """Evaluates the weights and their average. Saves the better of the two if it is the best so far."""
        torch.manual_seed(self.recipe.run.seed)
        candidates: dict[str, PrunableModel] = {"model": self.accelerator.unwrap_model(self.model)}
        if self.ema is not None:
            candidates["ema"] = self.ema.model
        evaluated: dict[str, float] = {}
        for name, candidate in candidates.items():
            share_buffers(candidate)
            metrics = evaluate_model(self.task, candidate, self.loaders.eval, self.accelerator, self._should_stop)
            if metrics is None:
                self._interrupt()
                return
            prefix = PREFIX if name == "model" else EMA_PREFIX
            evaluated |= {f"{prefix}{metric}": value for metric, value in metrics.items()}
            if self._is_best(metrics):
                self.state.best = {**metrics, "epoch": epoch + 1, "weights": name}
                self._save_model(candidate, "best", metrics)
        self.state.history.append({"epoch": epoch + 1, "step": self.state.steps, **evaluated})
        self.state.evaluated_epochs = epoch + 1
        self.log.write_metrics(f"epoch {epoch + 1}/{self.length.num_epochs}", evaluated)
        self.log.track(evaluated, self.state.steps)
        self._track_picture(candidates["model"])

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name = self.task.metric_for_best_model
        if name not in self.state.best:
            return True
        best = self.state.best[name]
        return metrics[name] > best if self.task.greater_is_better else metrics[name] < best

    def _save_model(self, model: PrunableModel, name: str, metrics: dict[str, float]) -> None:
        model = self._whole(model)
        if self.accelerator.is_main_process:
            self.saved_models.save(model, self.output_dir / name, metrics)
        self.accelerator.wait_for_everyone()

    def _whole(self, model: PrunableModel) -> PrunableModel:
        """The model in a form that a single process can run; all processes call this. Sharded weights are gathered into
        a copy."""
        if self._saved_model is None:
            return model
        weights = whole_model_state(model)
        if self.accelerator.is_main_process:
            self._saved_model.load_state_dict(weights)
        return self._saved_model

    def _finish(self, seconds: float) -> dict[str, Any]:
        last = self.state.history[-1]
        of_ema = {key.removeprefix(EMA_PREFIX): last[key] for key in last if key.startswith(EMA_PREFIX)}
        of_model = {
            key.removeprefix(PREFIX): value
            for key, value in last.items()
            if key.startswith(PREFIX) and not key.startswith(EMA_PREFIX)
        }
        self._save_model(self.accelerator.unwrap_model(self.model), "last", of_model)
        if self.ema is not None:
            self._save_model(self.ema.model, "last_ema", of_ema)
        flops = count_flops(self.plain_model.config, block_fraction=of_model.get("block_fraction"))
        results = {
            **last,
            "best": self.state.best,
            "num_parameters": self.plain_model.num_parameters(),
            "gflops_dense": flops.dense.published / 1e9,
            "gflops_pruned": flops.pruned.published / 1e9,
            "seconds": seconds,
            "history": self.state.history,
        }
        if self.accelerator.is_main_process:
            write_json(results, self.output_dir / RESULTS)
        name = self.task.metric_for_best_model
        title, form = self.task.shown_metrics.get(name, (name, ".6g"))
        self.log.write(f"Done: the best {title} is {self.state.best[name]:{form}}; see {self.output_dir / RESULTS}.")
        return results

    # Logging

    def _log_losses(self, epoch: int, window: LossWindow) -> None:
        values = {
            **window.means(),
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": window.num_batches * self.loaders.batch_size / window.seconds(),
        }
        length, step = self.length, self.state.steps
        self.log.write_metrics(f"epoch {epoch + 1}/{length.num_epochs} step {step}/{length.num_steps}", values)
        self.log.track({f"train_{name}": value for name, value in values.items()}, step)

    def _track_picture(self, model: PrunableModel) -> None:
        """Sends the picture of a pruned model to the trackers."""
        if not self.recipe.run.with_tracking or pruned_config(model.config).token_pruning is None:
            return
        model = self._whole(model)
        if self.accelerator.is_main_process and (picture := self.saved_models.draw(model)) is not None:
            self.log.track_picture("kept_tokens", picture, self.state.steps)
