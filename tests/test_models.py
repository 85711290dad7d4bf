"""What users rely on in all families, dense and pruned: precision, training, batching, sizes, loading, exporting."""

from itertools import pairwise

import pytest
import torch
from conftest import MAKE_CONFIG, NUM_CLS_TOKENS, TOKEN_PRUNING, make_model, needs_inductor, relative_error
from torch import Tensor, nn

from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.kernels import cpu
from hf_vssm_prune.modeling_common import is_pruning_parameter
from hf_vssm_prune.pruning_block_selection import BlockSelector
from hf_vssm_prune.token_pruning import fill_dropped_tokens


FLOAT32_ALWAYS = {
    "plainmamba": {"A_log", "D", "direction_B"},
    "videomamba": {"A_log", "D"},
    "vim": {"A_log", "D"},
}


@pytest.fixture(params=[None, TOKEN_PRUNING], ids=["dense", "pruned"])
def config(request, tiny_config):
    """Each family, dense and pruned."""
    tiny_config.token_pruning = tiny_config.complete_token_pruning(request.param)
    return tiny_config


@pytest.fixture
def model(config) -> nn.Module:
    return make_model(config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- Precision ---------------------------------------------------------------------------------------------------


# Errors of the logits relative to their norm. With five seeds, they were at most half of this.
HALF_PRECISION = [(torch.bfloat16, 0.06), (torch.float16, 0.01)]


@pytest.fixture
def rounded_model(config) -> nn.Module:
    """A model whose tokens are pruned by position, so that rounding does not change which ones are kept."""
    if config.token_pruning is not None:
        config.token_pruning = {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "uniform", "alignment": "repeat"}
    return make_model(config)


@pytest.mark.parametrize(("dtype", "limit"), HALF_PRECISION)
def test_half_precision_weights(dtype, limit, rounded_model, pixel_values) -> None:
    model = rounded_model
    expected = model(pixel_values).logits
    model.to(dtype)
    outputs = model(pixel_values.to(dtype), labels=torch.tensor([0, 2]))
    assert outputs.logits.dtype == dtype
    assert 0 < relative_error(outputs.logits.float(), expected) < limit
    outputs.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize(("dtype", "limit"), HALF_PRECISION)
def test_autocast(dtype, limit, rounded_model, pixel_values) -> None:
    model = rounded_model
    expected = model(pixel_values).logits
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(pixel_values, labels=torch.tensor([0, 2]))
    assert 0 < relative_error(outputs.logits.float(), expected) < limit
    outputs.loss.backward()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), name


def test_loading_in_half_precision_keeps_the_scan_in_float32(model, pixel_values, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, parameter in loaded.named_parameters():
        in_float32 = name.split(".")[-1] in FLOAT32_ALWAYS[model.config.model_type]
        assert parameter.dtype == (torch.float32 if in_float32 else torch.bfloat16), name
    with torch.no_grad():
        assert loaded(pixel_values.bfloat16()).logits.isfinite().all()


def test_float64(config, pixel_values) -> None:
    model = make_model(config)
    with torch.no_grad():
        single = model(pixel_values).logits
        double = model.double()(pixel_values.double()).logits
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-3, rtol=1e-3)


# ---- Training ----------------------------------------------------------------------------------------------------


# The largest values of published models before training, by the layers' inputs; 0.02 is a standard deviation.
INITIAL_BOUNDS = {
    "plainmamba": {"mixer.conv2d.weight": 49**-0.5, "mixer.conv2d.bias": 49**-0.5},
    "videomamba": {"mixer.forward_scan.conv1d.bias": 4**-0.5, "mixer.out_proj.weight": (128 * 9) ** -0.5},
    "vim": {
        "mixer.in_proj.weight": 64**-0.5,
        "mixer.backward_scan.x_proj.weight": 128**-0.5,
        "mixer.backward_scan.conv1d.bias": 4**-0.5,
        "mixer.out_proj.weight": (128 * 9) ** -0.5,
    },
}


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_weights_start_as_in_the_official_code(family) -> None:
    model = FAMILIES[family].classifier(MAKE_CONFIG[family](hidden_size=64, num_hidden_layers=9))
    layer = dict(model.base_model.layers[8].named_parameters())
    bounds = {name: layer[name].abs().max().item() for name in INITIAL_BOUNDS[family]}
    assert bounds == pytest.approx(INITIAL_BOUNDS[family], rel=0.05)
    assert all(layer[name].abs().max() <= bound for name, bound in INITIAL_BOUNDS[family].items())
    if family != "vim":
        assert layer["mixer.in_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert model.classifier.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, config, pixel_values) -> None:
    model = make_model(config).train()
    model(pixel_values, labels=torch.tensor([0, 2])).loss.backward()
    expected = gradients(model)
    assert all(gradient is not None for gradient in expected.values())

    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert model.is_activation_checkpointing
    model(pixel_values.requires_grad_(), labels=torch.tensor([0, 2])).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_drop_path_is_for_training_only(tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    state_dict, images = model.state_dict(), pixel_values[:1].expand(8, -1, -1, -1)
    expected = model(images).logits
    dropping = FAMILIES[tiny_config.model_type].classifier(
        type(tiny_config)(**{**tiny_config.to_diff_dict(), "drop_path_rate": 0.9})
    )
    dropping.load_state_dict(state_dict)
    assert torch.equal(dropping.eval()(images).logits, expected)
    dropping.train()
    for module in dropping.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    rows = {tuple(row) for row in dropping(images).logits.tolist()}
    assert len(rows) > 1, "equal images of a batch lose different layers"


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "loss"),
    [
        ("single_label_classification", 3, [0, 2], nn.CrossEntropyLoss()),
        ("multi_label_classification", 3, [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], nn.BCEWithLogitsLoss()),
        ("regression", 1, [0.5, -1.0], lambda logits, labels: nn.MSELoss()(logits.squeeze(), labels)),
        ("regression", 3, [[0.5, 1.0, 0.0], [1.0, 2.0, 3.0]], nn.MSELoss()),
    ],
)
@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_losses(family, problem_type, num_labels, labels, loss, pixel_values) -> None:
    model = make_model(MAKE_CONFIG[family](num_labels=num_labels, problem_type=problem_type))
    labels = torch.tensor(labels)
    outputs = model(pixel_values, labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    assert outputs.logits.shape == (2, num_labels)
    assert model(pixel_values).loss is None
    as_tuple = model(pixel_values, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss)
    assert torch.equal(as_tuple[1], outputs.logits)


def test_scores_carry_no_gradient_and_hidden_states_do(tiny_pruned_config, pixel_values) -> None:
    outputs = make_model(tiny_pruned_config)(pixel_values, output_hidden_states=True)
    assert not any(scores.requires_grad for scores in outputs.token_scores)
    assert all(states.requires_grad for states in outputs.hidden_states)


# ---- Batches and tokens ------------------------------------------------------------------------------------------


def test_samples_do_not_see_each_other(model) -> None:
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        batched = model(images)
        for i in range(5):
            alone = model(images[i : i + 1])
            torch.testing.assert_close(alone.logits[0], batched.logits[i], atol=1e-5, rtol=1e-4)
            for kept, expected in zip(alone.kept_tokens or (), batched.kept_tokens or (), strict=True):
                assert torch.equal(kept[0], expected[i])
    if batched.kept_tokens is not None:
        assert len(set(map(tuple, batched.kept_tokens[0].tolist()))) > 1, "each keeps its own"


def test_empty_batch(model) -> None:
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 32, 32)).logits.shape == (0, 3)


@pytest.mark.parametrize("alignment", ["repeat", "zero_input", "none"])
def test_keeping_every_token_changes_nothing(alignment, tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    with torch.no_grad():
        dense = model(pixel_values).logits
        model.set_token_pruning({"layers": [1, 2], "keep_ratios": [1.0, 1], "alignment": alignment})
        outputs = model(pixel_values)
    assert torch.equal(outputs.logits, dense)
    count = 16 + NUM_CLS_TOKENS[tiny_config.model_type]
    for kept in outputs.kept_tokens:
        assert kept.tolist() == [list(range(count))] * 2


def test_alignment_matters(tiny_config, pixel_values) -> None:
    model, logits = make_model(tiny_config), []
    for alignment in ("repeat", "zero_input", "none"):
        model.set_token_pruning(TOKEN_PRUNING | {"alignment": alignment})
        with torch.no_grad():
            logits.append(model(pixel_values).logits)
    assert not any(torch.equal(logits[i], logits[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_hidden_states(config, model, pixel_values) -> None:
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
    class_tokens = NUM_CLS_TOKENS[config.model_type]
    # What comes out of layer l-1 has lost no token yet; what comes out of layer l has.
    patches = [16] * 5 if config.token_pruning is None else [16, 16, 12, 12, 8]
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, n + class_tokens, 16) for n in patches]
    with torch.no_grad():
        assert model(pixel_values).hidden_states is None
    if config.token_pruning is None:
        assert outputs.kept_tokens is None
        return
    first, second = outputs.kept_tokens
    assert first.dtype == second.dtype == torch.int64
    for sample in range(2):
        assert set(second[sample].tolist()) < set(first[sample].tolist()) < set(range(16 + class_tokens))


def test_what_the_mixers_add(tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    backbone = FAMILIES[tiny_config.model_type].classes["Backbone"](tiny_config).eval()
    with torch.no_grad():
        for each in (model, backbone):
            assert each(pixel_values).mixer_states is None
            outputs = each(pixel_values, output_hidden_states=True, output_mixer_states=True)
            assert len(outputs.mixer_states) == 4
            # After the first layer of PlainMamba there is a convolution.
            states = pairwise(outputs.hidden_states[1:])
            for (before, after), added in zip(states, outputs.mixer_states[1:], strict=True):
                torch.testing.assert_close(after, before + added)


# ---- Image sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (48, 24), (40, 41), (8, 8)])
def test_other_image_sizes(size, config, model) -> None:
    images = torch.randn(2, 3, *size)
    grid = config.grid_size_for(*size)
    with torch.no_grad():
        hidden_states = model(images, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        assert model(images).logits.isfinite().all()
    assert hidden_states[0].shape[1] == grid[0] * grid[1] + NUM_CLS_TOKENS[config.model_type]
    with pytest.raises(ValueError, match=rf"{grid[0]} x {grid[1]} patches, .* position embeddings are for 4 x 4"):
        model(images, interpolate_pos_encoding=False)


def test_laid_out_size_needs_no_interpolation(model, pixel_values) -> None:
    with torch.no_grad():
        expected = model(pixel_values).logits
        assert torch.equal(model(pixel_values, interpolate_pos_encoding=False).logits, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\); expected shape: \(batch, 3, height, width\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\); expected shape:"),
        (torch.zeros(1, 3, 0, 32), "an image without pixels"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "dtype torch.uint8; normalised floating-point"),
        (
            torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), torch.nan)]),
            r"NaN or infinity in samples \[1\]",
        ),
        (None, "You have to specify `pixel_values`"),
        (torch.zeros(1, 3, 32, 32).numpy(), 'is a ndarray; .* with `return_tensors="pt"`'),
        ([torch.zeros(3, 32, 32)], "is a list; a tensor is expected"),
    ],
    ids=["channels", "axes", "no pixels", "integers", "nan", "none", "numpy", "list"],
)
def test_wrong_pixel_values(images, message, model) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        model(images)


def test_image_smaller_than_a_patch() -> None:
    tiny = torch.randn(1, 3, 1, 1)
    for family in ("videomamba", "vim"):
        with pytest.raises(ValueError, match="too small for one patch of 8 x 8 pixels"):
            make_model(MAKE_CONFIG[family]())(tiny)
    # PlainMamba pads.
    assert make_model(MAKE_CONFIG["plainmamba"]())(tiny).logits.isfinite().all()


# ---- Loading -----------------------------------------------------------------------------------------------------


def test_saving_and_loading(model, pixel_values, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.token_pruning == model.config.token_pruning
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_pruning_on_loading(tiny_config, pixel_values, tmp_path) -> None:
    make_model(tiny_config).save_pretrained(tmp_path)
    loaded = (
        FAMILIES[tiny_config.model_type]
        .auto_classifier(tiny_config)
        .from_pretrained(tmp_path, token_pruning=dict(TOKEN_PRUNING))
    )
    assert len(loaded(pixel_values).kept_tokens) == 2


def test_nothing_but_weights_is_made_on_meta(config) -> None:
    """Loading creates the model on the meta device: tensors outside the state dict would contain garbage."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type].classifier(config)
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(torch.zeros(2, 3, 32, 32, device="meta")).logits.shape == (2, 3)


def test_device_map_with_offloading(model, pixel_values, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model")
    base = model.base_model_prefix
    device_map = {f"{base}.embeddings": "cpu", f"{base}.layers.0": "cpu", f"{base}.norm": "cpu", "classifier": "cpu"}
    device_map |= {f"{base}.layers.{i}": "disk" for i in (1, 2, 3)}
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", scan_backend="torch"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("method", [{"method": "dyvm"}, {"method": "top", "alignment": "learned"}], ids=str)
def test_pruning_parameters_of_offloaded_layers(method, model, pixel_values) -> None:
    """Between calls, offloaded weights are on the meta device, where new ones would have no values."""
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))
    assert next(model.base_model.layers[2].parameters()).is_meta
    model.set_token_pruning({"layers": [1, 3], "keep_ratios": [0.7, 0.6], **method})
    new = [tensor for name, tensor in model.named_parameters() if is_pruning_parameter(name)]
    assert new
    assert not any(tensor.is_meta for tensor in new)
    with torch.no_grad():
        assert model(pixel_values).logits.isfinite().all()


# ---- Backbones ---------------------------------------------------------------------------------------------------


def test_position_embeddings_of_a_backbone_are_resized_unless_it_is_told_not_to(tiny_config, pixel_values) -> None:
    backbone = FAMILIES[tiny_config.model_type].classes["Backbone"](tiny_config).eval()
    with torch.no_grad():
        (expected,), (found,) = (
            backbone(pixel_values, **options).feature_maps for options in ({}, {"interpolate_pos_encoding": False})
        )
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="resize the input, or pass `interpolate_pos_encoding=True`"):
            backbone(torch.randn(1, 3, 48, 32), interpolate_pos_encoding=False)


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_backbone_maps_cover_the_full_grid(size, config, model) -> None:
    config.out_features = ["stem", "stage1", "stage2", "stage4"]
    backbone = FAMILIES[config.model_type].classes["Backbone"](config).eval()
    backbone.load_state_dict(model.base_model.state_dict())
    images, grid = torch.randn(2, 3, *size), config.grid_size_for(*size)
    with torch.no_grad():
        maps = backbone(images).feature_maps
        outputs = model(images, output_hidden_states=True)
    assert [tuple(map.shape) for map in maps] == [(2, 16, *grid)] * 4
    assert backbone.channels == [16] * 4

    states = [outputs.hidden_states[4]]
    if config.token_pruning is not None:
        before = outputs.hidden_states[1], outputs.hidden_states[3]  # as they were dropped, before layers 1 and 3
        states = [*before, *states]
    full = model.base_model.norm(fill_dropped_tokens(states, outputs.kept_tokens or ()))
    if (cls_id := config.cls_token_id(grid[0] * grid[1])) is not None:
        full = torch.cat([full[:, :cls_id], full[:, cls_id + 1 :]], dim=1)
    torch.testing.assert_close(maps[-1], full.transpose(1, 2).unflatten(2, grid))


def test_outputs_of_a_backbone_that_are_given_on_loading(tiny_config, tmp_path) -> None:
    """They replace the saved ones before anything is checked, also if the depth changes."""
    tiny_config.out_features = ["stage1", "stage4"]
    tiny_config.save_pretrained(tmp_path)
    load = type(tiny_config).from_pretrained
    for options in ({"out_features": ["stem", "stage2"]}, {"out_indices": [0, 2]}):
        config = load(tmp_path, num_hidden_layers=2, **options)
        assert (config.out_features, config.out_indices) == (["stem", "stage2"], [0, 2])
        assert config.stage_names == ["stem", "stage1", "stage2"]
        assert FAMILIES[config.model_type].classes["Backbone"](config).channels == [16, 16]
    with pytest.raises(ValueError, match="`feature_source` is 'mixer', but `out_features` has 'stem'"):
        load(tmp_path, feature_source="mixer", out_features=["stem", "stage2"])
    with pytest.raises(ValueError, match="has at most 4 levels; `out_features` names 5"):
        load(tmp_path, feature_pyramid="simple", out_features=tiny_config.stage_names)


def test_depth_of_a_backbone_that_is_given_on_loading(tiny_config, tmp_path) -> None:
    tiny_config.out_features = ["stage1"]
    tiny_config.save_pretrained(tmp_path)
    config = type(tiny_config).from_pretrained(tmp_path, num_hidden_layers=2)
    assert config.out_features == ["stage1"]
    assert config.stage_names == ["stem", "stage1", "stage2"]


# ---- Exporting ---------------------------------------------------------------------------------------------------


def make_small_pruned_model(family: str, scan_backend: str, alignment: str) -> nn.Module:
    """Two layers and nine tokens, because the plain scan is unrolled into one operation per token."""
    schedule = {"layers": [1], "keep_ratios": [0.6], "alignment": alignment}
    options = {"image_size": 24, "num_hidden_layers": 2, "scan_backend": scan_backend, "token_pruning": schedule}
    return make_model(MAKE_CONFIG[family](**options))


def test_export_with_dynamic_batch() -> None:
    """Keeps the model's own output class; test_export.py covers exports without it."""
    model = make_small_pruned_model("plainmamba", "torch", "none")
    images, batch = torch.randn(2, 3, 24, 24), torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (), {"pixel_values": images}, dynamic_shapes={"pixel_values": {0: batch}})
    for size in (2, 5):
        images = torch.randn(size, 3, 24, 24)
        with torch.no_grad():
            expected, exported = model(images), program.module()(pixel_values=images)
        torch.testing.assert_close(exported.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(exported.kept_tokens[0], expected.kept_tokens[0])


class Traced(nn.Module):
    """Returns the outputs as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model(images, return_dict=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("scan_backend", ["auto", "torch"])
def test_trace_by_torchscript(scan_backend, model) -> None:
    """Tools such as TensorBoard's `add_graph` trace in this way. Which tokens are kept, and which scan directions run,
    depends on the images, and must not be recorded."""
    model.config.scan_backend = scan_backend
    if model.config.token_pruning is not None and model.config.selects_blocks:
        model.set_token_pruning({"layers": [1, 3], "keep_ratios": [0.7, 0.6], "block_keep_ratio": 0.5})
        selectors = [module for module in model.modules() if isinstance(module, BlockSelector)]
        for selector in selectors[1:]:
            torch.nn.init.normal_(selector.weight, std=100.0)
    with torch.no_grad():
        traced = torch.jit.trace(Traced(model), torch.randn(2, 3, 32, 32), check_trace=False)
        images = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(traced(images)[0], model(images).logits)


# Each alignment; each family by each backend.
@pytest.mark.parametrize(
    ("family", "scan_backend", "alignment"),
    [
        ("plainmamba", "auto", "repeat"),
        ("plainmamba", "torch", "learned"),
        ("videomamba", "auto", "none"),
        ("videomamba", "torch", "repeat"),
        ("vim", "auto", "learned"),
        ("vim", "torch", "zero_input"),
    ],
)
def test_compile_in_one_graph(family, scan_backend, alignment) -> None:
    model = make_small_pruned_model(family, scan_backend, alignment)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected, outputs = model(images), compiled(images)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.kept_tokens[0], expected.kept_tokens[0])


@needs_inductor
@pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason="without kernels the scan is unrolled")
def test_compile_by_inductor(tmp_path, monkeypatch) -> None:
    """Compiles code around the kernels, for inference only.

    Gradients are not tested: if a stage directly follows PlainMamba-L1's depthwise layer, torch 2.13's inductor loses
    the gradients of everything before it in evaluation mode (they become zero; with `aot_eager`, and in training, they
    are correct).
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, images = make_small_pruned_model("vim", "cpu", "none"), torch.randn(2, 3, 24, 24)
    torch._dynamo.reset()
    with torch.no_grad():
        expected, outputs = model(images), torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs.kept_tokens[0], expected.kept_tokens[0])


# ---- PlainMamba's stem -------------------------------------------------------------------------------------------


@pytest.fixture
def embeddings() -> nn.Module:
    """Embeddings with running statistics as after training, for images that patches do not divide evenly."""
    embeddings = make_model(MAKE_CONFIG["plainmamba"](image_size=36)).plainmamba.embeddings
    for module in embeddings.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
    return embeddings


def layer_by_layer(embeddings: nn.Module, images: Tensor) -> Tensor:
    for stage in embeddings.stem:
        images = nn.functional.relu(stage.normalization(stage.convolution(images)))
    missing = -images.shape[-1] % embeddings.half_patch
    projection = embeddings.projection
    images = nn.functional.pad(images, (0, missing, 0, missing))
    tokens = nn.functional.conv2d(images, projection.weight, projection.bias, embeddings.half_patch)
    return tokens.flatten(2).transpose(1, 2) + embeddings.position_embeddings


@pytest.mark.parametrize("training", [False, True])
def test_stem_computes_what_its_layers_do(training: bool, embeddings) -> None:
    images, results = torch.randn(2, 3, 36, 36), []
    for compute in (lambda: embeddings(images, False)[0], lambda: layer_by_layer(embeddings, images)):
        module_state = {name: tensor.clone() for name, tensor in embeddings.state_dict().items()}
        embeddings.train(training).zero_grad()
        tokens = compute()
        assert tokens.shape == (2, 25, 16)
        tokens.square().mean().backward()
        results.append([tokens, *(parameter.grad for parameter in embeddings.parameters())])
        embeddings.load_state_dict(module_state)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_stem_runs_where_its_weights_are_offloaded(embeddings) -> None:
    from accelerate import cpu_offload

    images = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        expected = embeddings(images, False)[0]
        cpu_offload(embeddings, torch.device("cpu"))
        assert embeddings.stem[0].convolution.weight.is_meta
        offloaded = embeddings(images, False)[0]
    torch.testing.assert_close(offloaded, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
