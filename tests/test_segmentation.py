"""Segmentation: the loss of batches without labelled pixels, image sizes, and wrong options."""

import pytest
import torch
from conftest import make_vim_config
from PIL import Image
from tested_tasks import SMALL_HEAD

from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.training.tasks.semantic_segmentation import (
    MaskArguments,
    SegmentationArguments,
    SemanticSegmentation,
)


NAMES = ["red", "green", "blue"]


def make_task(**options) -> SemanticSegmentation:
    return SemanticSegmentation(SegmentationArguments(**SMALL_HEAD, **options))


def loss_of(task: SemanticSegmentation, model: torch.nn.Module, labels: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(len(labels), 3, 32, 32), "labels": labels}
    return task.losses(model(**task.inputs(batch)), batch)["segmentation"]


@pytest.mark.parametrize("ignore_index", [255, 0])
def test_a_batch_without_labels_changes_nothing_but_gives_every_parameter_a_gradient(ignore_index):
    """Other processes wait for every gradient."""
    task = make_task(ignore_index=ignore_index)
    model = task.auto_class.from_config(make_vim_config()).train()
    loss = loss_of(task, model, torch.full((2, 32, 32), ignore_index))
    loss.backward()
    assert loss == 0
    assert {name for name, each in model.named_parameters() if each.grad is None} == set()
    assert all((each.grad == 0).all() for each in model.parameters())


def test_a_saved_model_ignores_the_index_of_this_data_set(tmp_path):
    first = make_task().auto_class.from_config(make_vim_config(id2label=dict(enumerate(NAMES))))
    save_for_hub(first, tmp_path)
    labels = torch.randint(3, (2, 32, 32))
    partly = labels.clone()
    partly[:, 16:] = 9
    as_published, other = make_task(), make_task(ignore_index=9)
    models = [task.load_model(str(tmp_path), NAMES).train() for task in (as_published, other)]
    expected = loss_of(as_published, models[0], partly.where(partly != 9, 255))
    torch.testing.assert_close(loss_of(other, models[1], partly), expected)


def test_short_side_is_the_size_of_images():
    """The longer side gets at most four times as many pixels."""
    processor = new_image_processor(make_vim_config(), [0.5] * 3, [0.25] * 3)
    for short_side, sizes in ((None, [(40, 60), (40, 200)]), (20, [(20, 30), (16, 80)])):
        resizing = make_task(short_side=short_side).image_processor(processor)
        images = [Image.new("RGB", (width, 40)) for width in (60, 200)]
        seen = [resizing(image, return_tensors="pt")["pixel_values"].shape[2:] for image in images]
        assert [tuple(shape) for shape in seen] == sizes


def test_scale_has_two_values():
    with pytest.raises(ValueError, match=r"--scale is \[0.5, 1.0, 2.0\]: give the smallest and the largest factor"):
        make_task(scale=[0.5, 1.0, 2.0])


def test_windows_leave_no_gap():
    assert MaskArguments(window=[8, 16], window_stride=[8, 12]).windows() == ((8, 16), (8, 12))
    with pytest.raises(ValueError, match=r"--window_stride is \[12\]: it must be at most --window \[16, 8\]"):
        MaskArguments(window=[16, 8], window_stride=[12])
