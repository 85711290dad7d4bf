"""Outputs of pruned models can be sliced into samples, padded and gathered by other tools."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import concatenate, find_batch_size, pad_across_processes, recursively_apply
from conftest import MAKE_CONFIG, TOKEN_PRUNING, same_tensors
from PIL import Image
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree as pytree
from transformers import Trainer, TrainingArguments, pipeline

from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.pruned_outputs import STAGE_FIELDS, PrunedImageClassifierOutput


PRUNINGS = {"top": TOKEN_PRUNING, "merged": {**TOKEN_PRUNING, "method": "evit"}}


@pytest.fixture(params=[(family, name) for family in sorted(MAKE_CONFIG) for name in PRUNINGS], ids="-".join)
def model(request):
    family, name = request.param
    config = MAKE_CONFIG[family](token_pruning=dict(PRUNINGS[name]))
    return FAMILIES[family].classifier(config).eval()


@pytest.fixture
def output(model, pixel_values) -> PrunedImageClassifierOutput:
    with torch.no_grad():
        return model(pixel_values)


def same(one: PrunedImageClassifierOutput, other: PrunedImageClassifierOutput) -> bool:
    """Whether logits and all tensors of all stages are equal."""
    return torch.equal(one.logits, other.logits) and all(
        same_tensors(getattr(one, field), getattr(other, field)) for field in STAGE_FIELDS
    )


def test_by_stage(output, model) -> None:
    merges = model.config.token_pruning["method"] == "evit"
    assert (output.merged_tokens is not None) == merges
    for field in STAGE_FIELDS[: 2 + merges]:
        of_stages = getattr(output, field)
        assert len(of_stages) == 2
        assert output[field] is not None
        assert all(a is b for a, b in zip(of_stages, output[field], strict=True))
        assert [output[f"{field}_{stage}"] is tensor for stage, tensor in enumerate(of_stages)] == [True, True]
    assert set(output) == {"logits", *(f"{field}_{i}" for field in STAGE_FIELDS[: 2 + merges] for i in range(2))}


def test_dense_models_tell_of_no_stage(model, pixel_values) -> None:
    output = model(pixel_values, token_pruning=None)
    assert [*output] == ["logits"]
    assert output.kept_tokens is output.token_scores is output.merged_tokens is output["kept_tokens"] is None


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)),
    "entries": lambda output: type(output)(**output),
    "dict": lambda output: type(output)(dict(output)),
    "pairs": lambda output: type(output)((name, output[name]) for name in output),
    "pytree": lambda output: pytree.tree_unflatten(*pytree.tree_flatten(output)),
    "Accelerate": lambda output: recursively_apply(lambda tensor: tensor, output),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies(way, output) -> None:
    copied = COPIES[way](output)
    assert type(copied) is type(output)
    assert same(copied, output)


def test_as_a_tuple(model, pixel_values, output) -> None:
    values = model(pixel_values, return_dict=False)
    assert isinstance(values, tuple)
    assert same_tensors(values, output.to_tuple())
    model.config.return_dict = False
    values = model(pixel_values)
    assert isinstance(values, tuple)
    assert same_tensors(values, output.to_tuple())


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_feature_maps_as_a_tuple(family, pixel_values) -> None:
    backbone = FAMILIES[family].classes["Backbone"](MAKE_CONFIG[family](token_pruning=dict(TOKEN_PRUNING))).eval()
    with torch.no_grad():
        output = backbone(pixel_values)
        backbone.config.return_dict = False
        values = backbone(pixel_values)
    assert isinstance(values, tuple)
    assert same_tensors(values[0], output.feature_maps)


def halves(model, images):
    return [model(images[:3]), model(images[3:])]


def test_gathered(model, monkeypatch) -> None:
    """Gathers with Accelerate and like `DataParallel`, whose own function for single tensors needs a GPU."""
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        whole, parts = model(images), halves(model, images)
    accelerator = Accelerator(cpu=True)
    assert same(accelerator.gather(whole), whole)
    assert find_batch_size(whole) == 5
    assert same(pad_across_processes(whole), whole)
    joined = concatenate([dict(part) for part in parts])
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *tensors: torch.cat(tensors, dim))
    for gathered in (PrunedImageClassifierOutput(joined), scatter_gather.gather(parts, "cpu")):
        assert isinstance(gathered, PrunedImageClassifierOutput)
        torch.testing.assert_close(gathered.logits, whole.logits)
        assert same_tensors(gathered.kept_tokens, whole.kept_tokens)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_pipelines_in_batches(task, count, model) -> None:
    """Tests fewer images than stages, equally many, and more."""
    processor = new_image_processor(model.config, [0.5] * 3, [0.5] * 3, crop_pct=1.0)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)]
    module = model if task == "image-classification" else model.base_model
    pipe = pipeline(task, model=module, image_processor=processor, device="cpu")
    alone = [pipe(image) for image in images]
    for batch_size in (1, 2, 8):
        single = alone
        batched = pipe(images, batch_size=batch_size)
        if task == "image-classification":
            assert [labels_of(guesses) for guesses in batched] == [labels_of(guesses) for guesses in single]
            batched, single = ([[guess["score"] for guess in each] for each in part] for part in (batched, single))
        np.testing.assert_allclose(np.array(batched), np.array(single), atol=1e-4)


def labels_of(guesses: list[dict]) -> list[str]:
    return [guess["label"] for guess in guesses]


def test_evaluation_by_transformers_trainer(model, tmp_path) -> None:
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(5)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=rows)
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (5, 3)
    with torch.no_grad():
        expected = model(torch.stack([row["pixel_values"] for row in rows]))
    np.testing.assert_allclose(predictions.predictions, expected.logits, atol=1e-5)
    # On request it puts the stages together as well.
    gathered = trainer.predict(rows, ignore_keys=[]).predictions
    assert [entry.shape for entry in gathered] == [tuple(value.shape) for value in expected.to_tuple()]
    np.testing.assert_array_equal(gathered[1], expected.kept_tokens[0])
