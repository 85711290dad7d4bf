"""The training loop, on Accelerate: dense training and pruned fine-tuning, on one or more devices.

The images of an update are the same over however many processes it is spread. Whatever is random in it depends on the
seed, the epoch, the batch and the process alone, never on what was drawn before. A run that is killed and resumed
therefore ends with the very weights of one that was not.
"""

import copy
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import BaseImageProcessor

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.documentation import see
from hf_vssm_prune.families import ImageClassifier
from hf_vssm_prune.flops import count_flops
from hf_vssm_prune.hub.model_card import ModelCardInfo
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.training.arguments import (
    AugmentationArguments,
    ElasticArguments,
    OptimizationArguments,
    RunArguments,
    ScaleArguments,
)
from hf_vssm_prune.training.augmentation import mix_batch
from hf_vssm_prune.training.batch_norm import freeze_batch_norm, synchronize_batch_norm
from hf_vssm_prune.training.checkpoints import (
    RESULTS,
    TrainedParts,
    TrainingState,
    find_checkpoints,
    find_resumed,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    write_json,
)
from hf_vssm_prune.training.data import (
    EvaluationImages,
    ImageDatasets,
    ImageStream,
    StreamedTrainingImages,
    TrainingImages,
    collate,
)
from hf_vssm_prune.training.distribution import (
    lost_processes_named,
    make_accelerator,
    shard_by_layers,
    share_buffers,
    spread_frozen,
    whole_model_state,
)
from hf_vssm_prune.training.divergence import (
    ForwardWatch,
    TrainingDivergedError,
    gradient_norms,
    last_not_finite,
    weight_not_finite,
)
from hf_vssm_prune.training.ema import ExponentialMovingAverage
from hf_vssm_prune.training.evaluation import evaluate_accuracy
from hf_vssm_prune.training.interruption import StopRequest, TrainingInterruptedError, leave_stopping_to_main_process
from hf_vssm_prune.training.losses import LossTerms, LossWeights, training_loss
from hf_vssm_prune.training.optimization import LearningRateSchedule, make_optimizer
from hf_vssm_prune.training.run_log import LossWindow, RunLog
from hf_vssm_prune.training.sampling import EpochSampler, StreamSampler
from hf_vssm_prune.visualization import draw_classification, image_statistics


PICTURE = "kept_tokens.png"
PICTURED_IMAGES = 4


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: the options of the scripts, and the losses."""

    optimization: OptimizationArguments
    augmentation: AugmentationArguments
    run: RunArguments
    losses: LossWeights = field(default_factory=LossWeights)
    elastic: ElasticArguments = field(default_factory=ElasticArguments)
    scale: ScaleArguments = field(default_factory=ScaleArguments)
    num_workers: int = 0


def check_output_dir(run: RunArguments) -> None:
    """Refuses to mix two runs in a folder.

    Raises:
        FileExistsError: the folder has checkpoints, and the run is not to go on from one.
        NotADirectoryError: the folder is a file.
        FileNotFoundError: the checkpoint to go on from is not there.
    """
    output_dir = Path(run.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"--output_dir {output_dir} is a file.")
    if run.resume is not None:
        find_resumed(output_dir, run.resume)
    elif found := find_checkpoints(output_dir):
        raise FileExistsError(
            f"--output_dir {output_dir} has the checkpoints of an earlier run, the last is {found[-1].name}: "
            "go on with --resume latest, or choose another folder."
        )


class Trainer:
    """Trains one model and saves it.

    In the recipe's output folder are afterwards `best/` (the best weights, or the best average of them), `last/` and,
    with an average, `last_ema/`, each of which `from_pretrained` opens; `checkpoint-*/`; and `all_results.json`.
    A pruned model's card and, after each evaluation, the trackers get a picture of the tokens that it keeps.

    Args:
        model: an image classifier of this package, with its pruning schedule.
        datasets: images to train and to evaluate on.
        image_processor: prepares the model's images, and is saved with it.
        recipe: how to train.
        teacher: the dense model, where the recipe's losses need one. It is frozen.
        write_card: what the model card says, from top-1, top-5 (0 to 1) and the number of images; None: no more than
            the model itself tells.

    Raises:
        ValueError: the losses need a teacher and there is none, a layer to align is not there, there is not one full
            batch, or the checkpoint to go on from is of another run.
        OSError: the output folder cannot be used, see `check_output_dir`.
    """

    def __init__(
        self,
        model: ImageClassifier,
        datasets: ImageDatasets,
        image_processor: BaseImageProcessor,
        recipe: Recipe,
        teacher: ImageClassifier | None = None,
        write_card: Callable[[float, float, int], ModelCardInfo] | None = None,
    ) -> None:
        if recipe.losses.needs_teacher and teacher is None:
            raise ValueError("Distillation and alignment need a teacher: give one, or set their weights to 0.")
        _check_alignment_layers(recipe.losses, model.config)
        check_output_dir(recipe.run)
        self.recipe = recipe
        self.output_dir = Path(recipe.run.output_dir)
        self.image_processor = image_processor
        self.write_card = write_card
        self.elastic_schedules = recipe.elastic.schedules(model.config)
        for schedule in self.elastic_schedules:
            model.add_pruning_parameters(schedule)
        # What has no gradient ever is neither DDP's to wait for nor the optimizer's to have moments of.
        model.freeze_pruning_parameters([model.config.token_pruning, *self.elastic_schedules])
        self.accelerator = make_accelerator(
            mixed_precision=recipe.optimization.mixed_precision,
            gradient_accumulation_steps=recipe.optimization.gradient_accumulation_steps,
            project_dir=recipe.run.output_dir,
            log_with=recipe.run.report_to if recipe.run.with_tracking else None,
            cpu=recipe.run.use_cpu,
            fsdp=recipe.scale.fsdp,
            timeout=recipe.scale.ddp_timeout,
            # A stage that an update's schedule does not have leaves what it has learned alone.
            find_unused_parameters=bool(self.elastic_schedules) and model.has_pruning_parameters,
        )
        self.log = RunLog(self.accelerator, recipe.run.with_tracking)
        if recipe.scale.deterministic:
            _choose_deterministic_algorithms()
        self._make_loaders(datasets)
        self._make_schedule()

        self._prepare(model, teacher)
        self.state = TrainingState()
        self.stop_request = StopRequest()
        self._stop_agreed = False
        self._resume()

    # Preparation

    def _prepare(self, model: ImageClassifier, teacher: ImageClassifier | None) -> None:
        """Puts the models on the device and spreads them over the processes."""
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
        # Whole weights are saved and drawn from this copy, which no process shards; see `_whole`.
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

    def _make_loaders(self, datasets: ImageDatasets) -> None:
        options, run = self.recipe.optimization, self.recipe.run
        augmentation = self.recipe.augmentation.image_augmentation()
        self.train_images: TrainingImages
        self.sampler: EpochSampler | StreamSampler
        self.shuffle_buffer_size = None
        if isinstance(datasets.train, ImageStream):
            self.train_images = StreamedTrainingImages(datasets.train, self.image_processor, augmentation, run.seed)
            self.sampler = StreamSampler(datasets.train, run.seed)
            self.shuffle_buffer_size = datasets.train.buffer_size
        else:
            self.train_images = TrainingImages(datasets.train, self.image_processor, augmentation, run.seed)
            self.sampler = EpochSampler(len(datasets.train), run.seed)
        train_loader = DataLoader(
            self.train_images,
            batch_size=options.per_device_train_batch_size,
            sampler=self.sampler,
            collate_fn=collate,
            num_workers=self.recipe.num_workers,
            worker_init_fn=leave_stopping_to_main_process,
            pin_memory=self.accelerator.device.type == "cuda",
            # The images of a smaller last batch would weigh more. Each epoch leaves out others.
            drop_last=True,
        )
        self.eval_images = EvaluationImages(datasets.evaluation, self.image_processor)
        eval_loader = DataLoader(
            self.eval_images,
            batch_size=options.per_device_eval_batch_size,
            collate_fn=collate,
            num_workers=self.recipe.num_workers,
            worker_init_fn=leave_stopping_to_main_process,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.train_loader, self.eval_loader = self.accelerator.prepare(train_loader, eval_loader)
        self.batches_per_epoch = len(self.train_loader)
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"{len(self.train_images)} training images do not fill one batch of "
                f"{options.per_device_train_batch_size} on {self.accelerator.num_processes} device(s): "
                "lower --per_device_train_batch_size."
            )

    def _make_schedule(self) -> None:
        options = self.recipe.optimization
        self.updates_per_epoch = math.ceil(self.batches_per_epoch / options.gradient_accumulation_steps)
        self.num_updates = options.max_train_steps or options.num_train_epochs * self.updates_per_epoch
        self.num_epochs = math.ceil(self.num_updates / self.updates_per_epoch)
        warmup_updates = options.num_warmup_steps
        if warmup_updates is None:
            epochs = options.warmup_epochs
            warmup_updates = round(self.num_updates / 30 if epochs is None else epochs * self.updates_per_epoch)
        if warmup_updates >= self.num_updates:
            raise ValueError(f"{warmup_updates} updates of warm-up leave nothing of the run's {self.num_updates}.")
        self.schedule = LearningRateSchedule(
            options.lr_scheduler_type,
            self.num_updates,
            warmup_updates,
            warmup_share=options.warmup_lr / options.learning_rate,
            min_share=options.min_lr / options.learning_rate,
        )

    def _settings(self) -> dict[str, Any]:
        """What a run and its continuation must share for the weights to come out the same."""
        options = asdict(self.recipe.optimization)
        del options["per_device_eval_batch_size"]
        return {
            "num_processes": self.accelerator.num_processes,
            "images_per_update": self._images_per_update(),
            "updates_per_epoch": self.updates_per_epoch,
            "num_training_images": len(self.train_images),
            "shuffle_buffer_size": self.shuffle_buffer_size,
            "token_pruning": self.plain_model.config.token_pruning,
            "seed": self.recipe.run.seed,
            **options,
            **asdict(self.recipe.augmentation),
            **asdict(self.recipe.losses),
            **asdict(self.recipe.elastic),
            "mixed_precision": self.accelerator.mixed_precision,
            "batch_norm": self.recipe.scale.batch_norm,
        }

    def _images_per_update(self) -> int:
        options = self.recipe.optimization
        return (
            options.per_device_train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        )

    def _parts(self) -> TrainedParts:
        return TrainedParts(self.model, self.optimizer.optimizer, self.ema)

    # The run

    def train(self) -> dict[str, Any]:
        """Runs to the end and returns the results, which `all_results.json` holds as well.

        Raises:
            TrainingDivergedError: the loss, its gradient or a weight became NaN or infinite.
            TrainingInterruptedError: SIGINT or SIGTERM came; a checkpoint was saved.
            ProcessLostError: another process of the run died or did not answer.
        """
        with lost_processes_named(self.accelerator.num_processes):
            return self._train()

    def _train(self) -> dict[str, Any]:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            remove_unfinished(self.output_dir)
        self.log.start_tracking(self._settings())
        self._describe()
        start = time.perf_counter()
        progress = tqdm(
            desc="training",
            total=self.num_updates,
            initial=self.state.updates,
            unit="update",
            disable=not self.accelerator.is_local_main_process,
        )
        with self.stop_request, logging_redirect_tqdm(), progress:
            for epoch in range(self.state.evaluated_epochs, self.num_epochs):
                self._train_epoch(epoch, progress)
                self._evaluate(epoch)
                if self.recipe.run.checkpointing_steps == "epoch":
                    self._save_checkpoint()
        results = self._finish(time.perf_counter() - start)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return results

    def _resume(self) -> None:
        resume = self.recipe.run.resume
        folder = None if resume is None else find_resumed(self.output_dir, resume)
        if folder is not None:
            self.state, differing = load_checkpoint(self.accelerator, folder, self._parts(), self._settings())
            if later := find_checkpoints(self.output_dir, after=self.state.updates):
                raise ValueError(
                    f"{folder} is of update {self.state.updates}, and {self.output_dir} has later checkpoints, up to "
                    f"{later[-1].name}, from which --resume latest would go on: remove them, or copy {folder.name} to "
                    "another --output_dir."
                )
            if differing:
                self.log.write(f"The same images make each update, but mixing and drop path draw anew: {differing}.")
            if not (self.output_dir / "best").is_dir():
                # The checkpoint was copied from another folder: the best model so far did not come along.
                self.state.best = {}
            self.log.write(f"Going on from {folder}, after {self.state.updates} updates.")
        elif resume is not None:
            self.log.write(f"No checkpoint in {self.output_dir} yet: starting afresh.")

    def _describe(self) -> None:
        flops = count_flops(self.plain_model.config)
        self.log.write(
            f"{len(self.train_images)} training images, {self.num_epochs} epochs, {self.num_updates} updates of "
            f"{self._images_per_update()} images; {self.plain_model.num_parameters():,} "
            f"parameters, {flops.pruned.published / 1e9:.4g} GFLOPs ({flops.reduction:.1%} pruned)."
        )

    def _train_epoch(self, epoch: int, progress: tqdm) -> None:
        accumulation = self.recipe.optimization.gradient_accumulation_steps
        done = (self.state.updates - epoch * self.updates_per_epoch) * accumulation
        self.model.train()
        if self.recipe.scale.batch_norm == "frozen":
            freeze_batch_norm(self.model)
        window = LossWindow()
        for index, batch in self._batches(epoch, done):
            # Accelerate divides by the number of accumulated batches; at an epoch's end there may be fewer.
            group = min(accumulation, self.batches_per_epoch - index // accumulation * accumulation)
            with self.accelerator.accumulate(self.model):
                terms = self._losses(batch, epoch, index)
                self.accelerator.backward(terms.loss * (accumulation / group))
                window.add_batch(terms.named(), group)
            if not self.accelerator.sync_gradients:
                continue
            self._update(window)
            progress.update()
            if self.state.updates % self.recipe.run.logging_steps == 0 or self.state.updates == self.num_updates:
                self._log_losses(epoch, window)
                window = LossWindow()
            self._checkpoint_if_due()
            if self.state.updates == self.num_updates:
                return

    def _batches(self, epoch: int, done: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The batches of an epoch that come after the first `done`, each with its number."""
        if done >= min(self.batches_per_epoch, self._batches_left_of_run(epoch)):
            return
        self.train_images.set_epoch(epoch)
        batch_size = self.recipe.optimization.per_device_train_batch_size * self.accelerator.num_processes
        self.sampler.start_at(epoch, done * batch_size)
        self.train_loader.set_epoch(epoch)
        yield from enumerate(self.train_loader, start=done)

    def _batches_left_of_run(self, epoch: int) -> int:
        left = self.num_updates - epoch * self.updates_per_epoch
        return left * self.recipe.optimization.gradient_accumulation_steps

    def _losses(self, batch: dict[str, Tensor], epoch: int, index: int) -> LossTerms:
        place = [self.recipe.run.seed, epoch, index, self.accelerator.process_index]
        pixel_values, labels = mix_batch(
            batch["pixel_values"],
            batch["labels"],
            self.plain_model.config.num_labels,
            self.recipe.augmentation.mix(),
            np.random.default_rng(place),
        )
        # Drop path and random importance draw from torch's own generator.
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        with_states = self.recipe.losses.alignment_weight > 0
        update = index // self.recipe.optimization.gradient_accumulation_steps
        with self._drawn_pruning(epoch, update) as pruning_layers, self.accelerator.autocast():
            student = self.model(pixel_values, output_hidden_states=with_states)
        teacher = None
        if self.teacher is not None and self.recipe.losses.needs_teacher:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(pixel_values, output_hidden_states=with_states)
        return training_loss(student, teacher, labels, self.recipe.losses, pruning_layers)

    @contextmanager
    def _drawn_pruning(self, epoch: int, update: int) -> Iterator[list[int]]:
        """Prunes by one of the elastic schedules, the same in every process and for all batches of an update; gives the
        layers that drop tokens.

        Without elastic schedules the model's own is in force.
        """
        own = self.plain_model.config.token_pruning
        if not self.elastic_schedules:
            yield [] if own is None else own["layers"]
            return
        place = np.random.SeedSequence([self.recipe.run.seed, epoch, update], spawn_key=(1,))
        schedule = self.elastic_schedules[np.random.default_rng(place).integers(len(self.elastic_schedules))]
        self.plain_model.set_token_pruning(schedule)
        try:
            yield [] if schedule is None else schedule["layers"]
        finally:
            self.plain_model.set_token_pruning(own)

    def _update(self, window: LossWindow) -> None:
        """Changes the weights by the gradients that have come together."""
        values = self._agree(window)
        norms = gradient_norms(self.plain_model)
        largest_norm = self.recipe.optimization.clip_grad or math.inf
        values["gradient_norm"] = float(self.accelerator.clip_grad_norm_(self.model.parameters(), largest_norm))
        finite = {name: math.isfinite(value) for name, value in values.items()}
        # With fp16 an infinite gradient only means that its scale was too large: the scaler skips the update. If it was
        # scaled down already, that is not why.
        if self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1:
            finite.pop("gradient_norm")
        if not all(finite.values()):
            raise TrainingDivergedError(self._divergence(values, norms))
        self.forward_watch.clear()
        self.schedule.apply(self.optimizer, self.state.updates)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.updates += 1
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), self.state.updates)
        window.add_update(values)

    def _agree(self, window: LossWindow) -> dict[str, float]:
        """The loss terms of this update, mean over processes; in passing, whether any process was asked to stop."""
        stop = torch.tensor(float(self.stop_request.received is not None), device=self.accelerator.device)
        values = self.accelerator.reduce(torch.stack([*window.terms.values(), stop]), reduction="mean").tolist()
        self._stop_agreed = values.pop() > 0
        return dict(zip(window.terms, values, strict=True))

    def _should_stop(self) -> bool:
        stop = torch.tensor(float(self.stop_request.received is not None), device=self.accelerator.device)
        self._stop_agreed = self.accelerator.reduce(stop, reduction="sum").item() > 0
        return self._stop_agreed

    def _divergence(self, values: dict[str, float], gradient_norms: dict[str, Tensor]) -> str:
        options = self.recipe.optimization
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if layer := self.forward_watch.first_not_finite(self.accelerator):
            place = f"the first output that is not finite is that of {layer}"
        elif parameter := last_not_finite(gradient_norms, self.accelerator):
            place = f"all layers' outputs are finite, and the first gradient that is not is that of {parameter}"
        else:
            place = "all layers' outputs and all gradients are finite, one by one"
        return (
            f"The loss or its gradient is not finite at update {self.state.updates + 1} of {self.num_updates}: "
            f"{terms}; {place}. Try a smaller --learning_rate (it is {options.learning_rate:g}), a longer warm-up, "
            f"--clip_grad (it is {options.clip_grad}), or --mixed_precision no (it is "
            f"{self.accelerator.mixed_precision}). {self._last_checkpoint()} {see('loss-not-finite')}"
        )

    def _last_checkpoint(self) -> str:
        checkpoints = find_checkpoints(self.output_dir)
        return f"The last checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."

    # Checkpoints

    def _checkpoint_if_due(self) -> None:
        steps = self.recipe.run.checkpointing_steps
        due = steps != "epoch" and self.state.updates % int(steps) == 0
        if self._stop_agreed:
            self._interrupt()
        elif due:
            self._save_checkpoint()

    def _save_checkpoint(self) -> Path:
        """Saves a checkpoint, unless a weight is not finite: the last good one must not make room for it."""
        if name := weight_not_finite(self.plain_model, self.accelerator):
            raise TrainingDivergedError(
                f"After update {self.state.updates} of {self.num_updates} the weight {name} is not finite; no "
                f"checkpoint was saved. Try a smaller --learning_rate. {self._last_checkpoint()}"
            )
        run = self.recipe.run
        return save_checkpoint(
            self.accelerator, self.output_dir, self.state, self._parts(), self._settings(), run.save_total_limit
        )

    def _interrupt(self) -> None:
        folder = self._save_checkpoint()
        # A process that was not asked itself stops with the one that was.
        raise TrainingInterruptedError(self.stop_request.received or signal.SIGTERM, folder)

    # Evaluation and results

    def _evaluate(self, epoch: int) -> None:
        """Evaluates the weights and their average, and saves the better one if it is the best so far."""
        torch.manual_seed(self.recipe.run.seed)
        candidates: dict[str, ImageClassifier] = {"model": self.accelerator.unwrap_model(self.model)}
        if self.ema is not None:
            candidates["ema"] = self.ema.model
        figures: dict[str, Any] = {"epoch": epoch + 1, "update": self.state.updates}
        for name, candidate in candidates.items():
            share_buffers(candidate)
            accuracy = evaluate_accuracy(candidate, self.eval_loader, self.accelerator, self._should_stop)
            if accuracy is None:
                self._interrupt()
                return
            prefix = "eval" if name == "model" else "eval_ema"
            figures |= {f"{prefix}_{key}": getattr(accuracy, key) for key in ("top1", "top5", "loss")}
            if accuracy.top1 > self.state.best.get("top1", -1.0):
                self.state.best = {"top1": accuracy.top1, "top5": accuracy.top5, "epoch": epoch + 1, "weights": name}
                self._save_model(candidate, "best", accuracy.top1, accuracy.top5)
        self.state.history.append(figures)
        self.state.evaluated_epochs = epoch + 1
        accuracies = {name: value for name, value in figures.items() if name.startswith("eval")}
        self.log.write_figures(f"epoch {epoch + 1}/{self.num_epochs}", accuracies)
        self.log.track(accuracies, self.state.updates)
        self._track_picture(candidates["model"])

    def _save_model(self, model: ImageClassifier, name: str, top1: float, top5: float) -> None:
        model = self._whole(model)
        if self.accelerator.is_main_process:
            card = self.write_card and self.write_card(top1, top5, len(self.eval_images))
            with tempfile.TemporaryDirectory() as scratch:
                if card is not None and model.config.token_pruning is not None:
                    picture = Path(scratch) / PICTURE
                    self._draw_kept_tokens(model).save(picture)
                    card = replace(card, picture=picture)
                save_for_hub(model, self.output_dir / name, self.image_processor, card)
        self.accelerator.wait_for_everyone()

    def _whole(self, model: ImageClassifier) -> ImageClassifier:
        """The model, which one process can run by itself; all call this. What is sharded comes together in a copy."""
        if self._saved_model is None:
            return model
        weights = whole_model_state(model)
        if self.accelerator.is_main_process:
            self._saved_model.load_state_dict(weights)
        return self._saved_model

    def _finish(self, seconds: float) -> dict[str, Any]:
        figures = self.state.history[-1]
        model = self.accelerator.unwrap_model(self.model)
        self._save_model(model, "last", figures["eval_top1"], figures["eval_top5"])
        if self.ema is not None:
            self._save_model(self.ema.model, "last_ema", figures["eval_ema_top1"], figures["eval_ema_top5"])
        flops = count_flops(self.plain_model.config)
        results = {
            **figures,
            "best": self.state.best,
            "num_parameters": self.plain_model.num_parameters(),
            "gflops_dense": flops.dense.published / 1e9,
            "gflops_pruned": flops.pruned.published / 1e9,
            "seconds": seconds,
            "history": self.state.history,
        }
        if self.accelerator.is_main_process:
            write_json(results, self.output_dir / RESULTS)
        self.log.write(f"Done: the best top-1 is {self.state.best['top1']:.2%}; see {self.output_dir / RESULTS}.")
        return results

    # Logging

    def _log_losses(self, epoch: int, window: LossWindow) -> None:
        images = self.recipe.optimization.per_device_train_batch_size * self.accelerator.num_processes
        figures = {
            **window.means(),
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "images_per_second": window.num_batches * images / window.seconds(),
        }
        title = f"epoch {epoch + 1}/{self.num_epochs} update {self.state.updates}/{self.num_updates}"
        self.log.write_figures(title, figures)
        self.log.track({f"train_{name}": value for name, value in figures.items()}, self.state.updates)

    def _track_picture(self, model: ImageClassifier) -> None:
        """Shows a pruned model's kept tokens to the trackers."""
        if not self.recipe.run.with_tracking or model.config.token_pruning is None:
            return
        model = self._whole(model)
        if self.accelerator.is_main_process:
            self.log.track_picture("kept_tokens", self._draw_kept_tokens(model), self.state.updates)

    def _draw_kept_tokens(self, model: ImageClassifier) -> Image.Image:
        # Spread over the images, which may be in the order of their labels.
        step = max(1, len(self.eval_images) // PICTURED_IMAGES)
        images = [self.eval_images[index] for index in range(0, len(self.eval_images), step)[:PICTURED_IMAGES]]
        # What random importance draws here must not change what comes after.
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            pixel_values = collate(images)["pixel_values"]
            return draw_classification(model, pixel_values, *image_statistics(self.image_processor))


def enable_activation_checkpointing(model: ImageClassifier) -> None:
    """Lets a model compute each layer again in the backward pass."""
    new_name = hasattr(model, "activation_checkpointing_enable")  # older versions of transformers have the old one
    enable = model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _choose_deterministic_algorithms() -> None:
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def _check_alignment_layers(losses: LossWeights, config: VisionMambaConfig) -> None:
    if outside := [layer for layer in losses.alignment_layers or () if not 0 <= layer < config.num_hidden_layers]:
        raise ValueError(f"--alignment_layers has {outside}: the model has layers 0 to {config.num_hidden_layers - 1}.")
