"""The package's metrics as `evaluate` modules, compared with slow and simple implementations."""

import json
import os
import subprocess
import sys
from io import BytesIO

import evaluate
import numpy as np
import pytest
from conftest import PATIENCE
from datasets import Dataset
from forking import Forked
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.__main__ import main
from hf_vssm_prune.hub.loading import load_image_processor
from hf_vssm_prune.hub.model_card import Evaluation, ModelCardInfo, create_model_card
from hf_vssm_prune.metrics import METRICS, evaluator, load_metric
from hf_vssm_prune.metrics.mean_iou.mean_iou import iou_from_areas, label_areas
from hf_vssm_prune.training.data import load_evaluation_dataset


@pytest.mark.parametrize("guesses", [1, 3, 5, 7])
def test_top_k_accuracy_counts_labels_among_the_first_guesses(guesses):
    generator = np.random.default_rng(guesses)
    predictions = np.argsort(generator.random((40, 9)), axis=1)[:, :guesses]
    references = generator.integers(9, size=40)
    k = range(1, guesses + 1)
    metrics = load_metric("top_k_accuracy").compute(predictions=predictions, references=references, k=k)
    for each in k:
        hits = [label in row[:each] for row, label in zip(predictions.tolist(), references.tolist(), strict=True)]
        assert metrics[f"top{each}"] == pytest.approx(sum(hits) / 40)
    by_default = load_metric("top_k_accuracy").compute(predictions=predictions, references=references)
    assert list(by_default) == (["top1", "top5"] if guesses >= 5 else ["top1"])


def test_top_k_accuracy_takes_one_guess_and_batches():
    metric = load_metric("top_k_accuracy")
    metric.add_batch(predictions=[1, 2], references=[1, 0])
    metric.add_batch(predictions=[3, 3], references=[3, 3])
    assert metric.compute() == {"top1": 0.75}
    assert metric.compute(predictions=[[0, -1]], references=[1], k=np.int64(2)) == {"top2": 0.0}


@pytest.mark.parametrize("k", [0, 3, [1, 3]])
def test_top_k_accuracy_refuses_more_guesses_than_there_are(k):
    with pytest.raises(ValueError, match=r"each must be from 1 to 2, the guesses of each image"):
        load_metric("top_k_accuracy").compute(predictions=[[0, 1]], references=[1], k=k)


def plain_iou(predictions, references, num_labels: int, ignore_index: int) -> list[float]:
    """Intersection over union of each label, pixel by pixel."""
    shared, either = [0] * num_labels, [0] * num_labels
    for prediction, reference in zip(predictions, references, strict=True):
        for guess, label in zip(prediction.flat, reference.flat, strict=True):
            if label == ignore_index:
                continue
            for each in range(num_labels):
                shared[each] += int(guess == each and label == each)
                either[each] += int(guess == each or label == each)
    return [a / b if b else float("nan") for a, b in zip(shared, either, strict=True)]


def test_mean_iou_of_images_of_several_sizes():
    generator = np.random.default_rng(0)
    shapes = [(5, 7), (6, 4), (1, 9)]
    predictions = [generator.integers(4, size=shape) for shape in shapes]
    references = [generator.choice([0, 1, 2, 255], size=shape) for shape in shapes]
    options = {"num_labels": 6, "ignore_index": 255}
    metrics = load_metric("mean_iou").compute(predictions=predictions, references=references, **options)
    expected = plain_iou(predictions, references, **options)
    np.testing.assert_allclose(metrics["per_category_iou"], expected)
    assert metrics["mean_iou"] == pytest.approx(np.nanmean(expected))
    assert np.isnan(metrics["per_category_iou"][4:]).all()
    pairs = list(zip(predictions, references, strict=True))
    kept = np.concatenate([label[label != 255] == guess[label != 255] for guess, label in pairs])
    assert metrics["overall_accuracy"] == pytest.approx(kept.mean())

    gathered = sum(label_areas(guess, label, 6, 255) for guess, label in pairs)
    np.testing.assert_equal(iou_from_areas(gathered), metrics)
    filled = load_metric("mean_iou").compute(predictions=predictions, references=references, nan_to_num=0, **options)
    assert filled["per_category_iou"][4] == 0
    assert filled["mean_iou"] == metrics["mean_iou"]


def test_mean_iou_renames_labels():
    predictions, references = [np.array([[0, 1, 1]])], [np.array([[1, 2, 0]])]
    options = {"num_labels": 2, "ignore_index": 255}
    reduced = load_metric("mean_iou").compute(
        predictions=predictions, references=references, reduce_labels=True, **options
    )
    assert reduced["mean_iou"] == 1
    mapped = load_metric("mean_iou").compute(
        predictions=predictions, references=references, label_map={1: 0, 2: 1, 0: 1}, **options
    )
    assert mapped["mean_iou"] == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ([[0, 1]], [[0]], r"A prediction is \(1, 2\) and its reference \(1, 1\)"),
        ([[0, 2]], [[0, 1]], "A prediction has label ids from 0 to 2; with num_labels 2"),
        ([[0, 1]], [[0, 200]], "A reference has label ids from 0 to 200"),
    ],
)
def test_mean_iou_names_what_does_not_fit(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        load_metric("mean_iou").compute(
            predictions=[prediction], references=[reference], num_labels=2, ignore_index=255
        )


def test_unknown_metrics_are_named():
    with pytest.raises(ValueError, match="no metric 'f1'; the metrics are mean_iou, top_k_accuracy"):
        load_metric("f1")


PROGRAM = """
import socket, sys

def refuse(*_):
    raise OSError("no network in this test")

socket.socket.connect = socket.create_connection = refuse
import evaluate
from hf_vssm_prune.metrics import METRICS

process = int(sys.argv[1])
options = {"num_process": 2, "process_id": process, "experiment_id": "test", "cache_dir": sys.argv[2]}
metric = evaluate.load(METRICS["top_k_accuracy"], **options)
metric.add_batch(predictions=[[process, 5], [3, 4]], references=[0, 3])
print(metric.compute(k=[1, 2]))
"""


def test_modules_load_without_a_network_and_compute_over_processes(tmp_path):
    """`evaluate` combines results of several processes through files in a shared folder."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    other = Forked("-c", PROGRAM, 1, tmp_path, environment=environment)
    command = [sys.executable, "-c", PROGRAM, "0", str(tmp_path)]
    first = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=PATIENCE)
    second = other.wait()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.strip() == "{'top1': 0.75, 'top2': 0.75}"
    assert second.stdout.strip() == "None"


@pytest.mark.parametrize("name", METRICS)
def test_every_module_says_what_it_takes(name):
    metric = evaluate.load(METRICS[name])
    assert "predictions" in metric.inputs_description
    assert metric.description


# On models


@pytest.fixture(scope="module")
def labelled():
    """The first images of the packaged data set as a `datasets.Dataset`, the label names, and the data set's name."""
    (name,) = (folder.name for folder in EXAMPLE_MODEL.parent.iterdir() if folder != EXAMPLE_MODEL)
    rows, names = load_evaluation_dataset(name, max_samples=24)
    images = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return Dataset.from_dict({"image": images, "label": rows["label"]}), names, name


def test_evaluator_on_a_pruned_models_pipeline(labelled, tmp_path):
    rows, names, _ = labelled
    model = AutoModelForImageClassification.from_pretrained(EXAMPLE_MODEL)
    model.set_token_pruning({"flops_reduction": 0.4})
    model.save_pretrained(tmp_path, image_processor=load_image_processor(EXAMPLE_MODEL))
    classify = pipeline("image-classification", model=str(tmp_path))
    assert classify.model.config.token_pruning is not None
    options = {"data": rows, "metric": evaluate.load(METRICS["top_k_accuracy"])}
    options["label_mapping"] = {name: i for i, name in enumerate(names)}
    results = evaluate.evaluator("image-classification").compute(str(tmp_path), **options)
    assert evaluator("image-classification").compute(classify, **options)["top1"] == results["top1"]
    guesses = [answers[0]["label"] for answers in classify(list(rows["image"]))]
    hits = [names.index(guess) == label for guess, label in zip(guesses, rows["label"], strict=True)]
    assert results["top1"] == pytest.approx(sum(hits) / len(hits))
    assert results["top1"] > 1 / len(names)
    assert results["samples_per_second"] > 0


def test_saved_results_go_into_a_card(labelled, tmp_path):
    name = labelled[2]
    file = tmp_path / "saved" / "results.json"
    words = ["--model_name_or_path", str(EXAMPLE_MODEL), "--dataset_name", name, "--max_eval_samples", "24"]
    words += ["--workers", "0", "--device", "cpu", "--flops_reduction", "0.4", "--save_results", str(file)]
    assert main(["evaluate", *words]) == 0
    content = json.loads(file.read_text())
    assert {"dense", "pruned", "_timestamp", "_evaluate_version"} <= content.keys()
    about = {"dataset_name": "waste", "dataset_id": "user/waste", "split": "test"}
    evaluation = Evaluation.from_results(file, **about)
    model = AutoModelForImageClassification.from_pretrained(EXAMPLE_MODEL)
    model.set_token_pruning({"flops_reduction": 0.4})
    (result,) = create_model_card(model, ModelCardInfo("waste", evaluation=evaluation)).data.eval_results[:1]
    assert (result.dataset_type, result.metric_type) == ("user/waste", "accuracy")
    assert result.metric_value == pytest.approx(content["pruned"]["metrics"]["top1"], abs=1e-5)
