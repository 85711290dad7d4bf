"""DyVM's block selection: results compared with models that run every direction and multiply its output by the gates,
training, and effects on other features."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import MAKE_CONFIG, gradients_with_checkpointing, make_plainmamba_config, make_vim_config, same_tensors
from test_training import datasets, fresh_accelerator, image_folder, make_recipe, make_trainer  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, UperNetConfig
from transformers import UperNetForSemanticSegmentation as UperNet

from hf_vssm_prune import VimConfig, count_flops, prunable
from hf_vssm_prune.export import trace
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub.saving import code_files, save_for_hub
from hf_vssm_prune.kernels import KERNELS
from hf_vssm_prune.pruning_block_selection import BlockSelector, draw_gates
from hf_vssm_prune.training.arguments import ElasticArguments, PruningArguments
from hf_vssm_prune.training.elastic import what_is_pruned
from hf_vssm_prune.training.evaluation import compare_models
from hf_vssm_prune.training.losses import LossWeights, block_ratio_loss, training_loss
from hf_vssm_prune.training.run_log import LossWindow
from hf_vssm_prune.training.tasks.classification import ImageClassification


WITH_CLASS_TOKEN = ["vim", "videomamba"]
# Of the 4 layers, these select: `top` and `local_top` read the results of the mixers before their stages.
SELECTING = {"dyvm": [0, 1, 2, 3], "uniform": [0, 1, 2, 3], "top": [1, 3], "local_top": [1, 3]}


def pruning(method: str = "dyvm", **changes) -> dict:
    return {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": method, "block_keep_ratio": 0.5, **changes}


def make_model(config) -> nn.Module:
    """A float64 model in evaluation mode, with weights large enough for every part of it to matter."""
    model = FAMILIES[config.model_type].classifier(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "block_selector" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def decide_by_image(model: nn.Module, images: torch.Tensor) -> None:
    """Sets the selectors' weights so that each direction runs for about half of the images. The first layer is skipped,
    because its class token is the same for all images."""
    for index, layer in enumerate(model.base_model.layers):
        selector, seen = layer.mixer.block_selector, []
        if selector is None or index == 0:
            continue
        hook = selector.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            model(images)
            hook.remove()
            selector.weight.normal_()
            selector.bias.copy_(-(seen[0] @ selector.weight.T).median(dim=0).values - 1e-6)


def selectors_of(model: nn.Module) -> list[BlockSelector]:
    return [module for module in model.modules() if isinstance(module, BlockSelector)]


def set_gates(model: nn.Module, gates: torch.Tensor) -> None:
    """Replaces the decisions of the selecting layers by the given ones (layers, batch, directions)."""
    for selector, of_layer in zip(selectors_of(model), gates, strict=True):
        selector.register_forward_hook(lambda module, inputs, output, of_layer=of_layer: of_layer)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def mixed_gates() -> torch.Tensor:
    """Gates of 4 layers and 5 images, including a direction that no image selects, one that all select, and an image
    that selects neither."""
    gates = (torch.rand(4, 5, 2) < 0.5).double()
    gates[1, :, 0], gates[1, :, 1], gates[3, 2] = 0, 1, 0
    assert 0 < gates.mean() < 1
    return gates


# ---- The result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
@pytest.mark.parametrize(("method", "alignment"), [("dyvm", "none"), ("dyvm", "repeat"), ("local_top", "repeat")])
def test_skipping_is_multiplying_by_the_gates(family, method, alignment, images, mixed_gates) -> None:
    """Gaps and stand-ins differ between images, and stay with the images for which a direction runs."""
    model = make_model(MAKE_CONFIG[family](token_pruning=pruning(method, alignment=alignment)))
    gates = mixed_gates[SELECTING[method]]
    everything = {name: value for name, value in model.config.token_pruning.items() if name != "block_keep_ratio"}
    hooks = []
    for index, of_layer in zip(SELECTING[method], gates, strict=True):
        mixer = model.base_model.layers[index].mixer
        for scan, gate in zip((mixer.forward_scan, mixer.backward_scan), of_layer.T, strict=True):
            hooks.append(scan.register_forward_hook(lambda m, i, o, g=gate: (o[0] * g[:, None, None], o[1])))
    with torch.no_grad():
        multiplied = model(images, token_pruning=everything)
        for hook in hooks:
            hook.remove()
        dense = model(images, token_pruning=everything)
        set_gates(model, gates)
        skipped = model(images, output_block_gates=True)
    assert same_tensors(skipped.kept_tokens, multiplied.kept_tokens)
    torch.testing.assert_close(skipped.logits, multiplied.logits, rtol=0, atol=1e-12)
    assert (skipped.logits - dense.logits).abs().amax(1).min() > 1e-6
    assert torch.equal(torch.stack(skipped.block_gates), gates)


def test_a_direction_runs_for_the_images_that_select_it(images, mixed_gates) -> None:
    model = make_model(make_vim_config(token_pruning=pruning()))
    set_gates(model, mixed_gates)
    sizes: dict[tuple[int, int], int] = {}
    for index, layer in enumerate(model.base_model.layers):
        for direction, scan in enumerate((layer.mixer.forward_scan, layer.mixer.backward_scan)):
            place = index, direction
            scan.register_forward_pre_hook(lambda m, inputs, place=place: sizes.update({place: len(inputs[0])}))
    with torch.no_grad():
        model(images)
    expected = {(index, direction): int(mixed_gates[index, :, direction].sum()) for index, direction in sizes}
    assert sizes == expected
    assert (1, 0) not in sizes, "no image selects it"
    sizes.clear()
    with torch.no_grad():
        model(images, token_pruning=None)
    assert set(sizes.values()) == {5}, "a dense call runs everything"


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_an_image_does_not_depend_on_the_others(family, images) -> None:
    model = make_model(MAKE_CONFIG[family](token_pruning=pruning()))
    decide_by_image(model, images)
    with torch.no_grad():
        together = model(images, output_block_gates=True)
        alone = [model(image[None], output_block_gates=True) for image in images]
    gates = torch.stack(together.block_gates)
    assert ((gates[1:].sum(1) > 0) & (gates[1:].sum(1) < 5)).any(), "images decide differently"
    assert torch.equal(gates, torch.cat([torch.stack(one.block_gates) for one in alone], dim=1))
    torch.testing.assert_close(torch.cat([one.logits for one in alone]), together.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
def test_at_first_everything_runs(family, images) -> None:
    model = make_model(MAKE_CONFIG[family](token_pruning=pruning(block_keep_ratio=None)))
    with torch.no_grad():
        before = model(images).logits
        model.set_token_pruning({**model.config.token_pruning, "block_keep_ratio": 0.5})
        after = model(images, output_block_gates=True)
    assert len(after.block_gates) == 4
    assert torch.stack(after.block_gates).eq(1).all()
    assert torch.equal(after.logits, before)


def test_selectors_read_the_class_token(images) -> None:
    model = make_model(make_vim_config(token_pruning=pruning()))
    mixer, seen = model.base_model.layers[2].mixer, []
    mixer.block_selector.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mixer.in_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        kept = model(images).kept_tokens[0]  # layer 2 is between the stages
    projected, features = seen
    rows = (kept == 8).long().argmax(1)
    assert torch.equal(features, projected[torch.arange(5), rows])


# ---- Training ----------------------------------------------------------------------------------------------------


def test_drawn_gates_are_0_or_1_by_probability() -> None:
    logits = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).repeat(40_000, 1)
    gates = draw_gates(logits)
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(gates.mean(0), torch.sigmoid(logits[0]), atol=0.01, rtol=0)


def test_the_gradient_reaches_the_selector() -> None:
    """Compares one mixer with a derivative by hand: a gate's gradient is what the direction would have added, times the
    slope s (1 - s) / 2 of the sigmoid at the noisy logit."""
    model = make_model(make_vim_config(token_pruning=pruning())).train()
    mixer, hidden_states = model.base_model.layers[0].mixer, torch.randn(3, 17, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.block_selector.weight.normal_()
        mixer.block_selector.bias.normal_()
    layout = layout_of(model, hidden_states)
    weights = torch.randn(3, 17, 16, dtype=torch.float64)
    torch.manual_seed(1)
    mixed, _ = mixer(hidden_states, layout, False)
    (mixed * weights).sum().backward()

    with torch.no_grad():
        projected = mixer.in_proj(hidden_states)
        features = projected[:, 8]
        logits = features @ mixer.block_selector.weight.T + mixer.block_selector.bias
        torch.manual_seed(1)
        first, second = torch.empty_like(logits).exponential_().log(), torch.empty_like(logits).exponential_().log()
        soft = 1 / (1 + (-(logits - first + second) / 2).exp())
        x, gate = projected.chunk(2, dim=-1)
        outputs = [scan(x, gate, layout)[0] for scan in (mixer.forward_scan, mixer.backward_scan)]
        expected_mixed = sum(out * (soft[:, i] > 0.5)[:, None, None] for i, out in enumerate(outputs))
        torch.testing.assert_close(mixed, expected_mixed @ mixer.out_proj.weight.T / 2)
        of_gated = weights @ mixer.out_proj.weight / 2
        slopes = torch.stack([(of_gated * out).sum((1, 2)) for out in outputs], dim=1) * soft * (1 - soft) / 2
    torch.testing.assert_close(mixer.block_selector.bias.grad, slopes.sum(0))
    torch.testing.assert_close(mixer.block_selector.weight.grad, slopes.T @ features)


def layout_of(model: nn.Module, hidden_states: torch.Tensor):
    """The layout passed to the first layer."""
    seen = []
    hook = model.base_model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        model(torch.randn(len(hidden_states), 3, 32, 32, dtype=torch.float64))
    hook.remove()
    return seen[0]


def loss_terms(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **weights) -> dict[str, torch.Tensor]:
    losses = LossWeights(**weights)
    layers, block_keep_ratio = what_is_pruned(model.config.token_pruning)
    outputs = model(images, **losses.model_options(block_keep_ratio))
    return training_loss(ImageClassification(), outputs, None, {"labels": labels}, losses, layers, block_keep_ratio)


def test_block_ratio_loss() -> None:
    gates = [torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])]
    assert block_ratio_loss(gates, 0.75).item() == pytest.approx((4 / 8 - 0.75) ** 2)


def test_the_loss_has_its_weight_only_where_blocks_are_selected(images) -> None:
    model, labels = make_model(make_vim_config(token_pruning=pruning())), torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        terms = loss_terms(model, images, labels)
        assert terms["block_ratio"].item() == pytest.approx(0.25), "everything runs"
        torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + 10 * terms["block_ratio"])
        terms = loss_terms(model, images, labels, block_ratio_weight=2.0)
        torch.testing.assert_close(terms["loss"], terms["cross_entropy"] + 2 * terms["block_ratio"])
        assert set(loss_terms(model, images, labels, block_ratio_weight=0.0)) == {"loss", "cross_entropy"}
        model.set_token_pruning({**model.config.token_pruning, "block_keep_ratio": None})
        assert set(loss_terms(model, images, labels)) == {"loss", "cross_entropy"}


def test_the_loss_brings_the_fraction_to_its_target() -> None:
    schedule = {"layers": [1], "keep_ratios": [0.5], "method": "uniform", "block_keep_ratio": 0.75}
    model = AutoModelForImageClassification.from_config(make_vim_config(num_hidden_layers=2, token_pruning=schedule))
    selectors = nn.ModuleList(selectors_of(model.train()))
    optimizer = torch.optim.SGD(selectors.parameters(), lr=30)
    images, fractions = torch.randn(16, 3, 32, 32), []
    for _ in range(50):
        gates = model(images, output_block_gates=True).block_gates
        fractions.append(torch.stack(gates).mean().item())
        optimizer.zero_grad()
        block_ratio_loss(gates, 0.75).backward()
        optimizer.step()
    assert fractions[0] > 0.9
    assert sum(fractions[-15:]) / 15 == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize("method", ["dyvm", "top"])
def test_every_selector_is_trained_with_and_without_checkpointing(method, images) -> None:
    """Layers that never select have no selector, because distributed training would wait for its gradient."""
    model = make_model(make_vim_config(token_pruning=pruning(method))).train()
    with torch.no_grad():
        for selector in selectors_of(model):
            selector.bias.zero_()
    have = [index for index, layer in enumerate(model.base_model.layers) if layer.mixer.block_selector is not None]
    assert have == SELECTING[method]
    biases = [selector.bias for selector in selectors_of(model)]
    labels = torch.zeros(5, dtype=torch.int64)
    gradients = gradients_with_checkpointing(model, lambda: loss_terms(model, images, labels)["loss"], biases)
    for plain, checkpointed in gradients:
        assert plain.abs().min() > 0
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("recorded", ["output_block_gates", "output_mixer_states"])
def test_recorded_outputs_without_gradient_are_refused(recorded, images) -> None:
    """Reentrant checkpointing runs layers without gradients: a loss on the gates would train no selector."""
    model = make_model(make_vim_config(token_pruning=pruning())).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=rf"'{recorded}'.* no gradient .* `{{'use_reentrant': False}}`"):
        model(images, **{recorded: True})
    with torch.no_grad():
        model(images, **{recorded: True})
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model(images, **{recorded: True})[recorded.removeprefix("output_")][0].requires_grad


def test_what_no_schedule_uses_is_frozen() -> None:
    model = make_model(make_vim_config(token_pruning=pruning()))
    assert model.has_pruning_parameters
    local_top = model.config.complete_token_pruning(pruning("local_top"))
    for schedules, trained in (
        ([local_top], [1, 3]),
        ([local_top, model.config.token_pruning], range(4)),
        ([None], []),
    ):
        model.freeze_pruning_parameters(schedules)
        layers = [layer.mixer.block_selector for layer in model.base_model.layers]
        assert [i for i, selector in enumerate(layers) if selector.bias.requires_grad] == list(trained)


def test_log_means_are_over_the_steps_that_have_a_term() -> None:
    """With elastic budgets, a dense step has no block ratio."""
    window = LossWindow()
    for step in ({"loss": 1.0}, {"loss": 3.0, "block_ratio": 0.5}):
        window.add_step(step)
    assert window.means() == {"loss": 2.0, "block_ratio": 0.5}


def test_training_measures_what_runs(datasets, tmp_path) -> None:  # noqa: F811
    """Also works with elastic budgets, where a dense step has no block ratio."""
    config = make_vim_config(token_pruning=pruning("uniform"))
    recipe = make_recipe(tmp_path, max_train_steps=3, learning_rate=1e-4)
    recipe = replace(recipe, elastic=ElasticArguments(elastic_budgets=[0, 0.35]))
    results = make_trainer(config, datasets, recipe).train()
    assert results["eval_block_fraction"] == 1, "three steps change nothing"
    flops = count_flops(config, block_fraction=1.0).pruned
    assert results["gflops_pruned"] == flops.published / 1e9 > count_flops(config).pruned.published / 1e9


def test_evaluation_counts_what_runs(images) -> None:
    models = {name: make_model(make_vim_config(token_pruning=pruning("uniform"))).float() for name in ("half", "all")}
    gates = torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 0]])
    set_gates(models["half"], gates.repeat(4, 1, 1))
    batch = {"pixel_values": images[:4].float(), "labels": torch.zeros(4, dtype=torch.int64)}
    evaluations = compare_models(ImageClassification(), models, [batch, batch], torch.device("cpu"))
    for name, fraction in (("half", 3 / 8), ("all", 1.0)):
        assert evaluations[name].block_fraction == fraction
        flops = count_flops(models[name].config, block_fraction=fraction).pruned
        assert evaluations[name].gflops_total == flops.total / 1e9
    scans = [count_flops(models["all"].config, block_fraction=f).pruned.breakdown["scans"] for f in (0.25, 0.5, 1)]
    assert scans == [scans[0], 2 * scans[0], 4 * scans[0]]


# ---- FLOPs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
@pytest.mark.parametrize("method", ["uniform", "top"])
def test_flops_are_those_that_run(family, method, monkeypatch) -> None:
    """Counts linear layers and convolutions for four images, half of which select a direction."""
    no_scan = SimpleNamespace(unavailable=lambda device_type: None, selective_scan=lambda u, *others: u)
    monkeypatch.setitem(KERNELS, "no scan", no_scan)
    config = MAKE_CONFIG[family](token_pruning=pruning(method), scan_backend="no scan")
    model = FAMILIES[family].classifier(config).eval()
    set_gates(model, torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0]]).repeat(len(SELECTING[method]), 1, 1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    flops = count_flops(config).pruned
    assert counter.get_total_flops() // 2 == 4 * (flops.total - flops.breakdown["scans"])
    lengths = [17, 13, 13, 9]  # of the layers, with the class token
    shares = [0.5 if layer in SELECTING[method] else 1 for layer in range(4)]
    scans = sum(2 * 9 * length * 32 * 4 * share for length, share in zip(lengths, shares, strict=True))
    assert flops.breakdown["scans"] == scans


def test_published_flops() -> None:
    """Vim-S with the ratios of the authors' script. The paper reports -35.2%, with the fraction of blocks that its
    model ran."""
    schedule = {"layers": [6, 12, 18], "keep_ratios": [0.7] * 3, "method": "dyvm", "block_keep_ratio": 0.8}
    assert count_flops(VimConfig.from_preset("S", token_pruning=schedule)).reduction == pytest.approx(0.352, abs=0.007)


@pytest.mark.parametrize("method", ["dyvm", "top"])
def test_budgets_include_the_selection(method) -> None:
    config = make_vim_config(image_size=64, num_hidden_layers=6)
    for ratio in (None, 0.9, 0.5):
        options = {"flops_reduction": 0.3, "method": method, "block_keep_ratio": ratio}
        config.token_pruning = options
        assert count_flops(config).reduction == pytest.approx(0.3, abs=0.005)
    few, many = (config.complete_token_pruning(options | {"block_keep_ratio": r})["keep_ratios"] for r in (0.5, 0.9))
    assert all(a > b for a, b in zip(few, many, strict=True)), "what is skipped need not be dropped"
    with pytest.raises(ValueError, match=r"no schedule comes within half a point .* nearest one removes 0\."):
        config.complete_token_pruning(options | {"flops_reduction": 0.02, "block_keep_ratio": 0.1})


# ---- Options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -0.5, 1.5, "half", True])
def test_bad_ratios(value) -> None:
    with pytest.raises(ValueError, match=r"\['block_keep_ratio'\]` is .*; it must be greater than 0 and at most 1"):
        make_vim_config(token_pruning=pruning(block_keep_ratio=value))


@pytest.mark.parametrize("make_config", [make_plainmamba_config, lambda **o: make_vim_config(use_cls_token=False, **o)])
def test_models_that_cannot_select(make_config) -> None:
    with pytest.raises(ValueError, match=r"is 0\.5, but \w+ cannot select blocks: this needs a class token"):
        make_config(token_pruning=pruning())
    assert make_config(token_pruning=pruning("uniform", block_keep_ratio=None)).token_pruning["method"] == "uniform"


def test_a_new_budget_keeps_the_selection() -> None:
    config = make_vim_config(token_pruning=pruning())
    schedule = {"layers": [2], "keep_ratios": [0.5]}
    assert config.complete_token_pruning(schedule)["block_keep_ratio"] == 0.5
    assert config.complete_token_pruning(schedule | {"block_keep_ratio": 0.7})["block_keep_ratio"] == 0.7
    for off in ({"block_keep_ratio": None}, {"method": "dyvm"}):
        assert "block_keep_ratio" not in config.complete_token_pruning(schedule | off)


def test_options_of_the_commands() -> None:
    options = PruningArguments(prune_layers=[2], keep_ratios=[0.5], prune_method="dyvm", block_keep_ratio=0.8)
    assert options.schedule(make_vim_config())["block_keep_ratio"] == 0.8
    with pytest.raises(ValueError, match=r"--block_keep_ratio is 1\.2: it must be greater than 0 and at most 1"):
        PruningArguments(block_keep_ratio=1.2)
    with pytest.raises(ValueError, match=r"--block_keep_ratio is 0\.8, but there is no schedule"):
        PruningArguments(block_keep_ratio=0.8).schedule(make_vim_config())


def test_a_call_with_blocks_to_select_needs_selectors(images) -> None:
    model = make_model(make_vim_config())
    with pytest.raises(ValueError, match=r"no block selector: `model\.set_token_pruning` creates it"):
        model(images, token_pruning=pruning("uniform"))


# ---- Saved, compiled, exported, in other models ------------------------------------------------------------------


def test_selectors_are_saved(images, tmp_path) -> None:
    model = make_model(make_vim_config(token_pruning=pruning()))
    decide_by_image(model, images)
    model, images = model.float(), images.float()
    folder = save_for_hub(model, tmp_path / "model")
    opened = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(opened(images).logits, model(images).logits)
    assert "`block_keep_ratio` is 0.5" in (folder / "README.md").read_text()
    assert "pruning_block_selection.py" in {file.name for file in code_files(model.config)}
    dense = AutoModelForImageClassification.from_pretrained(folder, token_pruning=None)
    assert selectors_of(dense) == []
    selecting = AutoModelForImageClassification.from_pretrained(
        save_for_hub(dense, tmp_path / "d"), token_pruning=pruning()
    )
    assert all(selector.bias.eq(5).all() and selector.weight.eq(0).all() for selector in selectors_of(selecting))


@pytest.fixture
def small_model() -> nn.Module:
    schedule = {"layers": [1], "keep_ratios": [0.6], "method": "uniform", "alignment": "none", "block_keep_ratio": 0.5}
    model = make_model(make_vim_config(num_hidden_layers=2, token_pruning=schedule)).float()
    decide_by_image(model, torch.randn(4, 3, 32, 32))
    return model


def test_exported_programs_multiply(small_model) -> None:
    program, images = trace(small_model).module(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        outputs = small_model(images, output_block_gates=True)
        assert 0 < outputs.block_gates[1].mean() < 1
        torch.testing.assert_close(program(pixel_values=images)[0], outputs.logits)


def test_compiled_models_multiply(small_model) -> None:
    images = torch.randn(4, 3, 32, 32)
    compiled = torch.compile(small_model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, small_model(images).logits)


def test_per_sample_gradients_of_inputs(small_model) -> None:
    """`torch.func` cannot skip images either, so outputs are multiplied by the gates."""
    images = torch.randn(3, 3, 32, 32)
    found = torch.func.vmap(torch.func.grad(lambda image: small_model(image[None]).logits.square().sum()))(images)
    images.requires_grad_()
    small_model(images).logits.square().sum().backward()
    torch.testing.assert_close(found, images.grad)


def test_backbones_and_heads_return_gates(images) -> None:
    backbone = make_vim_config(token_pruning=pruning(), out_features=["stage2", "stage4"])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, num_labels=5)
    model = prunable(UperNet(config)).eval()
    with torch.no_grad():
        outputs = model(images.float(), output_block_gates=True)
        assert [tuple(gates.shape) for gates in outputs.block_gates] == [(5, 2)] * 4
        assert model(images.float()).block_gates is None
