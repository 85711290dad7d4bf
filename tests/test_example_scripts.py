"""The steps of transformers' run_image_classification.py and its no_trainer version, in the same order and with the
same arguments. The scripts themselves need torchvision, which has to match torch, and metrics from the Hub."""

import os
from pathlib import Path

import pytest
import torch
from conftest import TOKEN_PRUNING, make_plainmamba_config, make_vim_config
from forking import run_forked
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import new_image_processor


# The model of three labels gets a new classifier for the two of the data set, as the scripts give it one.
START = """
import sys
import numpy as np
import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

folder, images, output = sys.argv[1:]
dataset = load_dataset("imagefolder", data_dir=images)
labels = dataset["train"].features["label"].names
label2id, id2label = {}, {}
for i, label in enumerate(labels):
    label2id[label] = str(i)
    id2label[str(i)] = label
config = AutoConfig.from_pretrained(
    folder, num_labels=len(labels), label2id=label2id, id2label=id2label, finetuning_task="image-classification",
    cache_dir=None, revision="main", token=None, trust_remote_code=True,
)
model = AutoModelForImageClassification.from_pretrained(
    folder, from_tf=False, config=config, cache_dir=None, revision="main", token=None, trust_remote_code=True,
    ignore_mismatched_sizes=True,
)
image_processor = AutoImageProcessor.from_pretrained(
    folder, cache_dir=None, revision="main", token=None, trust_remote_code=True
)
if "shortest_edge" in image_processor.size:
    size = image_processor.size["shortest_edge"]
else:
    size = (image_processor.size["height"], image_processor.size["width"])
mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image_processor.image_mean, image_processor.image_std))


def transforms(batch):  # with Pillow, where the scripts have torchvision
    pixels = [np.array(image.convert("RGB").resize((size, size))) for image in batch["image"]]
    batch["pixel_values"] = [(torch.from_numpy(each).permute(2, 0, 1) / 255 - mean) / std for each in pixels]
    return batch


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

"""

WITH_TRAINER = """
def compute_metrics(p):
    return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}


dataset["train"].set_transform(transforms)
arguments = TrainingArguments(
    output, remove_unused_columns=False, max_steps=2, report_to="none", use_cpu=True, per_device_train_batch_size=4
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=dataset["train"], eval_dataset=dataset["train"],
    compute_metrics=compute_metrics, processing_class=image_processor, data_collator=collate_fn,
)
trainer.train()
trainer.save_model()
trainer.evaluate()
trainer.create_model_card(finetuned_from=folder, tasks="image-classification", tags=["vision"])
"""

WITHOUT_TRAINER = """
from accelerate import Accelerator
from torch.utils.data import DataLoader

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
loader = DataLoader(dataset["train"].with_transform(transforms), shuffle=True, collate_fn=collate_fn, batch_size=4)
no_decay = ["bias", "LayerNorm.weight"]
groups = [
    {"params": [p for n, p in model.named_parameters() if not any(part in n for part in no_decay)], "weight_decay": 1},
    {"params": [p for n, p in model.named_parameters() if any(part in n for part in no_decay)], "weight_decay": 0.0},
]
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(groups, lr=1e-3), loader)
model.train()
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
model.eval()
for batch in loader:
    with torch.no_grad():
        outputs = model(**batch)
    predictions, references = accelerator.gather_for_metrics((outputs.logits.argmax(dim=-1), batch["labels"]))
    assert predictions.shape == references.shape
unwrapped = accelerator.unwrap_model(model)
unwrapped.save_pretrained(output, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
image_processor.save_pretrained(output)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for label in ("cat", "dog"):
        for i in range(6):
            file = folder / "train" / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((40, 36), 50 + i).save(file)
    return folder


@pytest.mark.parametrize("script", [WITH_TRAINER, WITHOUT_TRAINER], ids=["Trainer", "no_trainer"])
@pytest.mark.parametrize("make_config", [make_plainmamba_config, make_vim_config])
def test_what_the_example_scripts_do_with_a_model(make_config, script, images, tmp_path):
    config = make_config(token_pruning=dict(TOKEN_PRUNING))
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    folder = save_for_hub(AutoModelForImageClassification.from_config(config), tmp_path / "model", processor)
    command = ["-c", START + script, folder, images, tmp_path / "out"]
    done = run_forked(*command, prepare=lambda: os.chdir(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert opened.config.id2label == {0: "cat", 1: "dog"}
    assert opened.config.token_pruning["layers"] == TOKEN_PRUNING["layers"]
    assert torch.isfinite(opened(torch.randn(1, 3, 32, 32)).logits).all()
