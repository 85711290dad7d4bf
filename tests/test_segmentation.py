"""Segmentation: the loss of batches without labelled pixels, image sizes, and wrong options."""

import pytest
import torch
from conftest import make_vim_config
from PIL import Image
from tested_tasks import SMALL_HEAD

from hf_vssm_prune.flops_of_heads import count_flops
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.training import evaluation
from hf_vssm_prune.training.sliding_window import slide
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


def test_a_saved_model_ignores_the_index_of_this_data_set(tmp_path, caplog):
    first = make_task().auto_class.from_config(make_vim_config(id2label=dict(enumerate(NAMES))))
    save_for_hub(first, tmp_path)
    labels = torch.randint(3, (2, 32, 32))
    partly = labels.clone()
    partly[:, 16:] = 9
    as_published, other = make_task(), make_task(ignore_index=9)
    models = [task.load_model(str(tmp_path), NAMES).train() for task in (as_published, other)]
    expected = loss_of(as_published, models[0], partly.where(partly != 9, 255))
    torch.testing.assert_close(loss_of(other, models[1], partly), expected)
    assert f"{tmp_path} has a head already: --head_channels, --auxiliary_channels is not used." in caplog.text


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


def test_many_windows_in_half_precision():
    """With windows of 8 x 8 at every position, up to 64 values are added at a pixel."""
    image = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def segment(part: torch.Tensor) -> torch.Tensor:
        return torch.cat([part + part.mean(), part * part.amax()], dim=1)

    sums, counts = torch.zeros(2, 24, 24, dtype=torch.float64), torch.zeros(24, 24, dtype=torch.float64)
    for top in range(17):
        for left in range(17):
            rows, columns = slice(top, top + 8), slice(left, left + 8)
            sums[:, rows, columns] += segment(image[..., rows, columns])[0].double()
            counts[rows, columns] += 1
    found = slide(segment, image, (8, 8), (1, 1))[0].double()
    torch.testing.assert_close(found, sums / counts, rtol=1e-5, atol=1e-5)


def test_an_evaluation_counts_all_windows_and_times_whole_batches(monkeypatch):
    task = make_task(window=[32], window_stride=[24])
    model = task.auto_class.from_config(make_vim_config())
    batches = [{"pixel_values": torch.rand(n, 3, 32, 64), "labels": torch.zeros(n, 32, 64).long()} for n in (2, 1)]
    monkeypatch.setattr(evaluation, "timed", lambda compute, device: (1.0, compute()))
    seen = []

    def see(module, inputs, options):
        seen.append(options["pixel_values"].shape)

    model.register_forward_pre_hook(see, with_kwargs=True)
    found = evaluation.compare_models(task, {"it": model}, batches, torch.device("cpu"))["it"]
    assert seen[:3] == [(1, 3, 32, 32)] * 3, "at 0, 24 and 32"
    assert len(seen) == 3 * (2 + 3), "the first batch runs twice"
    one = count_flops(model.config, (32, 32)).pruned
    assert (found.gflops_total, found.gflops_published) == pytest.approx((3 * one.total / 1e9, 3 * one.published / 1e9))
    assert found.images_per_second == 2, "the last batch has one image"
    assert task.parts((32, 80)) == [(32, 32)] * 3
    assert make_task().parts((32, 80)) == [(32, 80)]


def test_masks_without_a_class_have_no_metrics():
    with pytest.raises(ValueError, match="No pixel of the evaluated masks has a class"):
        SemanticSegmentation().metrics([torch.zeros(2, 3, 4, dtype=torch.int64)])


def test_windows_leave_no_gap():
    assert MaskArguments(window=[8, 16], window_stride=[8, 12]).windows() == ((8, 16), (8, 12))
    with pytest.raises(ValueError, match=r"--window_stride is \[12\]: it must be at most --window \[16, 8\]"):
        MaskArguments(window=[16, 8], window_stride=[12])
