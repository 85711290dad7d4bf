"""Models whose layers are on several devices, as with `device_map="auto"` on a machine with several GPUs.

Such a machine is not needed: each tensor belongs to a device in name only. As on GPUs, operators reject tensors on
different devices, but everything is computed on the CPU.
"""

from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import MAKE_CONFIG, TOKEN_PRUNING, same_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from hf_vssm_prune.families import FAMILIES


CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


class Devices(TorchFunctionMode):
    """Assigns devices to tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.of = WeakIdKeyDictionary()

    def put(self, module: nn.Module, device: torch.device) -> None:
        """Puts a module on a device: inputs are moved there, as by Accelerate's hooks, and outputs stay there."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.of[tensor] = device
        module.register_forward_pre_hook(
            lambda _, inputs, options: (send_to_device(inputs, device), send_to_device(options, device)),
            with_kwargs=True,
        )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs or {}))
        if function == Tensor.device.__get__:
            return self.of.get(args[0], CPU)
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if target is None:
            devices = {self.of.get(leaf, CPU) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
            if len(devices) > 1:
                raise RuntimeError(f"{function.__name__} got tensors on {sorted(map(str, devices))}.")
            target = next(iter(devices), CPU)
        args, kwargs = pytree.tree_unflatten(
            [CPU if isinstance(leaf, torch.device) else leaf for leaf in leaves], structure
        )
        result = function(*args, **kwargs)
        if function is Tensor.to and any(result is leaf for leaf in leaves):
            result = result.view_as(result)  # the tensor itself stays where it is
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.of[leaf] = target
        return result


def run_on_two_devices(model: nn.Module, images: Tensor) -> tuple[Any, Devices]:
    base = getattr(model, "base_model", model)
    devices = Devices()
    for module in (base.embeddings, *base.layers[:2]):
        devices.put(module, FIRST)
    rest = [*base.layers[2:], base.norm, *base.token_predictors.values()]
    for module in rest if base is model else [*rest, model.classifier]:
        devices.put(module, SECOND)
    with devices, torch.no_grad():
        return model(images.to(FIRST)), devices


# A warning of autocast, which one of the methods turns off on the device.
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", [None, "top", "local_merge", "tome", "dyvm"])
def test_classifiers(method, family, pixel_values) -> None:
    schedule = None if method is None else {"layers": [1, 3], "keep_ratios": [0.7, 0.6], "method": method}
    model = FAMILIES[family].classifier(MAKE_CONFIG[family](scan_backend="torch", token_pruning=schedule)).eval()
    with torch.no_grad():
        expected = model(pixel_values)
    outputs, devices = run_on_two_devices(model, pixel_values)
    assert devices.of[outputs.logits] == SECOND
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert same_tensors(outputs.kept_tokens, expected.kept_tokens)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_feature_maps(family, pixel_values) -> None:
    config = MAKE_CONFIG[family](
        scan_backend="torch",
        token_pruning=TOKEN_PRUNING | {"method": "evit", "alignment": "none"},
        out_features=["stage1", "stage4"],
        feature_fill="merged",
    )
    backbone = FAMILIES[family].classes["Backbone"](config).eval()
    with torch.no_grad():
        expected = backbone(pixel_values)
    outputs, _ = run_on_two_devices(backbone, pixel_values)
    for feature_map, expected_map in zip(outputs.feature_maps, expected.feature_maps, strict=True):
        torch.testing.assert_close(feature_map, expected_map)
