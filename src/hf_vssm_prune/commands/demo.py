"""Prunes and fine-tunes the package's example model, in a few minutes on two cores.

    hf-vssm-prune demo          # `make demo` first creates an environment for it

It writes `demo_output/model/`, a folder ready for the Hub, with a model card and a picture of the kept tokens, and
`demo_output/finetuning/`, the output of the fine-tuning.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.commands import one_line_errors
from hf_vssm_prune.commands.parsing import command_parser
from hf_vssm_prune.environment import command_line
from hf_vssm_prune.families import ImageClassifier
from hf_vssm_prune.flops import count_flops
from hf_vssm_prune.hub.loading import load_classifier, load_image_processor
from hf_vssm_prune.hub.model_card import Evaluation, Measurement, ModelCardInfo, TrainingRecipe
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.pruning_methods import PAPERS_METHOD, RECOMMENDED_METHOD
from hf_vssm_prune.publication import TOP_REDUCTION
from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import (
    DataArguments,
    FinetuneArguments,
    OptimizationArguments,
    PruningArguments,
    RunArguments,
)
from hf_vssm_prune.training.data import EvaluationImages, collate, load_evaluation_dataset
from hf_vssm_prune.training.data.sources import PACKAGED_DATA
from hf_vssm_prune.training.evaluation import ModelEvaluation, compare_models
from hf_vssm_prune.training.interruption import TrainingInterruptedError
from hf_vssm_prune.training.loop import Recipe
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.visualization import draw_classification, image_from_pixel_values, image_statistics


DATASET = str(PACKAGED_DATA / "trashnet")  # not by name, because the working folder may have a folder of that name
BUDGET = {"flops_reduction": TOP_REDUCTION}
PAPERS: dict[str, Any] = BUDGET | {"method": PAPERS_METHOD}
DEFAULT: dict[str, Any] = BUDGET | {"method": RECOMMENDED_METHOD}
DENSE, FINETUNED = "dense", f"{RECOMMENDED_METHOD}, fine-tuned"
UNTRAINED: dict[str, dict[str, Any] | None] = {
    DENSE: None,
    "top, naive": PAPERS | {"alignment": "none"},
    "top, aligned (the paper's)": PAPERS,
    f"{RECOMMENDED_METHOD} (our default)": DEFAULT,
}
FINETUNINGS: dict[str, dict[str, Any]] = {"top, aligned, fine-tuned": PAPERS, FINETUNED: DEFAULT}


@one_line_errors()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs the demo and returns the exit status: 1 if the saved model gives other predictions, or 128 + the signal's
    number if a signal stopped it, as in shells."""
    options = make_parser(prog).parse_args(arguments)
    jobs.show_messages()
    start = time.perf_counter()
    output = Path(options.output_dir)
    dataset, _ = load_evaluation_dataset(DATASET, max_samples=options.max_eval_samples)
    image_processor = load_image_processor(EXAMPLE_MODEL)
    images = EvaluationImages(dataset, image_processor)

    models = {name: load_example(pruning) for name, pruning in UNTRAINED.items()}
    for name, pruning in FINETUNINGS.items():
        say(f"Fine-tuning the model pruned by {pruning['method']}, with the dense one as its teacher")
        folder = output / "finetuning" / pruning["method"]
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier demo
        try:
            jobs.prepare_finetuning(*recipe(options, folder, pruning)).train()
        except TrainingInterruptedError as interruption:
            say(f"Stopped by {interruption.signal.name}. The next demo begins anew.")
            return 128 + interruption.signal
        models[name] = load_classifier(folder / "last")

    say(f"Evaluating on {len(images)} test images; all models run on each batch in turn")
    loader = DataLoader(images, batch_size=50, collate_fn=collate)
    evaluations = compare_models(ImageClassification(), models, loader, torch.device("cpu"))

    say("Saving the pruned model, and loading it in a new process")
    output.mkdir(parents=True, exist_ok=True)
    shown = torch.stack([images[index]["pixel_values"] for index in range(min(12, len(images)))[::2]])
    picture = output / "kept_tokens.png"
    draw_classification(models[FINETUNED], shown, *image_statistics(image_processor)).save(picture)
    card = model_card(evaluations, picture, shlex.join(command_line()))
    folder = save_for_hub(models[FINETUNED], output / "model", image_processor, card)
    reopened = reopen(folder, models[FINETUNED], shown)

    print("\n" + table(models, evaluations) + "\n")
    gained = evaluations[FINETUNED].metrics["top1"] - evaluations[DENSE].metrics["top1"]
    faster = evaluations[FINETUNED].images_per_second / evaluations[DENSE].images_per_second
    reduction = count_flops(models[FINETUNED].config).reduction
    print(f"{reduction:.1%} fewer FLOPs, {faster:.2f}× the speed, {100 * gained:+.2f} points of accuracy.")
    print(
        f"The saved model, loaded in a new process, gives {'the same' if reopened else 'OTHER'} predictions: {folder}"
    )
    print(f"Picture of the kept tokens: {picture}")
    print(f"This took {time.perf_counter() - start:.0f} s.")
    return 0 if reopened else 1


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("--output_dir", default="demo_output", help="output folder (default: %(default)s)")
    parser.add_argument(
        "--num_train_epochs", "--epochs", type=int, default=2, help="epochs of fine-tuning (default: %(default)s)"
    )
    parser.add_argument("--max_train_samples", type=int, help="number of training images (default: all)")
    parser.add_argument("--max_eval_samples", type=int, help="number of evaluation images (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    return parser


def say(message: str) -> None:
    print(f"\n{message}", flush=True)


def recipe(
    options: argparse.Namespace, folder: Path, token_pruning: dict[str, Any]
) -> tuple[DataArguments, FinetuneArguments, PruningArguments, Recipe]:
    """The paper's fine-tuning, shortened: few epochs at a higher learning rate, with the augmentation used to train the
    dense model."""
    limits = {"max_train_samples": options.max_train_samples, "max_eval_samples": options.max_eval_samples}
    data = DataArguments(DATASET, dataloader_num_workers=0, **limits)
    model = FinetuneArguments(model_name_or_path=str(EXAMPLE_MODEL))
    optimization = OptimizationArguments(
        num_train_epochs=options.num_train_epochs,
        learning_rate=5e-5,
        warmup_lr=0,
        min_lr=0,
        warmup_epochs=0.1,
        model_ema=False,
    )
    augmentation = AugmentationArguments(
        scale=[0.35, 1.0], randaugment_num_ops=2, randaugment_magnitude=7, reprob=0.1, mixup=0.1, cutmix=0
    )
    run = RunArguments(str(folder), seed=options.seed)
    pruning = PruningArguments(flops_reduction=token_pruning["flops_reduction"], prune_method=token_pruning["method"])
    return data, model, pruning, Recipe(optimization, ImageClassification(augmentation), run, model.loss_weights())


def load_example(token_pruning: dict | None) -> ImageClassifier:
    """The dense example model with a pruning schedule and unchanged weights."""
    model = load_classifier(EXAMPLE_MODEL)
    model.set_token_pruning(token_pruning)
    return model


def model_card(evaluations: dict[str, ModelEvaluation], picture: Path, command: str) -> ModelCardInfo:
    measurements = [
        Measurement.of_metrics(
            name,
            evaluation.metrics,
            images_per_second=evaluation.images_per_second,
            pruned=name != DENSE,
            multiply_adds=round(1e9 * evaluation.gflops_published),
        )
        for name, evaluation in evaluations.items()
    ]
    return ModelCardInfo(
        name="plainmamba-trashnet-pruned",
        summary="A small PlainMamba that sorts photographs of waste into six classes, and merges similar patches.",
        license="apache-2.0",
        license_notice="TrashNet is by Gary Thung and Mindy Yang, under the MIT licence.",
        datasets=["garythung/trashnet"],
        training=TrainingRecipe(command, "Fine-tuned with the dense model as its teacher."),
        evaluation=Evaluation(
            dataset_name="TrashNet",
            dataset_id="garythung/trashnet",
            split="test",
            num_images=evaluations[FINETUNED].num_images,
            this_model=measurements[-1],
            others=measurements[:-1],
            hardware=f"a CPU with {torch.get_num_threads()} threads",
        ),
        picture=picture,
        limits=["It was trained only on single pieces of waste on a white board."],
    )


@torch.no_grad()
def reopen(folder: Path, model: ImageClassifier, pixel_values: Tensor) -> bool:
    """Whether a new process that loads the folder gets the same outputs as this model."""
    logits = model(pixel_values).logits
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        statistics = image_statistics(load_image_processor(folder))
        for index, image in enumerate(pixel_values):
            files.append(str(Path(scratch) / f"{index}.png"))
            image_from_pixel_values(image, *statistics).save(files[-1])
        command = [sys.executable, "-m", "hf_vssm_prune", "reopen", str(folder), *files]
        answers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    labels = [model.config.label_names[label] for label in logits.argmax(-1).tolist()]
    same_logits = torch.allclose(torch.tensor(answers["logits"]), logits, atol=1e-4)
    return same_logits and answers["labels"] == labels


def table(models: dict[str, ImageClassifier], evaluations: dict[str, ModelEvaluation]) -> str:
    """A Markdown table with the accuracy, FLOPs and speed of each model."""
    lines = ["| model | top-1 | MFLOPs | fewer FLOPs | images/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, evaluation in evaluations.items():
        flops = count_flops(models[name].config)
        lines.append(
            f"| {name} | {evaluation.metrics['top1']:.2%} | {flops.pruned.published / 1e6:.1f} "
            f"| {flops.reduction:.1%} | {evaluation.images_per_second:.0f} |"
        )
    return "\n".join(lines)
