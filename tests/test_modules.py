"""Modules behave as expected: hooks run, and tools that wrap or replace PyTorch layers find those layers."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TOKEN_PRUNING
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_vssm_prune.families import FAMILIES


@pytest.fixture(params=["dense", "pruned"])
def model(request, tiny_config) -> nn.Module:
    """A model with perturbed weights, so that none of them is zero."""
    if request.param == "pruned":
        tiny_config.token_pruning = dict(TOKEN_PRUNING)
    model = FAMILIES[tiny_config.model_type].classifier(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """PyTorch's own layers in a model, by name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_every_module_runs_its_hooks(mode, model, pixel_values) -> None:
    model.train(mode == "training")
    modules = {
        name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList | nn.ModuleDict)
    }
    ran: set[str] = set()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model(pixel_values)
    assert ran == set(modules)


def test_hooks_may_change_outputs(model, pixel_values) -> None:
    """Doubling the output of any PyTorch layer changes the logits."""
    before = logits_of(model, pixel_values)
    for name, layer in layers_of(model).items():
        handle = layer.register_forward_hook(lambda _module, _inputs, output: 2 * output)
        assert not torch.equal(logits_of(model, pixel_values), before), name
        handle.remove()
    assert torch.equal(logits_of(model, pixel_values), before)


def test_layers_keep_their_classes_contract(model, pixel_values) -> None:
    """Replacing a layer by PyTorch's own class with the same weights changes nothing."""
    before = logits_of(model, pixel_values)
    for name, layer in layers_of(model).items():
        kind = next(base for base in type(layer).__mro__ if base.__module__.startswith("torch.nn"))
        plain = object.__new__(kind)
        plain.__dict__ = layer.__dict__
        parent = model.get_submodule(name.rpartition(".")[0])
        parent._modules[name.rpartition(".")[2]] = plain
        torch.testing.assert_close(logits_of(model, pixel_values), before, msg=name)
        parent._modules[name.rpartition(".")[2]] = layer


class FrozenBatchNorm(nn.Module):
    """Like those of transformers' detectors: buffers instead of parameters, and no `eps` attribute."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def test_replaced_batch_norms(model, pixel_values) -> None:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert bool(norms) == (model.config.model_type == "plainmamba")
    for norm in norms.values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 3)
    before = logits_of(model, pixel_values)
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FrozenBatchNorm(norm))
    torch.testing.assert_close(logits_of(model, pixel_values), before, atol=1e-4, rtol=1e-4)


def test_parametrized_layers(model, pixel_values) -> None:
    """Weight norm changes a layer's class and computes its weight in each call."""
    before = logits_of(model, pixel_values)
    layers = {name: layer for name, layer in layers_of(model).items() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for layer in layers.values():
        parametrizations.weight_norm(layer)
    torch.testing.assert_close(logits_of(model, pixel_values), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for layer in layers.values():
            layer.parametrizations.weight.original0.mul_(1.5)
    assert not torch.allclose(logits_of(model, pixel_values), before, atol=1e-4)


class QuantizedLinear(nn.Module):
    """Like those of quantisers: the weight consists of integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = [linear]  # in a list, so that it is not a submodule
        self.register_buffer("weight", torch.zeros_like(linear.weight, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear[0](x)


def test_quantized_linear_layers(tiny_config, pixel_values) -> None:
    tiny_config.token_pruning = {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": "dyvm"}
    model = FAMILIES[tiny_config.model_type].classifier(tiny_config).eval()
    before = logits_of(model, pixel_values)
    for name, layer in layers_of(model).items():
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, QuantizedLinear(layer))
    assert torch.equal(logits_of(model, pixel_values), before)


# Adapters


def lora(model: nn.Module, **options):
    peft = pytest.importorskip("peft")
    targets = [name for name, layer in layers_of(model).items() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return peft.LoraConfig(**({"r": 2, "target_modules": [name for name in targets if name != "classifier"]} | options))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_on_every_linear_and_convolution(use_dora, model, pixel_values) -> None:
    peft = pytest.importorskip("peft")
    before = logits_of(model, pixel_values)
    adapted = peft.get_peft_model(model, lora(model, use_dora=use_dora))
    torch.testing.assert_close(logits_of(adapted, pixel_values), before, atol=1e-5, rtol=1e-4)
    adapted(pixel_values, labels=torch.tensor([0, 1])).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    assert all(parameter.grad.abs().max() > 0 for name, parameter in trained.items() if "lora_B" in name)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    changed = logits_of(adapted, pixel_values)
    assert not torch.allclose(changed, before, atol=1e-4)
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), pixel_values), changed, atol=1e-4, rtol=1e-3)


def test_adapters_on_our_own_layers_are_refused_by_name(model) -> None:
    peft = pytest.importorskip("peft")
    name = next(name for name, module in model.named_modules() if name.endswith("dt_proj"))
    with pytest.raises(ValueError, match="TimeStepProjection"):
        peft.get_peft_model(model, lora(model, target_modules=[name]))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_adapters_are_saved_alone_and_open(model, folder, pixel_values, tmp_path) -> None:
    opened = AutoModelForImageClassification.from_pretrained(folder)
    opened.add_adapter(lora(opened))
    with torch.no_grad():
        for name, parameter in opened.named_parameters():
            if "lora" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    opened.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, pixel_values), logits_of(opened.eval(), pixel_values))
    assert not torch.allclose(logits_of(again, pixel_values), logits_of(model, pixel_values), atol=1e-5)


def test_transformers_trainer_saves_adapters(folder, tmp_path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.add_adapter(lora(model))
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(4)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=2, save_steps=1, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)


def test_arguments_of_save_pretrained_by_position(model, tmp_path) -> None:
    """Uses transformers' order: main process, state dict, push."""
    weights = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path / "all", True, dict(weights), False, "1KB")
    assert len([*(tmp_path / "all").glob("model-*.safetensors")]) > 1
    opened = type(model).from_pretrained(tmp_path / "all")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in opened.state_dict().items())
    model.save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / "README.md").exists()
    with pytest.raises(TypeError, match="got 21 positional arguments; allowed are at most"):
        model.save_pretrained(tmp_path / "more", *[None] * 20)
