"""Compares the accuracy of adapters with that of full fine-tuning: prunes the example model, fine-tunes it with LoRA,
with DoRA and in full, each with several seeds, and prints a table.

    python docs/examples/compare_adapters.py --seeds 0 1 2
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, TrainingArguments

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.hub.loading import load_image_processor
from hf_vssm_prune.metrics import load_metric
from hf_vssm_prune.training import TokenPruningTrainer
from hf_vssm_prune.training.arguments.parsing import count
from hf_vssm_prune.training.augmentation import AugmentationConfig
from hf_vssm_prune.training.data import EvaluationImages, TrainingImages, load_image_dataset


TARGETS = ["in_proj", "x_proj", "out_proj"]
# The adapters, and below them the learning rates.
ADAPTERS = {
    "LoRA of rank 8": LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=["classifier"]),
    "DoRA of rank 8": LoraConfig(
        r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=["classifier"], use_dora=True
    ),
    "all parameters": None,
}
LEARNING_RATES = {"LoRA of rank 8": 1e-3, "DoRA of rank 8": 1e-3, "all parameters": 1e-4}
FLIP_ONLY = AugmentationConfig(
    random_resized_crop_scale=None, horizontal_flip=0.5, randaugment_num_ops=0, random_erasing=0.0
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="trashnet", help="default: %(default)s, which the package includes")
    parser.add_argument("--flops_reduction", type=float, default=0.6, help="default: %(default)s")
    parser.add_argument("--num_train_epochs", type=float, default=1, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--max_train_samples", type=count, help="number of training images (default: all)")
    parser.add_argument("--max_eval_samples", type=count, help="number of evaluation images (default: all)")
    parser.add_argument("--output_dir", default="runs/adapters", help="default: %(default)s")
    options = parser.parse_args(arguments)
    trainers = Trainers(options)
    dense, pruned = (trainers.accuracy(trainers.model(budget)) for budget in (None, options.flops_reduction))
    found = {(name, seed): trainers.train(name, seed) for seed in options.seeds for name in LEARNING_RATES}
    print("| | trained parameters | learning rate | top-1 |", "| --- | ---: | ---: | ---: |", sep="\n")
    print(f"| dense | | | {dense:.2%} |", f"| pruned, not fine-tuned | | | {pruned:.2%} |", sep="\n")
    for name, rate in LEARNING_RATES.items():
        accuracies = [found[name, seed][1] for seed in options.seeds]
        spread = f" ± {statistics.stdev(accuracies) * 100:.2f}" if len(accuracies) > 1 else ""
        parameters = found[name, options.seeds[0]][0]
        print(f"| {name} | {parameters:,} | {rate:.0e} | {statistics.mean(accuracies):.2%}{spread} |")
    return 0


class Trainers:
    """Trains and evaluates on one data set."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.image_processor = load_image_processor(EXAMPLE_MODEL)
        self.images = load_image_dataset(
            options.dataset_name,
            max_train_samples=options.max_train_samples,
            max_eval_samples=options.max_eval_samples,
        )

    def model(self, flops_reduction: float | None) -> nn.Module:
        model = AutoModelForImageClassification.from_pretrained(EXAMPLE_MODEL)
        model.set_token_pruning(None if flops_reduction is None else {"flops_reduction": flops_reduction})
        return model

    def trainer(self, model: nn.Module, learning_rate: float = 0.0, seed: int = 0) -> TokenPruningTrainer:
        return TokenPruningTrainer(
            model,
            TrainingArguments(
                self.options.output_dir,
                num_train_epochs=self.options.num_train_epochs,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=16,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=TrainingImages(self.images.train, self.image_processor, FLIP_ONLY),
            eval_dataset=EvaluationImages(self.images.evaluation, self.image_processor),
            compute_metrics=lambda prediction: load_metric("top_k_accuracy").compute(
                predictions=prediction.predictions.argmax(-1), references=prediction.label_ids
            ),
        )

    def accuracy(self, model: nn.Module) -> float:
        return self.trainer(model).evaluate()["eval_top1"]

    def train(self, name: str, seed: int) -> tuple[int, float]:
        """The number of trained parameters, and the accuracy, which is also appended to a file in the output folder."""
        torch.manual_seed(seed)  # for the adapters' initial weights
        model = self.model(self.options.flops_reduction)
        if ADAPTERS[name] is not None:
            model = get_peft_model(model, ADAPTERS[name])
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        trainer = self.trainer(model, LEARNING_RATES[name], seed)
        trainer.train()
        accuracy = trainer.evaluate()["eval_top1"]
        folder = Path(self.options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "accuracies.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "seed": seed, "top1": accuracy}) + "\n")
        return trained, accuracy


if __name__ == "__main__":
    sys.exit(main())
