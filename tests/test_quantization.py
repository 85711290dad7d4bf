"""int8 linear layers: close to float32, sample by sample; refused where they cannot be."""

import copy

import pytest
import torch
from conftest import make_plainmamba_config
from torch import nn

from hf_vssm_prune import PlainMambaForImageClassification
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.quantization import Int8Linear, quantize_linears


pytestmark = pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch has no int8 matrix product")


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_close_to_float32(bias: bool) -> None:
    """Rounding to 7 and 8 bits, whose errors are independent, leaves about 1%, of each token however large."""
    linear = nn.Linear(256, 64, bias=bias)
    tokens = torch.randn(3, 10, 256) * torch.logspace(-3, 3, 10)[:, None]
    tokens[0, 0] = 0
    with torch.no_grad():
        linear.weight[3] = 0
        expected, result = linear(tokens), Int8Linear(linear)(tokens)
    error = (result - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
    assert error.max() < 0.04
    assert torch.equal(result[0, 0], expected[0, 0])


def test_all_wide_layers_are_replaced(tiny_pruned_config, pixel_values) -> None:
    model = FAMILIES[tiny_pruned_config.model_type].classifier(tiny_pruned_config).eval()
    quantized = quantize_linears(copy.deepcopy(model))
    names = {name.rpartition(".")[2] for name, layer in quantized.named_modules() if isinstance(layer, Int8Linear)}
    assert names == {"in_proj", "out_proj"}
    assert sum(isinstance(layer, Int8Linear) for layer in quantized.modules()) == 8
    with torch.no_grad():
        expected, outputs = model(pixel_values), quantized(pixel_values)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0.05, atol=0.05)
    assert not torch.equal(outputs.logits, expected.logits)


def test_samples_do_not_disturb_each_other(tiny_config, pixel_values) -> None:
    model = quantize_linears(FAMILIES[tiny_config.model_type].classifier(tiny_config))
    with torch.no_grad():
        alone = model(pixel_values[:1]).logits
        beside = model(torch.cat([pixel_values[:1], 100 * pixel_values[1:]])).logits[:1]
    torch.testing.assert_close(beside, alone, rtol=0.02, atol=0.02)


def test_what_cannot_be_quantised_is_named() -> None:
    model = PlainMambaForImageClassification(make_plainmamba_config()).bfloat16()
    with pytest.raises(ValueError, match=r"`plainmamba.layers.0.mixer.in_proj` is torch.bfloat16 on cpu"):
        quantize_linears(model)
    assert not any(isinstance(layer, Int8Linear) for layer in model.modules())
    with pytest.raises(ValueError, match="Sequential has no linear layers called in_proj or out_proj"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)))


def test_saving_is_refused(tmp_path) -> None:
    model = quantize_linears(PlainMambaForImageClassification(make_plainmamba_config()))
    with pytest.raises(RuntimeError, match="save the float32 model"):
        model.save_pretrained(tmp_path)
