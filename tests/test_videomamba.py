"""What is specific to VideoMamba: clips with any number of frames, image models converted to video models, its
files."""

import onnxruntime
import pytest
import torch
from conftest import (
    TOKEN_PRUNING,
    load_script,
    make_model,
    make_video_config,
    make_videomamba_config,
    relative_error,
)
from torch import Tensor, nn
from transformers import AutoModelForVideoClassification

from hf_vssm_prune import (
    VideoMambaBackbone,
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    count_flops,
)
from hf_vssm_prune.conversion import (
    convert_official_state_dict,
    convert_to_official_state_dict,
    infer_config,
    load_official_model,
    save_official_model,
)
from hf_vssm_prune.export import export_classifier
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.quantization import quantize_linears
from hf_vssm_prune.token_pruning import ALIGNMENTS
from hf_vssm_prune.visualization import draw_classification


NUM_TOKENS = 3 * 16 + 1


@pytest.fixture
def clips() -> Tensor:
    """Two clips for the tiny video model."""
    return torch.randn(2, 3, 3, 32, 32)


@pytest.fixture
def model() -> nn.Module:
    return make_model(make_video_config())


@pytest.fixture
def pruned_model() -> nn.Module:
    return make_model(make_video_config(token_pruning=dict(TOKEN_PRUNING)))


# ---- Clips -------------------------------------------------------------------------------------------------------


def image_model_of(video_model: nn.Module) -> nn.Module:
    """An image model that computes for one frame what the video model, with tubelets of one frame, computes for all of
    them."""
    config = make_videomamba_config(num_labels=video_model.config.num_labels)
    image_model = VideoMambaForImageClassification(config).eval()
    state_dict = video_model.state_dict()
    del state_dict["videomamba.embeddings.temporal_embeddings"]
    projection = "videomamba.embeddings.projection.weight"
    state_dict[projection] = state_dict[projection].squeeze(2)
    image_model.load_state_dict(state_dict)
    return image_model


@pytest.mark.parametrize("token_pruning", [None, TOKEN_PRUNING], ids=["dense", "pruned"])
@torch.no_grad()
def test_one_frame_at_time_zero_is_an_image(token_pruning, pixel_values) -> None:
    model = make_model(make_video_config(num_frames=1))
    model.videomamba.embeddings.temporal_embeddings.zero_()
    image_model = image_model_of(model)
    for each in (model, image_model):
        each.set_token_pruning(token_pruning)
    torch.testing.assert_close(model(pixel_values.unsqueeze(1)).logits, image_model(pixel_values).logits)


@torch.no_grad()
def test_frames_are_in_order_and_have_their_times(model, clips) -> None:
    embeddings = model.videomamba.embeddings
    tokens = embeddings(clips, False)
    frames = nn.functional.conv2d(
        clips.flatten(0, 1), embeddings.projection.weight[:, :, 0], embeddings.projection.bias, 8
    )
    patches = frames.flatten(2).transpose(1, 2).unflatten(0, (2, 3))
    places, times = embeddings.position_embeddings, embeddings.temporal_embeddings
    expected = patches + places[:, 1:].unsqueeze(1) + times.unsqueeze(2)
    torch.testing.assert_close(tokens[:, 1:], expected.flatten(1, 2))
    torch.testing.assert_close(tokens[:, 0], (embeddings.class_token + places[:, :1])[0].expand(2, -1))


@torch.no_grad()
def test_frames_after_the_last_whole_tubelet_fall_away() -> None:
    model = make_model(make_video_config(num_frames=5, tubelet_size=2))
    assert model.config.grid_size == (2, 4, 4)
    clips = torch.randn(2, 5, 3, 32, 32)
    assert torch.equal(model(clips).logits, model(clips[:, :4]).logits)
    with pytest.raises(ValueError, match=r"too small for one patch of 2 frames of 8 x 8 pixels"):
        model(clips[:, :1])


@pytest.mark.parametrize("shape", [(1, 32, 32), (7, 32, 32), (3, 24, 48), (5, 9, 41)])
@pytest.mark.parametrize(
    "token_pruning", [None, {"layers": [1, 3], "keep_ratios": [0.7, 0.6]}], ids=["dense", "pruned"]
)
@torch.no_grad()
def test_other_lengths_and_sizes(shape, token_pruning, model) -> None:
    model.set_token_pruning(token_pruning)
    frames, height, width = shape
    clips = torch.randn(2, frames, 3, height, width)
    outputs = model(clips, output_hidden_states=True)
    grid = frames, height // 8, width // 8
    assert outputs.hidden_states[0].shape[1] == grid[0] * grid[1] * grid[2] + 1
    assert outputs.logits.isfinite().all()
    with pytest.raises(
        ValueError, match=rf"{' x '.join(map(str, grid))} patches, .* position embeddings are for 3 x 4 x 4"
    ):
        model(clips, interpolate_pos_encoding=False)


@torch.no_grad()
def test_times_are_resized_linearly_and_places_bicubically(model) -> None:
    embeddings = model.videomamba.embeddings
    embeddings.projection.weight.zero_(), embeddings.projection.bias.zero_()
    tokens = embeddings(torch.zeros(1, 5, 3, 48, 24), True)[:, 1:].unflatten(1, (5, 6, 3))
    places = embeddings.position_embeddings[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    places = nn.functional.interpolate(places, size=(6, 3), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    times = nn.functional.interpolate(embeddings.temporal_embeddings.mT, size=5, mode="linear", align_corners=False).mT
    torch.testing.assert_close(tokens, places[:, None] + times[:, :, None, None])


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(2, 3, 4, 32, 32), r"\(2, 3, 4, 32, 32\); expected shape: \(batch, frames, 3, height, width\)"),
        (torch.zeros(2, 3, 32, 32), r"expected shape: \(batch, frames, 3, height, width\)"),
        (torch.zeros(2, 0, 3, 32, 32), "a video without pixels"),
        (torch.full((1, 3, 3, 32, 32), torch.nan), r"NaN or infinity in samples \[0\]"),
        (None, r"of shape \(batch, frames, channels, height, width\)"),
    ],
    ids=["channels first", "images", "no frames", "nan", "none"],
)
def test_wrong_clips(clips, message, model) -> None:
    with pytest.raises(ValueError, match=message):
        model(clips)


def test_models_of_the_other_kind_of_input_are_refused() -> None:
    with pytest.raises(ValueError, match="is 3: VideoMambaForImageClassification is a model for images and needs None"):
        VideoMambaForImageClassification(make_video_config())
    with pytest.raises(ValueError, match="`num_frames` is 3: VideoMambaBackbone is a model for images and needs None"):
        VideoMambaBackbone(make_video_config())
    with pytest.raises(
        ValueError,
        match="is None: VideoMambaForVideoClassification is a model for videos and needs a number",
    ):
        VideoMambaForVideoClassification(make_videomamba_config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "`num_frames` is 0; it must be a whole number of at least 1"),
        ({"num_frames": 1, "tubelet_size": 2}, "`num_frames` is 1; it must be a whole number of at least 2"),
        ({"tubelet_size": 0}, "`tubelet_size` is 0; it must be a whole number of at least 1"),
        ({"patch_stride": 4}, "`patch_stride` is 4 and `patch_size` 8; for a video model, they must be equal"),
    ],
)
def test_wrong_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_video_config(**options)


def test_patches_of_images_are_sixteen_pixels_apart() -> None:
    assert VideoMambaConfig(patch_size=8, num_frames=None).grid_size == (14, 14)
    assert VideoMambaConfig(patch_size=8).grid_size == (8, 28, 28)


# ---- Pruning on (time, height, width) ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_clips(method, model, clips) -> None:
    model.set_token_pruning({"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": method})
    outputs = model.train()(clips, labels=torch.tensor([0, 2]))
    assert [tuple(kept.shape) for kept in outputs.kept_tokens] == [(2, 35), (2, 22)]
    before = set(range(NUM_TOKENS))
    for kept in outputs.kept_tokens:
        assert (kept[:, 0] == 0).all(), "the class token is first"
        assert (kept.diff(dim=1) > 0).all()
        assert set(kept[0].tolist()) <= before
        before = set(kept[0].tolist())
    assert [scores.shape[1] for scores in outputs.token_scores] == [48, 34]
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("importance", ["clip", "mean", "l1", "l2", "random", "influence", "worst_influence"])
@torch.no_grad()
def test_every_alignment_and_importance(alignment, importance, model, clips) -> None:
    schedule = {"layers": [2], "keep_ratios": [0.5], "method": "top", "alignment": alignment, "importance": importance}
    model.set_token_pruning(schedule)
    outputs = model(clips)
    assert outputs.logits.isfinite().all()
    assert outputs.kept_tokens[0].shape == (2, 25)


@torch.no_grad()
def test_gap_from_the_class_token_counts(model, clips, monkeypatch) -> None:
    """If the first kept patch does not directly follow the class token, the scan decays over the gap."""
    from hf_vssm_prune import modeling_bidirectional

    seen = []
    scan = modeling_bidirectional.selective_scan

    def spy(*arguments, gaps=None, **options):
        seen.append(gaps)
        return scan(*arguments, gaps=gaps, **options)

    monkeypatch.setattr(modeling_bidirectional, "selective_scan", spy)
    model.set_token_pruning({"layers": [3], "keep_ratios": [0.2], "method": "top", "alignment": "repeat"})
    kept = model(clips).kept_tokens[0]
    forward, backward = seen[-2:]
    assert torch.equal(forward[:, 0, 1:].long(), kept.diff(dim=1))
    assert torch.equal(backward[:, 0, 1:].long(), kept.diff(dim=1).flip(1))
    assert (forward[:, 0, 1] > 1).any()


@torch.no_grad()
def test_budget_quantization_autocast_and_pictures(pruned_model, clips) -> None:
    model = pruned_model
    model.set_token_pruning({"flops_reduction": 0.4})
    assert count_flops(model.config).reduction == pytest.approx(0.4, abs=0.005)
    expected, dense = model(clips), model(clips, token_pruning=None)  # rounding may change which tokens are kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(clips).logits.isfinite().all()
        assert 0 < relative_error(model(clips, token_pruning=None).logits.float(), dense.logits) < 0.06
    picture = draw_classification(model, clips, [0.5] * 3, [0.25] * 3)
    assert picture.width > 224
    assert all(scores.isfinite().all() for scores in expected.token_scores)
    quantized = quantize_linears(model)
    assert quantized(clips).logits.isfinite().all()
    assert 0 < relative_error(quantized(clips, token_pruning=None).logits, dense.logits) < 0.15


@torch.no_grad()
def test_export(clips, tmp_path) -> None:
    """Uses the method with the most operators; test_export.py covers the others."""
    schedule = {"layers": [1], "keep_ratios": [0.6], "method": "local_merge"}
    model = make_model(make_video_config(num_hidden_layers=2, token_pruning=schedule))
    processor = new_image_processor(model.config, [0.5] * 3, [0.25] * 3)
    folder = export_classifier(model, tmp_path / "exported", ["onnx", "torch"], processor)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    program = torch.export.load(folder / "model.pt2").module()
    for batch in (clips, clips[:1]):
        expected = model(batch)
        by_onnxruntime = map(torch.from_numpy, session.run(None, {"pixel_values": batch.numpy()}))
        for logits, kept in (by_onnxruntime, program(pixel_values=batch)):
            torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(kept, expected.kept_tokens[0])


@torch.no_grad()
def test_compile_in_one_graph(clips) -> None:
    config = make_video_config(num_hidden_layers=2, token_pruning={"layers": [1], "keep_ratios": [0.6]})
    model = make_model(config)
    torch._dynamo.reset()
    outputs, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(clips), model(clips)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.kept_tokens[0], expected.kept_tokens[0])


def test_schedule_of_a_call(model, clips) -> None:
    assert model(clips, token_pruning={"flops_reduction": 0.3}).kept_tokens is not None
    assert model(clips).kept_tokens is None


def test_auto_classes_and_folders(pruned_model, clips, tmp_path) -> None:
    pruned_model.save_pretrained(tmp_path)
    loaded = AutoModelForVideoClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(clips).logits, pruned_model(clips).logits)
        base = VideoMambaModel.from_pretrained(tmp_path).eval()(clips)
        torch.testing.assert_close(base.pooler_output, pruned_model.videomamba(clips).pooler_output)


# ---- Published files ---------------------------------------------------------------------------------------------


@pytest.fixture
def official(model) -> dict[str, Tensor]:
    return convert_to_official_state_dict(model.config, model.state_dict())


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda tensors: tensors,
        lambda tensors: {"model": tensors, "optimizer": {}},
        lambda tensors: {"module": add_prefix("backbone.", tensors)},
        lambda tensors: {"model": add_prefix("module.encoder.", tensors)},
        lambda tensors: tensors | {"distill_head.weight": torch.zeros(3, 16)},
    ],
    ids=["bare", "model", "deepspeed, backbone", "distributed, encoder", "distillation"],
)
def test_layouts(lay_out, model, official) -> None:
    checkpoint = lay_out(official)
    config = infer_config(checkpoint)
    assert config.to_dict() == model.config.to_dict()
    converted = convert_official_state_dict(config, checkpoint)
    assert all(torch.equal(tensor, converted[name]) for name, tensor in model.state_dict().items())


def test_masked_pretraining(model, official) -> None:
    tensors = {name: tensor for name, tensor in official.items() if not name.startswith("head.")}
    tensors["norm.weight"] = tensors.pop("norm_f.weight")
    tensors["clip_decoder.0.weight"] = torch.zeros(4, 16)
    checkpoint = {"model": add_prefix("encoder.", tensors)}
    config = infer_config(checkpoint, num_labels=7)
    converted = convert_official_state_dict(config, checkpoint)
    expected = model.state_dict()
    assert converted["classifier.weight"].shape == (7, 16)
    assert converted["classifier.weight"].std() > 0
    assert not converted["classifier.bias"].any()
    for name in expected.keys() - {"classifier.weight", "classifier.bias"}:
        assert torch.equal(converted[name], expected[name]), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_video_files_are_bare(suffix, model, official, clips, tmp_path) -> None:
    file = tmp_path / f"model{suffix}"
    save_official_model(model, file)
    if suffix == ".pth":
        assert torch.load(file, weights_only=True).keys() == official.keys()
    loaded = load_official_model(file)
    assert isinstance(loaded, VideoMambaForVideoClassification)
    with torch.no_grad():
        assert torch.equal(loaded(clips).logits, model(clips).logits)


def test_image_files_are_told_from_vims_by_name_or_option(tmp_path, caplog) -> None:
    """Their tensors have the same names and shapes."""
    model = make_model(make_videomamba_config())
    for name in ("videomamba_t16_in1k_res224.pth", "other.pth"):
        save_official_model(model, tmp_path / name)
    assert load_official_model(tmp_path / "videomamba_t16_in1k_res224.pth").config.model_type == "videomamba"
    assert not caplog.records
    assert load_official_model(tmp_path / "other.pth").config.model_type == "vim"
    assert "taken for a model of Vim; its tensors could also be those of VideoMamba" in caplog.text
    assert load_official_model(tmp_path / "other.pth", family="videomamba").config.model_type == "videomamba"
    assert load_official_model(tmp_path / "other.pth", num_frames=2).config.grid_size == (2, 4, 4)


@pytest.mark.parametrize("tubelet_size", [1, 2, 3])
def test_image_model_becomes_a_video_model(tubelet_size) -> None:
    image_model = make_model(make_videomamba_config())
    official = convert_to_official_state_dict(image_model.config, image_model.state_dict())
    options = {"num_frames": 2 * tubelet_size, "tubelet_size": tubelet_size, "num_labels": 5}
    config = infer_config(official, "videomamba", **options)
    model = VideoMambaForVideoClassification(config)
    model.load_state_dict(convert_official_state_dict(config, official))
    embeddings, weight = model.videomamba.embeddings, image_model.videomamba.embeddings.projection.weight
    assert not embeddings.temporal_embeddings.any()
    for frame in range(tubelet_size):
        expected = weight if frame == tubelet_size // 2 else torch.zeros_like(weight)
        assert torch.equal(embeddings.projection.weight[:, :, frame], expected)
    assert model.classifier.weight.shape == (5, 16)
    layers, expected = model.videomamba.layers.state_dict(), image_model.videomamba.layers.state_dict()
    assert all(torch.equal(layers[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_files_in_half_precision_get_a_head_in_it(dtype, model, official, clips) -> None:
    image_model = make_model(make_videomamba_config())
    image = convert_to_official_state_dict(image_model.config, image_model.state_dict())
    headless = {name: tensor for name, tensor in official.items() if not name.startswith("head.")}
    for tensors in (image, headless):
        checkpoint = {"module": {name: tensor.to(dtype) for name, tensor in tensors.items()}}
        config = infer_config(checkpoint, num_frames=3)
        converted = VideoMambaForVideoClassification(config).eval()
        converted.load_state_dict(convert_official_state_dict(config, checkpoint), assign=True)
        assert converted(clips).logits.dtype == dtype


@torch.no_grad()
def test_files_open_at_other_lengths_and_sizes(model, official) -> None:
    config = infer_config(official, num_frames=6, image_size=(48, 24))
    larger = VideoMambaForVideoClassification(config).eval()
    larger.load_state_dict(convert_official_state_dict(config, official))
    clips = torch.randn(2, 6, 3, 48, 24)
    assert config.grid_size == (6, 6, 3)
    # What a model does at run time with an input that it was not laid out for.
    torch.testing.assert_close(larger(clips).logits, model(clips).logits, atol=1e-4, rtol=1e-4)


def test_script_converts_videos_there_and_back(model, official, clips, tmp_path, capsys) -> None:
    convert = load_script("convert").main
    save_official_model(model, tmp_path / "k400.pth")
    assert convert([str(tmp_path / "k400.pth"), str(tmp_path / "model")]) == 0
    assert "videomamba: 4 layers, hidden size 16, videos of 3 frames of 32 x 32 pixels" in capsys.readouterr().out
    opened = AutoModelForVideoClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(opened(clips).logits, model(clips).logits)
    assert convert([str(tmp_path / "model"), str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items())


def test_script_makes_a_video_model_of_an_image_model(tmp_path) -> None:
    save_official_model(make_model(make_videomamba_config()), tmp_path / "videomamba_t16_in1k_res224.pth")
    arguments = [str(tmp_path / "videomamba_t16_in1k_res224.pth"), str(tmp_path / "model"), "--num_frames", "6"]
    assert load_script("convert").main(arguments) == 0
    opened = AutoModelForVideoClassification.from_pretrained(tmp_path / "model")
    assert opened.config.grid_size == (6, 4, 4)


def test_script_names_the_labels_of_a_new_classifier(official, tmp_path, capsys, caplog) -> None:
    """As many as are named, whatever an image model's own classifier has; without names, the script says it is new."""
    convert, images = load_script("convert").main, make_model(make_videomamba_config())
    save_official_model(images, tmp_path / "videomamba_in1k.pth")
    torch.save({name: each for name, each in official.items() if not name.startswith("head.")}, tmp_path / "masked.pth")
    (tmp_path / "five.txt").write_text("run\njump\nsit\nwalk\nlie\n")
    for file, frames in (("videomamba_in1k", ["--num_frames", "3"]), ("masked", [])):
        arguments = [str(tmp_path / f"{file}.pth"), str(tmp_path / file), *frames]
        assert convert([*arguments, "--id2label", str(tmp_path / "five.txt")]) == 0
        assert AutoModelForVideoClassification.from_pretrained(tmp_path / file).config.id2label[4] == "lie"
        assert "5 labels" in capsys.readouterr().out
        assert [record.message for record in caplog.records if "classifier" in record.message] == [
            "The checkpoint has no classifier for videos: the model's, for 5 labels, is new and has to be trained."
        ]
        caplog.clear()
    convert_official_state_dict(images.config, convert_to_official_state_dict(images.config, images.state_dict()))
    assert not caplog.records


# ---- Sizes and FLOPs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "image", "video"),
    [("Ti", 7_148_008, 7_033_744), ("S", 25_796_584, 25_568_656), ("M", 74_217_448, 73_875_856), ("B", 97_598_440, 0)],
)
def test_parameters(preset, image, video) -> None:
    with torch.device("meta"):
        config = VideoMambaConfig.from_preset(preset, num_frames=None)
        assert VideoMambaForImageClassification(config).num_parameters() == image
        if video:
            config = VideoMambaConfig.from_preset(preset)
            assert VideoMambaForVideoClassification(config).num_parameters() == video
            longer = VideoMambaForVideoClassification(VideoMambaConfig.from_preset(preset, num_frames=9))
            assert longer.num_parameters() == video + config.hidden_size


# (preset, frames, image size) to G as printed. Of the paper's table its rule gives all but M at 576² (83.1 printed) and
# S at 64 frames of 384² (395 printed).
FLOPS = {
    **{("Ti", None, size): figure for size, figure in ((224, "1.1"), (448, "4.3"), (576, "7.1"))},
    **{("S", None, size): figure for size, figure in ((224, "4.3"), (448, "16.9"), (576, "28.0"))},
    **{("M", None, size): figure for size, figure in ((224, "12.7"), (448, "50.4"), (576, "83.3"))},
    ("B", None, 224): "16.9",
    **{("Ti", frames, size): figure for frames, size, figure in ((16, 224, "17"), (32, 224, "34"), (64, 384, "202"))},
    **{("S", frames, size): figure for frames, size, figure in ((16, 224, "68"), (32, 224, "135"), (64, 384, "795"))},
    **{("M", frames, size): figure for frames, size, figure in ((16, 224, "202"), (32, 224, "403"), (64, 384, "2368"))},
}


@pytest.mark.parametrize(("model", "figure"), FLOPS.items(), ids=str)
def test_published_flops(model, figure) -> None:
    preset, frames, image_size = model
    flops = count_flops(VideoMambaConfig.from_preset(preset, num_frames=frames, image_size=image_size)).dense.published
    assert f"{flops / 1e9:.{len(figure.partition('.')[2])}f}" == figure


@pytest.mark.parametrize(
    ("preset", "frames", "figure"),
    [("Ti", None, "1.816"), ("S", None, "5.897"), ("M", None, "16.297"), ("B", None, "20.857"), ("Ti", 8, "14.46")],
)
def test_total_flops(preset, frames, figure) -> None:
    flops = count_flops(VideoMambaConfig.from_preset(preset, num_frames=frames)).dense.total
    assert f"{flops / 1e9:.{len(figure.partition('.')[2])}f}" == figure


def test_pruned_flops_count_the_norms_of_the_tokens_that_are_left() -> None:
    config = make_video_config(token_pruning={"layers": [2], "keep_ratios": [0.5], "method": "top"})
    lengths = [49, 49, 25, 25]
    projections = 48 * 3 * 64 * 16 + 3 * 16 + sum(lengths) * 3 * 16 * 32
    norms = 5 * 16 * (sum(lengths) + 25)
    assert count_flops(config).pruned.published == projections + norms
