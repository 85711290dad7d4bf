"""int8 linear layers: close to float32, independent of other samples, and rejected where they cannot be used."""

import copy
from functools import partial

import pytest
import torch
from conftest import make_model, make_plainmamba_config, relative_error
from torch import nn

from hf_vssm_prune import PlainMambaForImageClassification
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.quantization import Int8Linear, _fastest_engine, quantize_linears


pytestmark = pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch has no int8 matrix product")


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_close_to_float32(bias: bool) -> None:
    """Rounding to 7 and 8 bits, with independent errors, leaves an error of about 1% for each token, whatever its
    magnitude."""
    linear = nn.Linear(256, 64, bias=bias)
    tokens = torch.randn(3, 10, 256) * torch.logspace(-3, 3, 10)[:, None]
    tokens[0, 0] = 0
    with torch.no_grad():
        linear.weight[3] = 0
        expected, result = linear(tokens), Int8Linear(linear)(tokens)
    error = (result - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
    assert error.max() < 0.04
    assert torch.equal(result[0, 0], expected[0, 0])


@pytest.mark.parametrize("shape", [(0, 7, 16), (2, 0, 16), (0, 16), (16,), (3, 16), (2, 3, 4, 16)])
def test_layer_takes_tokens_of_any_shape(shape: tuple[int, ...]) -> None:
    layer, linear = Int8Linear(nn.Linear(16, 5)), nn.Linear(16, 5)
    with torch.no_grad():
        result = layer(torch.randn(shape))
    assert result.shape == linear(torch.zeros(shape)).shape
    assert result.dtype == torch.float32


def test_layer_takes_tokens_of_any_precision_and_layout() -> None:
    layer = Int8Linear(nn.Linear(16, 5))
    tokens = torch.randn(6, 16, 3).transpose(1, 2)
    expected = layer(tokens.contiguous())
    assert torch.equal(layer(tokens), expected)
    assert torch.equal(layer(tokens.double()), expected)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(layer(tokens.to(dtype)), layer(tokens.to(dtype).float()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_spoils_no_other_token(value: float) -> None:
    layer, tokens = Int8Linear(nn.Linear(16, 5)), torch.randn(3, 16)
    expected = layer(tokens)
    tokens[1, 4] = value
    result = layer(tokens)
    assert not result[1].isfinite().any()
    torch.testing.assert_close(result[::2], expected[::2], rtol=0.1, atol=0.02)


def test_what_a_layer_cannot_take_is_named() -> None:
    layer = Int8Linear(nn.Linear(16, 5))
    for wrong in (torch.randn(2, 15), torch.ones(2, 16, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"shape \(..., 16\), got torch\.\w+ of shape"):
            layer(wrong)
    with pytest.raises(RuntimeError, match="need the float32 model"):
        layer(torch.randn(2, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="need the float32 model"):
        torch.func.jvp(layer, (torch.randn(2, 16),), (torch.randn(2, 16),))


def test_an_empty_batch_has_no_logits(tiny_pruned_config) -> None:
    model = quantize_linears(FAMILIES[tiny_pruned_config.model_type].classifier(tiny_pruned_config))
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 32, 32)).logits.shape == (0, 3)


def test_all_wide_layers_are_replaced(tiny_config, pixel_values) -> None:
    model = make_model(tiny_config)
    quantized = quantize_linears(copy.deepcopy(model))
    names = {name.rpartition(".")[2] for name, layer in quantized.named_modules() if isinstance(layer, Int8Linear)}
    assert names == {"in_proj", "out_proj"}
    assert sum(isinstance(layer, Int8Linear) for layer in quantized.modules()) == 8
    with torch.no_grad():
        expected, outputs = model(pixel_values), quantized(pixel_values)
    assert 0 < relative_error(outputs.logits, expected.logits) < 0.15


class Attention(nn.Module):
    """Attention as in a head: PyTorch reads the weight of `out_proj` without calling the layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.cross_attn = model, nn.MultiheadAttention(16, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.model(pixel_values).last_hidden_state
        return self.cross_attn(states, states, states)[0]


def test_layers_of_a_head_stay_in_float32(pixel_values) -> None:
    model = Attention(PlainMambaForImageClassification(make_plainmamba_config()).base_model)
    quantized = quantize_linears(model)
    assert {name.split(".")[0] for name, layer in quantized.named_modules() if isinstance(layer, Int8Linear)} == {
        "model"
    }
    with torch.no_grad():
        assert quantized(pixel_values).isfinite().all()


@pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm")
    or "onednn" not in torch.backends.quantized.supported_engines,
    reason="another processor, or a PyTorch without oneDNN",
)
def test_onednn_is_used_if_it_is_there_and_faster(monkeypatch) -> None:
    default = torch.backends.quantized.engine
    for has_vnni in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has_vnni=has_vnni: has_vnni)
        with _fastest_engine():
            assert torch.backends.quantized.engine == ("onednn" if has_vnni else default)
        assert torch.backends.quantized.engine == default
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch._C, "_supported_qengines", lambda: [1])  # FBGEMM
    with _fastest_engine():
        assert torch.backends.quantized.engine == default


def test_samples_do_not_disturb_each_other(tiny_config, pixel_values) -> None:
    model = quantize_linears(make_model(tiny_config))
    with torch.no_grad():
        alone = model(pixel_values[:1]).logits
        beside = model(torch.cat([pixel_values[:1], 100 * pixel_values[1:]])).logits[:1]
    assert relative_error(beside, alone) < 0.02


def test_what_cannot_be_quantised_is_named() -> None:
    model = PlainMambaForImageClassification(make_plainmamba_config()).bfloat16()
    with pytest.raises(ValueError, match=r"`plainmamba.layers.0.mixer.in_proj` is torch.bfloat16 on cpu"):
        quantize_linears(model)
    assert not any(isinstance(layer, Int8Linear) for layer in model.modules())
    with pytest.raises(ValueError, match=r"Sequential has no linear layers called mixer\.in_proj or mixer\.out_proj"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, partial(nn.Module.to, device="meta")]
)
def test_another_precision_or_device_is_refused(change) -> None:
    model = quantize_linears(PlainMambaForImageClassification(make_plainmamba_config()))
    assert model.float().cpu() is model
    with pytest.raises(ValueError, match="a quantised model stays in float32 on the CPU, and cannot be torch"):
        change(model)


def test_saving_is_refused(tmp_path) -> None:
    model = quantize_linears(PlainMambaForImageClassification(make_plainmamba_config()))
    with pytest.raises(RuntimeError, match="save the float32 model"):
        model.save_pretrained(tmp_path)
