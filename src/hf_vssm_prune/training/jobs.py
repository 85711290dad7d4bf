"""The work of the commands: creates data sets, models and a `Trainer` from options, runs them, and reports errors."""

import copy
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, set_seed
from transformers.utils import logging as transformers_logging

from hf_vssm_prune.configuration_common import pruned_config
from hf_vssm_prune.hub.loading import load_config, load_image_processor, new_image_processor
from hf_vssm_prune.hub.pushing import push_model
from hf_vssm_prune.metrics import save_results
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.quantization import quantize_linears
from hf_vssm_prune.token_pruning import ALIGNMENTS
from hf_vssm_prune.training.arguments import (
    BesideArguments,
    DataArguments,
    DenseModelArguments,
    EvaluationArguments,
    EvaluationDataArguments,
    FinetuneArguments,
    PruningArguments,
    TeacherArguments,
)
from hf_vssm_prune.training.arguments.parsing import exclude
from hf_vssm_prune.training.atomic_files import write_json
from hf_vssm_prune.training.cards import card_writer
from hf_vssm_prune.training.checkpoints import check_output_dir
from hf_vssm_prune.training.devices import MIXED_PRECISIONS, check_training_precision, find_device
from hf_vssm_prune.training.distribution import ProcessLostError, lost_processes_named
from hf_vssm_prune.training.divergence import TrainingDivergedError
from hf_vssm_prune.training.evaluation import ModelEvaluation, compare_models, comparison_table
from hf_vssm_prune.training.image_size import config_at_size, output_size, resize_image_processor, resize_model
from hf_vssm_prune.training.image_steps import NORMALIZATION, SIZES, ImageError
from hf_vssm_prune.training.interruption import TrainingInterruptedError
from hf_vssm_prune.training.loop import Recipe, Trainer
from hf_vssm_prune.training.models import load_model as load_model  # its place in early versions
from hf_vssm_prune.training.tasks import default_task
from hf_vssm_prune.training.tasks.task import PrunableModel, Task, image_processor_of


logger = logging.getLogger(__name__)


def prepare_finetuning(
    data: DataArguments, model: FinetuneArguments, pruning: PruningArguments, recipe: Recipe
) -> Trainer:
    """Prepares fine-tuning of a checkpoint with pruning. By default, the checkpoint without pruning is also the
    teacher.

    Raises:
        ValueError, OSError: options do not fit together, or something is missing; the message says what.
    """
    _check_run(recipe)
    config = pruned_config(load_config(model.model_name_or_path))
    if model.image_size is not None:
        config = config_at_size(config, model.image_size)
    # The configuration checks the schedule, so this comes before weights and images are loaded.
    schedule = pruning.schedule(config)
    if schedule is None:
        raise ValueError(
            f"{model.model_name_or_path} has no pruning schedule, and none was given: give --prune_layers and "
            "--keep_ratios, or --flops_reduction. To fine-tune a dense model use `hf-vssm-prune train`."
        )
    model.check_schedule(schedule)
    set_seed(recipe.run.seed)
    datasets = recipe.task.load_datasets(data, recipe.run.seed)
    drop_path = recipe.optimization.drop_path
    student = recipe.task.load_model(
        model.model_name_or_path, datasets.label_names, drop_path, model.ignore_mismatched_sizes
    )
    processor = _at_size(recipe.task, student, load_image_processor(model.model_name_or_path), model.image_size)
    student.set_token_pruning(schedule)
    name = model.teacher_name_or_path or model.model_name_or_path
    teacher = _load_teacher(name, student, processor, recipe, model.teacher_dtype, model.image_size)
    card = card_writer(data, recipe, base_model=model.model_name_or_path, pruned=True)
    return Trainer(student, datasets, processor, recipe, teacher, card)


def _check_run(recipe: Recipe) -> None:
    """Checks everything that can be checked before anything is loaded."""
    check_output_dir(recipe.run)
    check_training_precision(recipe.optimization.mixed_precision, find_device("cpu" if recipe.run.use_cpu else None))


def prepare_dense_training(
    data: DataArguments, model: DenseModelArguments, teacher: TeacherArguments, recipe: Recipe
) -> Trainer:
    """Prepares training of a new dense model, or further training of a checkpoint without pruning, with a teacher if
    one is given.

    Raises:
        ValueError, OSError: options do not fit together, or something is missing; the message says what.
    """
    _check_run(recipe)
    set_seed(recipe.run.seed)
    datasets = recipe.task.load_datasets(data, recipe.run.seed)
    drop_path = recipe.optimization.drop_path
    if model.model_name_or_path is None:
        config = model.config(datasets.label_names, drop_path)
        network = recipe.task.auto_class.from_config(config)
        processor = new_image_processor(config, model.image_mean, model.image_std, model.crop_pct)
        processor = _at_size(recipe.task, network, processor, model.image_size)
    else:
        network = recipe.task.load_model(
            model.model_name_or_path, datasets.label_names, drop_path, model.ignore_mismatched_sizes
        )
        network.set_token_pruning(None)
        processor = _at_size(recipe.task, network, load_image_processor(model.model_name_or_path), model.image_size)
    other = _load_teacher(
        teacher.teacher_name_or_path, network, processor, recipe, teacher.teacher_dtype, model.image_size
    )
    card = card_writer(data, recipe, base_model=model.model_name_or_path, pruned=False)
    return Trainer(network, datasets, processor, recipe, other, card)


def _load_teacher(
    name_or_path: str | None,
    student: PrunableModel,
    processor: BaseImageProcessor,
    recipe: Recipe,
    dtype: str,
    image_size: int | None,
) -> PrunableModel | None:
    """The teacher, if the losses need one; see `Task.load_teacher`.

    Raises:
        ValueError: it cannot teach this model, or expects other pixel values than those that the model is given.
    """
    if name_or_path is None or not recipe.losses.needs_teacher:
        return None
    _check_pixel_values("teacher", name_or_path, processor)
    return recipe.task.load_teacher(name_or_path, student.config, recipe.losses, dtype, image_size)


def _check_pixel_values(
    role: str, name_or_path: str, processor: BaseImageProcessor, others: Sequence[str] = ()
) -> None:
    """Raises an error for a checkpoint that cannot be given the pixel values of a model.

    Args:
        role: what error messages call the checkpoint.
        name_or_path: the checkpoint.
        processor: the model's image processor.
        others: entries of image processors that must be the same, in addition to `NORMALIZATION`.

    Raises:
        ValueError: it expects pixel values that were made in another way.
    """
    own, its = (json.loads(each.to_json_string()) for each in (processor, load_image_processor(name_or_path)))
    for step in (*NORMALIZATION, *others):
        if own.get(step) != its.get(step):
            raise ValueError(
                f"The {role} {name_or_path} expects pixel values made with {step} {its.get(step)}, but those of the "
                f"model are made with {own.get(step)}, and both are given the same ones."
            )


def _at_size(
    task: Task, model: PrunableModel, processor: BaseImageProcessor, image_size: int | None
) -> BaseImageProcessor:
    """Adapts a model to another image size, if one is given, and returns the image processor for it.

    Raises:
        ValueError: the task resizes images to another size.
    """
    *frames, height, width = pruned_config(model.config).input_size
    clip_length = processor.to_dict().get("num_frames")
    if frames and clip_length != frames[0]:
        logger.warning(
            "The image processor says that clips have %s frames, but the model's configuration has num_frames %s, to "
            "which budgets, FLOPs and the model card refer.",
            *(clip_length, frames[0]),
        )
    if image_size is None:
        size, configured = output_size(processor), (height, width)
        if size not in (None, configured) and image_processor_of(task, processor) is processor:
            logger.warning(
                "The image processor makes images of (height, width) %s, but the model's configuration has image_size "
                "%s, to which budgets and FLOPs refer: --image_size sets both.",
                *(size, configured),
            )
        return processor
    processor = resize_image_processor(processor, image_size)
    size = output_size(image_processor_of(task, processor))
    if size not in (None, (image_size, image_size)):
        raise ValueError(
            f"--image_size is {image_size}, but --task {task.name} resizes images to (height, width) {size}: see its "
            "own options for their size."
        )
    resize_model(model, image_size)
    return processor


def evaluate(
    data: EvaluationDataArguments,
    options: EvaluationArguments,
    beside: BesideArguments,
    pruning: PruningArguments,
    task: Task | None = None,
) -> dict[str, ModelEvaluation]:
    """Evaluates a model without pruning and, if the model or the options have a schedule, with pruning; with `--int8`,
    also with int8 linear layers.

    Args:
        data, options, beside, pruning: options of the evaluation.
        task: the task; default: image classification.

    Raises:
        ValueError, OSError: options do not fit together, or something is missing; the message says what.
    """
    task = task or default_task()
    device = find_device(options.device)
    if beside.int8 and device.type != "cpu":
        raise ValueError(f"--int8 runs on the CPU only, but the device is {device}: give --device cpu.")
    for name, default in (("dtype", "float32"), ("mixed_precision", "no")):
        if beside.int8 and getattr(options, name) != default:
            raise ValueError(
                f"--int8 needs the rest of the model in float32, but --{name} is {getattr(options, name)}."
            )
    config = pruned_config(load_config(options.model_name_or_path))
    schedule = pruning.schedule(config)
    if schedule is None and beside.dense_name_or_path is not None:
        raise ValueError(
            f"--dense_name_or_path {beside.dense_name_or_path} is compared with a pruned model, but "
            f"{options.model_name_or_path} has no pruning schedule: give --flops_reduction, or --prune_layers and "
            "--keep_ratios."
        )
    rows, label_names = _load_rows(task, data, options)
    load = partial(task.load_model, label_names=label_names, some_labels=True, dtype=options.dtype)
    models = {"dense": load(beside.dense_name_or_path or options.model_name_or_path)}
    if beside.dense_name_or_path is not None:
        processor = load_image_processor(options.model_name_or_path)
        _check_pixel_values("dense model", beside.dense_name_or_path, processor, SIZES)
    models["dense"].set_token_pruning(None)
    if schedule is not None:
        models["pruned"] = load(options.model_name_or_path)
        models["pruned"].set_token_pruning(schedule)
    if beside.int8:
        models |= {f"{name}, int8": quantize_linears(copy.deepcopy(model)) for name, model in models.items()}
    return _compare(task, models, rows, data, options)


def compare_schedules(
    data: EvaluationDataArguments,
    options: EvaluationArguments,
    schedules: Mapping[str, dict[str, Any]],
    task: Task,
) -> dict[str, ModelEvaluation]:
    """Evaluates a model without pruning, and pruned in several ways with the same weights.

    Args:
        data, options: options of the evaluation.
        schedules: `token_pruning` options by name.
        task: the task.

    Raises:
        ValueError, OSError: options do not fit together, or something is missing; the message says what.
    """
    find_device(options.device)  # before anything is loaded
    config = pruned_config(load_config(options.model_name_or_path))
    completed = {"dense": None, **{name: config.complete_token_pruning(each) for name, each in schedules.items()}}
    rows, label_names = _load_rows(task, data, options)
    model = task.load_model(options.model_name_or_path, label_names, some_labels=True, dtype=options.dtype)
    models = {name: _sharing_weights(task, model, each) for name, each in completed.items()}
    return _compare(task, models, rows, data, options)


def method_schedules(name_or_path: str, flops_reduction: float) -> dict[str, dict[str, Any]]:
    """Each pruning method with alignment `none` and `repeat`, and `top` also with every other alignment, and with every
    other importance that the model can compute."""
    variants = {
        f"{method}, {alignment}": {"method": method, "alignment": alignment}
        for method in METHODS
        for alignment in ("none", "repeat")
    }
    variants |= {
        f"top, {alignment}": {"method": "top", "alignment": alignment}
        for alignment in ALIGNMENTS
        if alignment != "learned"  # equals `zero_input` before training
    }
    variants |= {
        f"top, repeat, {importance}": {"method": "top", "alignment": "repeat", "importance": importance}
        for importance in pruned_config(load_config(name_or_path)).importances
        if importance != METHODS["top"].importance
    }
    return {name: {"flops_reduction": flops_reduction, **choices} for name, choices in variants.items()}


def _sharing_weights(task: Task, model: PrunableModel, token_pruning: dict[str, Any] | None) -> PrunableModel:
    """A second model that shares the weights in memory but has its own pruning schedule."""
    with torch.device("meta"):
        other = task.auto_class.from_config(copy.deepcopy(model.config))
    other.load_state_dict(model.state_dict(), assign=True)
    other.set_token_pruning(token_pruning)
    return other


def _load_rows(task: Task, data: EvaluationDataArguments, options: EvaluationArguments) -> tuple[Any, Sequence[str]]:
    """The rows of the data set chosen by the options, and the names of its labels."""
    set_seed(options.seed)
    exclude("eval_split", data.eval_split, "train_val_split", options.train_val_split)
    if options.train_val_split is None:
        rows, label_names = task.load_evaluation_dataset(data, options.seed)
        if data.eval_split is None and str(getattr(rows, "split", None)) == "train":
            logger.warning(
                "'%s' has no split for evaluation: all its %d rows are evaluated. For a model that was trained on some "
                "of them, the results are too good; --train_val_split evaluates those that were held out.",
                *(data.dataset_name, len(rows)),
            )
        return rows, label_names
    datasets = task.load_datasets(DataArguments(**asdict(data), train_val_split=options.train_val_split), options.seed)
    return datasets.evaluation, datasets.label_names


def _compare(
    task: Task,
    models: Mapping[str, PrunableModel],
    rows: Any,
    data: EvaluationDataArguments,
    options: EvaluationArguments,
) -> dict[str, ModelEvaluation]:
    loader: DataLoader = DataLoader(
        task.evaluation_items(rows, load_image_processor(options.model_name_or_path)),  # type: ignore[arg-type]
        batch_size=options.per_device_eval_batch_size,
        collate_fn=task.collate,
        num_workers=data.dataloader_num_workers,
    )
    dtype = MIXED_PRECISIONS[options.mixed_precision]
    return compare_models(task, models, loader, find_device(options.device), dtype)


def report(compute: Callable[[], dict[str, ModelEvaluation]], options: EvaluationArguments, task: Task) -> int:
    """Writes a comparison to the files of `--json` and `--save_results`, and prints it as a table. Returns the exit
    status: 0, or 1 after an error, which is printed on one line."""
    try:
        evaluations = compute()
        results = {name: asdict(evaluation) for name, evaluation in evaluations.items()}
        if options.json is not None:
            write_json(results, Path(options.json))
        if options.save_results is not None:
            save_results(options.save_results, results)
        print(comparison_table(task, evaluations))
    except (ValueError, OSError) as error:
        print(f"error: {_in_a_line(error)}", file=sys.stderr)
        return 1
    return 0


def _in_a_line(error: Exception) -> str:
    """An error message on one line: an image error from a loader's worker includes a traceback."""
    return str(error).splitlines()[-1] if isinstance(error, ImageError) else str(error)


def show_messages() -> None:
    """Shows what a run logs, such as the results of each epoch."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, force=True)
    for library in ("accelerate", "httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Progress bars for saving a few megabytes would break up the training's own bar.
    transformers_logging.disable_progress_bar()


def run(prepare: Callable[[], Trainer]) -> int:
    """Runs a job and returns the exit status: 0 on success, 1 after an error (printed on one line), or 128 + the
    signal's number if a signal stopped the run, as in shells."""
    show_messages()
    try:
        with lost_processes_named():
            trainer = prepare()
    except (ProcessLostError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        trainer.train()
    except TrainingInterruptedError as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signal
    except (TrainingDivergedError, ProcessLostError, ValueError, OSError) as error:
        print(f"error: {_in_a_line(error)}", file=sys.stderr)
        return 1
    options = trainer.recipe.run
    if options.push_to_hub and trainer.accelerator.is_main_process:
        try:
            commit = push_model(
                Path(options.output_dir) / "best", str(options.hub_model_id), private=options.hub_private_repo or None
            )
        except (ValueError, OSError) as error:
            print(f"error: {error}\nThe model is in {options.output_dir}; see `hf-vssm-prune push`.", file=sys.stderr)
            return 1
        logger.info("Pushed to %s", commit.commit_url)
    return 0
