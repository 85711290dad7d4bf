"""The training runs that `test_distributed.py` starts on two processes, one after another in a single launch.

    python tests/distributed_runs.py FOLDER     # in each process, with a launcher's environment

Every run writes its losses to FOLDER/<name>/losses.json, with its checkpoints and models next to it. The test's own
process calls the same functions for runs on one process.
"""

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import TOKEN_PRUNING, make_plainmamba_config, make_video_config, make_vim_config
from tested_tasks import TESTED, MeanColour

from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.training.arguments import (
    DataArguments,
    ElasticArguments,
    OptimizationArguments,
    RunArguments,
    ScaleArguments,
)
from hf_vssm_prune.training.data import ImageDatasets, load_image_dataset, load_image_stream
from hf_vssm_prune.training.data.media import IMAGES, VIDEOS
from hf_vssm_prune.training.evaluation import evaluate_model
from hf_vssm_prune.training.loop import Recipe, Trainer
from hf_vssm_prune.training.losses import LossWeights
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.video_classification import VideoClassification, VideoTrainingArguments


CONFIGS = {
    "vim": make_vim_config,
    "plainmamba": make_plainmamba_config,
    "videos": make_video_config,
    "masks": make_vim_config,
    "boxes": make_vim_config,
}
# 146 images and 12 to a step: 12 steps in an epoch, and two images left over. Half of 12 or of 26 steps is in
# the middle of an epoch.
IMAGES_PER_STEP = 12
FSDP = {"fsdp": True}
FROZEN = {"batch_norm": "frozen"}
# The parameters of `learned` are not used in a step that drops no tokens.
ELASTIC = {"elastic": [0.0, 0.2], "pruning": {"alignment": "learned"}}
# Adam turns the rounding error of a gradient into a full step, which matching would amplify.
BOXES = {"task": "object-detection", "family": "boxes", "adam_epsilon": 1e-3}
# Without a teacher, 12 steps at the usual learning rate change little.
VIDEOS_ALONE = {"task": "video-classification", "family": "videos", "teacher": None, "learning_rate": 5e-3}
ONE_PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "one": {},
    "one_long": {"steps": 26},
    "one_plainmamba": {"family": "plainmamba", "scale": FROZEN},
    "one_bf16": {"mixed_precision": "bf16"},
    "one_streamed": {"streaming": True},
    "one_half_teacher": {"teacher": "bfloat16"},
    "one_plainmamba_teacher": {"teacher_family": "plainmamba"},
    "one_elastic": ELASTIC,
    "one_toy": {"task": "mean-colour"},
    "one_masks": {"task": "semantic-segmentation", "family": "masks", "scale": FROZEN},
    "one_boxes": {**BOXES, "scale": FROZEN},
    "one_video": VIDEOS_ALONE,
}
TWO_PROCESS_RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_long": {"steps": 26},
    "ddp_accumulated": {"accumulation": 3},
    "ddp_streamed": {"streaming": True},
    "ddp_streamed_from_one": {"streaming": True, "resume": "one_streamed"},
    "ddp_from_one": {"resume": "one"},
    "ddp_elastic": ELASTIC,
    "ddp_masks": {"task": "semantic-segmentation", "family": "masks", "scale": FROZEN},
    "fsdp_boxes": {**BOXES, "scale": {**FSDP, **FROZEN}},
    "fsdp_video": {**VIDEOS_ALONE, "scale": FSDP},
    "fsdp_toy_from_one": {"task": "mean-colour", "resume": "one_toy", "scale": FSDP},
    "fsdp_elastic": {**ELASTIC, "scale": FSDP},
    "fsdp": {"scale": FSDP},
    "fsdp_long": {"steps": 26, "scale": FSDP},
    "fsdp_plainmamba": {"family": "plainmamba", "scale": {**FSDP, **FROZEN}},
    "fsdp_bf16": {"mixed_precision": "bf16", "scale": FSDP},
    "fsdp_accumulated": {"accumulation": 3, "scale": {**FSDP, "gradient_checkpointing": True}},
    "fsdp_half_teacher": {"teacher": "bfloat16", "scale": FSDP},
    "fsdp_plainmamba_teacher": {"teacher_family": "plainmamba", "tracking": True, "scale": FSDP},
    "fsdp_from_one": {"resume": "one", "scale": FSDP},
    "fsdp_from_fsdp": {"resume": "fsdp", "scale": FSDP},
}
# Mixing, drop path and random importance differ for each process's batch; images do not.
TASKS = {
    "image-classification": lambda: ImageClassification(AugmentationArguments(mixup=0.0, cutmix=0.0, smoothing=0.1)),
    "mean-colour": MeanColour,
    "object-detection": TESTED["object-detection"].plain,
    "semantic-segmentation": TESTED["semantic-segmentation"].plain,
    "video-classification": lambda: VideoClassification(VideoTrainingArguments(mixup=0.0, cutmix=0.0, num_clips=2)),
}


def train(
    folder: Path,
    name: str,
    family: str = "vim",
    task: str = "image-classification",
    steps: int = 12,
    learning_rate: float = 1e-3,
    accumulation: int = 1,
    teacher: str | None = "float32",
    teacher_family: str | None = None,
    tracking: bool = False,
    streaming: bool = False,
    resume: str | None = None,
    scale: dict[str, Any] | None = None,
    elastic: Sequence[float] = (),
    pruning: dict[str, Any] | None = None,
    **optimization: Any,
) -> Trainer:
    """One run with the same images in each step, regardless of the number of processes and batches.

    Args:
        teacher: precision of the teacher's weights; None: no teacher.
        teacher_family: the teacher's family, if it is not the model's; the losses then compare only logits.
        tracking: whether metrics and pictures are logged to the trackers.
        resume: name of the run from whose checkpoint after half of the steps this one resumes.
        elastic: budgets, one of which is drawn at each step.
        pruning: options that differ from `TOKEN_PRUNING`.
    """
    output_dir = folder / name
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = Recipe(
        OptimizationArguments(
            max_train_steps=steps,
            per_device_train_batch_size=IMAGES_PER_STEP // num_processes // accumulation,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=4,
            learning_rate=learning_rate,
            warmup_epochs=0.0,
            clip_grad=1.0,
            model_ema_decay=0.9,
            **optimization,
        ),
        TASKS[task](),
        RunArguments(
            output_dir=str(output_dir),
            use_cpu=True,
            checkpointing_steps=str(steps // 2),
            save_total_limit=9,
            logging_steps=1,
            resume=None if resume is None else str(folder / resume / f"checkpoint-{steps // 2}"),
            with_tracking=tracking,
        ),
        LossWeights(kd_weight=1.0, alignment_weight=float(teacher_family is None)) if teacher else LossWeights(),
        scale=ScaleArguments(**(scale or {})),
        elastic=ElasticArguments(elastic_budgets=list(elastic)),
    )
    torch.manual_seed(0)
    config = CONFIGS[family](token_pruning={**TOKEN_PRUNING, **(pruning or {})})
    model = recipe.task.auto_class.from_config(config)
    teacher_model = None
    if teacher:
        source = folder / f"teacher-{teacher_family or family}"
        teacher_model = recipe.task.auto_class.from_pretrained(source, dtype=teacher)
    datasets = load_image_stream(folder / "parquet", shuffle_buffer_size=8) if streaming else load(folder, family, task)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    trainer = Trainer(model, datasets, processor, recipe, teacher_model)
    record(trainer, output_dir)
    trainer.train()
    return trainer


@cache
def load(folder: Path, family: str, task: str) -> ImageDatasets:
    """Stored images for a run. Runs of the same kind share them."""
    if family in ("masks", "boxes"):
        return TASKS[task]().load_datasets(DataArguments(str(folder / family)), seed=0)
    is_video = family == "videos"
    return load_image_dataset(folder / ("videos" if is_video else "images"), medium=VIDEOS if is_video else IMAGES)


def record(trainer: Trainer, output_dir: Path) -> None:
    """Makes a run write its losses to a file."""
    losses: list[float] = []
    log_losses = trainer._log_losses

    def log_and_record(epoch: int, log: Any) -> None:
        log_losses(epoch, log)
        losses.append(log.means()["loss"])
        if trainer.accelerator.is_main_process:
            (output_dir / "losses.json").write_text(json.dumps(losses))

    trainer._log_losses = log_and_record  # type: ignore[method-assign]


def check_unequal_evaluation(trainer: Trainer) -> None:
    """Evaluates a sharded model which the second process runs twice for each batch, as for images of two sizes."""
    task, count = TASKS["image-classification"](), 1 + trainer.accelerator.process_index

    def predict(model: Any, batch: Any) -> Any:
        for _ in range(count):
            outputs = model(**task.inputs(batch))
        return outputs

    task.predict = predict  # type: ignore[attr-defined]
    metrics = evaluate_model(task, trainer.model, trainer.loaders.eval, trainer.accelerator)
    assert metrics is not None
    assert all(trainer.state.history[-1][f"eval_{name}"] == value for name, value in metrics.items())


def reset() -> None:
    """Resets Accelerate's singletons and its FSDP environment variable, but keeps torch's process group."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main(folder: Path) -> None:
    # Each run ends with its process group; here they share one.
    PartialState.destroy_process_group = lambda self, group=None: None
    for name, options in TWO_PROCESS_RUNS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        trainer = train(folder, name, **options)
        assert trainer.accelerator.num_processes == 2
        for part in filter(None, (trainer.model, trainer.teacher, trainer.ema.model)):
            # Parameters outside the layers stay gathered after a forward pass without a backward pass.
            kinds = {type(parameter).__name__ for parameter in part.parameters()}
            assert ("DTensor" in kinds) == name.startswith("fsdp"), f"{name} has {kinds}"
        if name == "fsdp":
            check_unequal_evaluation(trainer)
        reset()
        print(name, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
