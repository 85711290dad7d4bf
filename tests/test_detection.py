"""Detectors: new heads, their labels and losses, and the commands from data to a pruned detector."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOKEN_PRUNING, load_script, make_plainmamba_config, make_vim_config
from PIL import Image
from tested_tasks import SMALL_DETECTOR, write_box_folder
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoModelForObjectDetection, ConditionalDetrConfig, DetrConfig, pipeline
from transformers.loss.loss_for_object_detection import generalized_box_iou

from hf_vssm_prune import count_flops
from hf_vssm_prune.detections import find_objects, to_corners
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.heads import auto_class_of, new_dense_model
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.pruned_heads import backbone_of
from hf_vssm_prune.training import dense_models
from hf_vssm_prune.training.data.dense_items import fixed_size
from hf_vssm_prune.training.detection_losses import detection_distillation, generalized_overlap, predictions_of
from hf_vssm_prune.training.detection_models import DetectionHead, DetectionModels, detection_processor
from hf_vssm_prune.training.optimization import parameter_groups
from hf_vssm_prune.training.segmentation_models import SegmentationModels
from hf_vssm_prune.training.tasks.object_detection import BoxArguments, DetectionArguments, ObjectDetection
from hf_vssm_prune.visualization_of_heads import visualize_dense


SMALL = {"channels": 32, "ffn_channels": 16, "attention_heads": 2, "decoder_layers": 2, "encoder_layers": 1}
IMAGES = {"image_size": 64, "patch_size": 16}
MAKE_CONFIG = {
    "plainmamba": make_plainmamba_config,
    "vim": lambda **options: make_vim_config(**{"patch_stride": None, **options}),
}


def make_models(kind: str, **options) -> DetectionModels:
    return DetectionModels(DetectionHead(kind=kind, **{**SMALL, "num_queries": 7, "num_denoising": 6, **options}))


def labels(*counts: int) -> list[dict[str, torch.Tensor]]:
    return [{"class_labels": torch.arange(count) % 3, "boxes": 0.2 + 0.1 * torch.rand(count, 4)} for count in counts]


@pytest.fixture(params=["rt_detr", "deformable_detr"])
def kind(request) -> str:
    return request.param


# Heads


@pytest.mark.parametrize("family", MAKE_CONFIG)
def test_a_new_head_learns_from_boxes_and_from_none(kind, family):
    model = make_models(kind).from_config(MAKE_CONFIG[family](**IMAGES, token_pruning=dict(TOKEN_PRUNING))).train()
    for counts in ((2, 0), (0, 0)):
        model.zero_grad()
        outputs = model(torch.randn(2, 3, 64, 96), labels=labels(*counts), output_hidden_states=True)
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert len(outputs.kept_tokens) == 2
        assert len(outputs.backbone_hidden_states) == 5
        again = tree_unflatten(*tree_flatten(outputs))  # as DDP does
        assert again.keys() == outputs.keys()
        assert len(again.kept_tokens) == 2
        logits, boxes = predictions_of(outputs)
        assert (logits.shape, boxes.shape) == ((2, 7, 3), (2, 7, 4))
        idle = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
        assert all("denoising" in name for name in idle)  # with boxes to restore these learn, too
        assert not (idle and any(counts))


def test_layer_decay_is_for_the_backbone(kind):
    """The head's encoder and decoder have layers, too; these keep the full rate."""
    model = make_models(kind).from_config(make_vim_config(**IMAGES, patch_stride=None))
    names = {id(each): name for name, each in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, layer_decay=0.5)
    rates = {names[id(each)]: group["lr"] for group in groups for each in group["params"]}
    lowered = {name: rate for name, rate in rates.items() if rate < 1}
    assert all(".embeddings." in name or ".layers." in name for name in lowered)
    assert {rate for name, rate in lowered.items() if ".layers.0." in name} == {0.5**4}
    assert all(rate == 1 for name, rate in rates.items() if "backbone" not in name)


def test_a_small_image_has_as_many_queries_as_cells():
    model = make_models("rt_detr", num_queries=300).from_config(make_vim_config()).eval()
    assert model.config.num_queries == 21
    model(torch.randn(1, 3, 32, 32))


def test_boxes_that_are_not_finite_give_a_loss_that_is_not(kind):
    model = make_models(kind).from_config(make_plainmamba_config(**IMAGES)).train()
    backbone_of(model).norm.weight.data.fill_(float("nan"))
    assert model(torch.randn(1, 3, 64, 64), labels=labels(1)).loss.isnan()


def save(models: DetectionModels, folder: Path, names=("red", "green", "blue")) -> torch.nn.Module:
    torch.manual_seed(0)
    config = make_plainmamba_config(**IMAGES, id2label=dict(enumerate(names)), num_labels=len(names))
    model = models.from_config(config).eval()
    processor = detection_processor(new_image_processor(config, [0.5] * 3, [0.5] * 3), (64, 64))
    save_for_hub(model, folder, processor)
    return model


def test_labels_are_matched_by_name(kind, tmp_path, caplog):
    models = make_models(kind)
    model = save(models, tmp_path)
    other = dense_models.load_model(models, str(tmp_path), ["blue", "red", "green"])
    assert other.config.id2label == {0: "blue", 1: "red", 2: "green"}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(images).logits, model(images).logits[..., [2, 0, 1]])
    numbered = dense_models.load_model(models, str(tmp_path), ["2", "0", "1"])
    assert numbered.config.id2label == other.config.id2label
    assert "numbers without names: '2' of the data set is treated as 'blue'" in caplog.text
    with pytest.raises(ValueError, match=r"has 3 labels .*, but the data set has 2 labels .*--ignore_mismatched_sizes"):
        dense_models.load_model(models, str(tmp_path), ["cat", "dog"])
    with caplog.at_level("INFO"):
        new = dense_models.load_model(models, str(tmp_path), ["cat", "dog"], ignore_mismatched_sizes=True)
    assert "gets new layers for the data set's classes, 2 labels ('cat', 'dog')" in caplog.text
    with torch.no_grad():
        assert new.eval()(images).logits.shape == (2, 7, 2)
    own, kept = model.state_dict(), new.state_dict()
    differing = {name for name in own if not torch.equal(own[name], kept[name])}
    assert differing == {name for name in own if models.class_layers.search(name)}


def test_a_model_of_another_task_is_named(tmp_path):
    save(make_models("rt_detr"), tmp_path)
    with pytest.raises(ValueError, match="is a 'rt_detr' model; it must be a segmentation model"):
        dense_models.load_model(SegmentationModels(), str(tmp_path), ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": [32, 32, 32]}, "a number of pixels, or height and width"),
        ({"head_channels": 12}, "--head_channels is 12: it must be a multiple of --head_attention_heads 8"),
        ({"head_channels": 48, "head": "deformable_detr"}, "--head_channels is 48: deformable_detr needs a multiple"),
        ({"head_channels": 30, "head_attention_heads": 2}, "--head_channels is 30: rt_detr needs a multiple of 4"),
        ({"levels": [3, 1]}, "--levels is .3, 1.: it must be ascending"),
        ({"scale": [2.0, 1.0]}, "scale is .2.0, 1.0."),
        ({"scale": [0.5, 1.0, 2.0]}, "--scale is .0.5, 1.0, 2.0.: give the smallest and the largest factor"),
        ({"num_queries": 0}, "--num_queries is 0"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        DetectionArguments(**options)


@pytest.mark.parametrize("other", ["rt_detr", "deformable_detr"])
def test_the_size_of_images_suits_the_models_own_head(kind, other, tmp_path):
    """`--head` is for a new one."""
    save(make_models(kind), tmp_path)
    task = ObjectDetection(DetectionArguments(input_size=[100], head=other))
    for head, make in (
        (kind, lambda: task.load_model(str(tmp_path), ["red", "green", "blue"])),
        (other, lambda: task.auto_class.from_config(make_plainmamba_config(**IMAGES))),
    ):
        if head == "rt_detr":
            with pytest.raises(ValueError, match=r"--input_size is \(100, 100\): rt_detr needs multiples of 32"):
                make()
        else:
            assert make().config.model_type == head


def test_boxes_are_read_in_the_format_that_is_named():
    """The default is COCO's format."""
    assert [BoxArguments(**given).objects().corners for given in ({}, {"box_format": "corners"})] == [False, True]


# What is learned beside the boxes


def outputs_of(model: torch.nn.Module, images: torch.Tensor):
    with torch.no_grad():
        return model(images)


def test_distillation_does_not_ask_for_the_order_of_queries(kind):
    model = make_models(kind).from_config(make_plainmamba_config(**IMAGES)).eval()
    teacher = outputs_of(model, torch.randn(2, 3, 64, 64))
    student = copy.deepcopy(teacher)
    order = torch.randperm(7)
    student.logits, student.pred_boxes = student.logits[:, order], student.pred_boxes[:, order]
    assert detection_distillation(student, teacher) == pytest.approx(0, abs=1e-5)
    fewer = SimpleNamespace(logits=student.logits[:, :5], pred_boxes=student.pred_boxes[:, :5])
    assert detection_distillation(fewer, teacher) == pytest.approx(0, abs=1e-5)
    assert detection_distillation(teacher, fewer) == pytest.approx(0, abs=1e-5)
    student.logits = (student.logits + torch.randn_like(student.logits)).requires_grad_()
    student.pred_boxes = (student.pred_boxes * 0.9).requires_grad_()
    loss = detection_distillation(student, teacher, temperature=2.0)
    loss.backward()
    assert loss > 0
    assert student.logits.grad.abs().sum() > 0
    assert student.pred_boxes.grad.abs().sum() > 0


def test_distillation_by_hand():
    """Two queries in swapped order, whose partners are obvious."""
    teacher = SimpleNamespace(
        logits=torch.tensor([[[2.0, -1.0], [-3.0, 0.5]]]),
        pred_boxes=torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.4]]]),
    )
    student = SimpleNamespace(
        logits=torch.tensor([[[-2.0, 1.0], [1.5, -0.5]]]),
        pred_boxes=torch.tensor([[[0.7, 0.7, 0.2, 0.2], [0.25, 0.2, 0.1, 0.2]]]),
    )

    def divergence(student_logit: float, teacher_logit: float) -> float:
        p, q = (1 / (1 + np.exp(-logit / 2)) for logit in (teacher_logit, student_logit))
        return 2**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))

    classes = [divergence(1.5, 2.0) + divergence(-0.5, -1.0), divergence(-2.0, -3.0) + divergence(1.0, 0.5)]
    # Each student's box is half of the teacher's, which is their hull: an IoU and a GIoU of 1/2.
    boxes = [5 * (0.05 + 0.1) + 2 * 0.5, 5 * 0.2 + 2 * 0.5]
    confidence = [1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-0.5))]
    expected = sum(c * (2 * k + b) for c, k, b in zip(confidence, classes, boxes, strict=True)) / sum(confidence)
    assert detection_distillation(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_generalized_overlap():
    boxes, others = (to_corners(0.3 + 0.2 * torch.rand(20, 4)) for _ in range(2))
    others[:5] += 0.5  # apart from one another
    expected = torch.diag(generalized_box_iou(boxes, others))
    torch.testing.assert_close(generalized_overlap(boxes, others), expected)


# What is found


def test_found_objects_are_those_of_transformers(tmp_path):
    model = save(make_models("rt_detr"), tmp_path)
    outputs = outputs_of(model, torch.randn(2, 3, 64, 64))
    processor = detection_processor(new_image_processor(make_vim_config(), [0.5] * 3, [0.5] * 3), (64, 64))
    sizes = torch.tensor([[40, 60], [64, 32]])
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for found, theirs in zip(find_objects(outputs, sizes), expected, strict=True):
        count = len(theirs["scores"])  # it takes as many as there are queries
        assert count == 7
        torch.testing.assert_close(found.scores[:count], theirs["scores"])
        torch.testing.assert_close(found.boxes[:count], theirs["boxes"])
        assert torch.equal(found.labels[:count], theirs["labels"])


def test_picture_of_boxes_and_tokens(tmp_path):
    model = save(make_models("rt_detr"), tmp_path)
    processor = detection_processor(new_image_processor(make_vim_config(), [0.5] * 3, [0.5] * 3), (64, 64))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="The model is dense"):
        visualize_dense(model, processor, [image])
    model.set_token_pruning(dict(TOKEN_PRUNING))
    without = visualize_dense(model, processor, [image])
    for head in model.model.decoder.class_embed:
        head.bias.data += 20  # it is sure of everything
    with_boxes = visualize_dense(model, processor, [image])
    assert with_boxes.size[0] == without.size[0]
    assert with_boxes.tobytes() != without.tobytes()


# The commands


def test_from_boxes_to_a_pruned_detector(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_box_folder(tmp_path / "data", {"train": 8, "test": 4})
    shared = ["--task", "object-detection", "--dataset_name", str(tmp_path / "data"), "--workers", "0"]
    short = ["--max_train_steps", "2", "--num_warmup_steps", "1", "--batch_size", "4", "--use_cpu"]
    sizes = ["hidden_size=16", "num_hidden_layers=4", "state_size=4", "stem_channels=8"]
    model = ["--family", "plainmamba", "--image_size", "32", "--patch_size", "8", "--config_overrides", *sizes]
    small = [word for name, value in SMALL_DETECTOR.items() for word in (f"--{name}", str(*np.atleast_1d(value)))]
    out = [str(tmp_path / name) for name in ("dense", "pruned")]
    assert load_script("train").main([*shared, *short, *model, *small, "--output_dir", out[0]]) == 0
    pruning = ["--prune_layers", "1", "2", "--keep_ratios", "0.7", "0.7", "--model_name_or_path", f"{out[0]}/best"]
    half = ["--teacher_dtype", "bfloat16"]
    assert load_script("finetune").main([*shared, *short, *pruning, *half, "--output_dir", out[1]]) == 0
    assert (Path(out[1]) / "best" / "kept_tokens.png").is_file()
    card = (Path(out[1]) / "best" / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card
    assert "type: map_50" in card
    capsys.readouterr()
    evaluation = ["--model_name_or_path", f"{out[1]}/best", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    assert load_script("evaluate").main([*shared, *evaluation]) == 0
    assert "| model | mAP | mAP50 | mAP75 | GFLOPs |" in capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["pruned"]["gflops_total"] < results["dense"]["gflops_total"]
    assert 0 <= results["pruned"]["metrics"]["map"] <= results["pruned"]["metrics"]["map_50"] <= 1
    gflops = []
    for size in ("32", "64"):
        sized = ["--model_name_or_path", f"{out[1]}/best", "--image_size", size, "--num_images", "100", "--json"]
        measured = ["--batch_size", "4", "--measured_batch_sizes", "1", "2"]
        estimate = ["--task", "object-detection", *sized, str(tmp_path / "run.json"), *measured, *pruning[:6]]
        assert load_script("estimate").main(estimate) == 0
        gflops.append(json.loads((tmp_path / "run.json").read_text())["flops_per_image"])
    assert 2 < gflops[1] / gflops[0] < 4  # four times the tokens, but not the decoder
    image = str(next((tmp_path / "data" / "test").iterdir()))
    picture = ["--output", str(tmp_path / "picture.png")]
    assert load_script("visualize").main([image, "--model_name_or_path", f"{out[1]}/best", *picture]) == 0
    answers = pipeline("object-detection", model=f"{out[1]}/best", device="cpu")(image, threshold=0.0)
    assert answers
    assert {each["label"] for each in answers} <= {"red", "green", "blue"}
    about = f"name: Cells\nevaluation: {{results: {tmp_path}/out.json, dataset_name: a, dataset_id: a, split: test}}\n"
    (tmp_path / "card.yaml").write_text(about)
    assert load_script("write_card").main([f"{out[1]}/best", str(tmp_path / "card.yaml")]) == 0
    card = (Path(out[1]) / "best" / "README.md").read_text()
    assert "# Cells" in card
    assert "Mean average precision at IoU 0.5" in card
    assert load_script("push").main([f"{out[1]}/best", "user/detector", "--dry_run"]) == 0


TOO_SMALL = "--image_size is 32, but --task object-detection resizes images to (height, width) (640, 640)"


def test_a_new_detector_is_made_for_the_size_of_its_images(tmp_path, capsys):
    config = make_vim_config(**IMAGES, patch_stride=None)
    model = FAMILIES["vim"].classifier(config)
    processor = new_image_processor(config)
    checkpoint = save_for_hub(model, tmp_path / "model", processor)
    task = ObjectDetection(DetectionArguments(head_channels=16, head_ffn_channels=16, decoder_layers=1))
    backbone = backbone_of(task.load_model(str(checkpoint), ["red", "green"]))
    assert backbone.config.input_size == fixed_size(task.image_processor(processor)) == (640, 640)
    assert backbone.embeddings.position_embeddings.shape[1] == 40 * 40 + 1
    (tmp_path / "data").mkdir()
    write_box_folder(tmp_path / "data", {"train": 4, "test": 4})
    options = ["--task", "object-detection", "--dataset_name", tmp_path / "data", "--model_name_or_path", checkpoint]
    options += ["--image_size", "32", "--head_channels", "16", "--decoder_layers", "1", "--use_cpu"]
    assert load_script("train").main([str(each) for each in [*options, "--output_dir", tmp_path / "run"]]) == 1
    assert TOO_SMALL in capsys.readouterr().err
    # The same holds for a new backbone.
    assert task.auto_class.from_config(config).config.backbone_config.input_size == (640, 640)
    place = options.index("--model_name_or_path")
    options[place : place + 2] = ["--family", "vim", "--config_overrides", "hidden_size=16", "num_hidden_layers=4"]
    assert load_script("train").main([str(each) for each in [*options, "--output_dir", tmp_path / "run"]]) == 1
    assert TOO_SMALL in capsys.readouterr().err


def test_estimate_of_a_detector(capsys):
    options = ["--task", "object-detection", "--family", "vim", "--image_size", "32", "--patch_size", "8"]
    options += ["--config_overrides", "hidden_size=16", "num_hidden_layers=4", "state_size=4", "--num_classes", "3"]
    small = [word for name, value in SMALL_DETECTOR.items() for word in (f"--{name}", str(*np.atleast_1d(value)))]
    assert load_script("estimate").main([*options, *small, "--num_images", "1000", "--batch_size", "4"]) == 0
    assert "G to train on an image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (64, "have 84 cells. They are too small for the 90 queries of this rt_detr"),
        (100, "100 x 100 pixels: rt_detr needs multiples of 32"),
    ],
)
def test_images_of_a_size_that_a_detector_cannot_process(size, message):
    model = make_models("rt_detr", num_queries=90, image_size=(96, 96)).from_config(make_vim_config())
    with pytest.raises(ValueError, match=message):
        model(pixel_values=torch.randn(1, 3, size, size))
    with pytest.raises(ValueError, match=message):
        count_flops(model.config, size)


def test_levels_after_the_last_layer_are_named():
    with pytest.raises(ValueError, match=r"`levels` are \[1, 9\], but the backbone has 4 layers"):
        make_models("deformable_detr", levels=(1, 9)).from_config(make_vim_config())


def test_a_detector_with_other_layers_is_refused(tmp_path):
    parts = ("encoder", "decoder")
    config = ConditionalDetrConfig(
        backbone_config=make_vim_config(out_features=["stage4"]),
        use_timm_backbone=False,
        d_model=16,
        **{f"{part}_layers": 1 for part in parts},
        **{f"{part}_ffn_dim": 16 for part in parts},
        **{f"{part}_attention_heads": 2 for part in parts},
        num_queries=5,
        id2label={0: "cat", 1: "dog"},
    )
    save_for_hub(new_dense_model(config), tmp_path)
    message = "is a 'conditional_detr' model, which --task object-detection cannot train or evaluate"
    with pytest.raises(ValueError, match=message):
        dense_models.load_model(DetectionModels(), str(tmp_path), ["cat", "dog"])


def test_detr_is_a_detector():
    """transformers also has it in the table of models for segmentation."""
    assert auto_class_of(DetrConfig()) is AutoModelForObjectDetection


def test_example_batches_are_of_the_models_size():
    detector = make_models("rt_detr").from_config(make_vim_config()).config
    batch = ObjectDetection().example_batch(detector, 2, torch.device("cpu"))
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    # For a detector made from a classifier, training resizes images to this size.
    size = fixed_size(ObjectDetection().image_processor(new_image_processor(make_vim_config())))
    batch = ObjectDetection().example_batch(make_vim_config(), 2, torch.device("cpu"))
    assert batch["pixel_values"].shape == (2, 3, *size)
    small = ObjectDetection(DetectionArguments(input_size=[64, 96]))
    assert small.example_batch(make_vim_config(), 2, torch.device("cpu"))["pixel_values"].shape == (2, 3, 64, 96)
