"""int8 matrix products for inference on a CPU: weights are quantised once, activations dynamically.

PyTorch's own operators are used (those of its `quantize_dynamic`); torchao's CPU code in eager mode was measured at
half their speed or less.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_vssm_prune.function_transforms import is_transformed


Model = TypeVar("Model", bound=nn.Module)

# The wide projections of the mixers, which account for nearly all multiply-adds. The narrow projections to time steps,
# B and C and the classifier or head stay in float32: int8 would save little time there and lose more accuracy. A head's
# attention may have an `out_proj`, too, whose weight PyTorch reads without calling the layer.
QUANTIZED_LAYERS = ("mixer.in_proj", "mixer.out_proj")


def quantize_linears(model: Model) -> Model:
    """Replaces a model's wide linear layers by int8 layers, for inference on a CPU.

    Each row of a weight has its own scale, and so does each token in each call: the input of `out_proj` has outliers of
    up to 200 times its standard deviation, and those of one image would reduce the precision of all others in the
    batch. Results are float32. The model is changed in place. Afterwards, it cannot be trained, saved, or moved to
    another device or precision, so save it first.

    Args:
        model: a float32 model of any family, on the CPU.

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        ValueError: a layer is not float32 on the CPU, or there is none to quantise.
        RuntimeError: this build of PyTorch has no int8 matrix product.
    """
    if torch.backends.quantized.engine == "none":
        raise RuntimeError("this build of PyTorch has no int8 matrix product (`torch.backends.quantized.engine`).")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".".join(name.split(".")[-2:]) in QUANTIZED_LAYERS
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers called {' or '.join(QUANTIZED_LAYERS)}.")
    for name, layer in layers.items():  # all are checked before the first is replaced
        if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
            raise ValueError(
                f"`{name}` is {layer.weight.dtype} on {layer.weight.device}; only float32 on the CPU can be "
                "quantised: load the model with `dtype=torch.float32` and `device_map=None`."
            )
    for name, layer in layers.items():
        model.set_submodule(name, Int8Linear(layer))
    return model.eval().requires_grad_(False)


@contextmanager
def _fastest_engine() -> Iterator[None]:
    """oneDNN is faster than FBGEMM if the processor has int8 instructions (VNNI, AMX), and slower otherwise."""
    default, supported = torch.backends.quantized.engine, torch.backends.quantized.supported_engines
    if default in ("x86", "fbgemm") and "onednn" in supported and torch.cpu._is_vnni_supported():
        torch.backends.quantized.engine = "onednn"
    try:
        yield
    finally:
        torch.backends.quantized.engine = default


class Int8Linear(nn.Module):
    """Replaces `nn.Linear`, with int8 weights and activations that are quantised in each call."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        # A row of zeros can have any scale, but torch requires a positive one.
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny).double()
        zero_points = torch.zeros_like(scales, dtype=torch.int64)
        with warnings.catch_warnings():  # deprecated in torch 2.13, which has no replacement yet
            warnings.filterwarnings("ignore", ".*quantize_per_channel.*", UserWarning)
            quantized = torch.quantize_per_channel(weight, scales, zero_points, axis=0, dtype=torch.qint8)
        with _fastest_engine():  # a packed weight contains its engine
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """From (..., in_features) in any floating-point precision to float32 of shape (..., out_features)."""
        if not hidden_states.is_floating_point() or hidden_states.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"the int8 layer takes floating-point numbers of shape (..., {self.in_features}), got "
                f"{hidden_states.dtype} of shape {tuple(hidden_states.shape)}."
            )
        if is_transformed() or (torch.is_grad_enabled() and hidden_states.requires_grad):
            raise RuntimeError("int8 layers are for inference: derivatives and torch.func need the float32 model.")
        if hidden_states.numel() == 0:
            return hidden_states.new_zeros((*hidden_states.shape[:-1], self.out_features), dtype=torch.float32)
        if hidden_states.ndim == 1:
            return self(hidden_states.unsqueeze(0)).squeeze(0)
        hidden_states = hidden_states.float()
        # `abs` would need one more pass over a wide tensor, and the infinity norm takes ten times as long as both.
        largest = torch.maximum(hidden_states.amax(-1, keepdim=True), -hidden_states.amin(-1, keepdim=True))
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        # Seven bits for activations: without VNNI, processors add pairs of products in 16 bits; eight would overflow.
        product = torch.ops.quantized.linear_dynamic(hidden_states / largest, self.packed, reduce_range=True)
        return product * largest if self.bias is None else torch.addcmul(self.bias, product, largest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Called for `to`, `half`, `bfloat16`, `cuda`, ..., which cannot change the packed weight."""
        changed = fn(torch.empty(0, dtype=torch.float32))
        if changed.dtype != torch.float32 or changed.device.type != "cpu":
            raise ValueError(
                f"a quantised model stays in float32 on the CPU, and cannot be {changed.dtype} on {changed.device}. "
                "Other layers may have been changed already, so load the float32 model again; for half precision, use "
                "it without int8."
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: object) -> None:
        raise RuntimeError("a quantised model cannot be saved: save the float32 model, and quantise it after loading.")
