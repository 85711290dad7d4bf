"""FLOP counts compared with the published figures, and with what the models actually compute."""

from types import SimpleNamespace

import pytest
import torch
from conftest import MAKE_CONFIG, TOKEN_PRUNING
from torch.utils.flop_counter import FlopCounterMode

from hf_vssm_prune import PlainMambaConfig, VimConfig, count_flops
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.kernels import KERNELS


# Parameters, and published FLOPs in G to their last printed digit.
PUBLISHED = [
    (PlainMambaConfig, "L1", 7_551_656, "3.01"),
    (PlainMambaConfig, "L2", 26_145_832, "8.06"),
    (PlainMambaConfig, "L3", 50_956_456, "14.41"),
    (VimConfig, "T", 7_148_008, "1.445"),
    (VimConfig, "S", 25_796_584, "5.07"),
    (VimConfig, "B", 97_598_440, "18.85"),
]
PUBLISHED_PRUNED = [
    (PlainMambaConfig, "L3", {"layers": [6, 12, 18], "keep_ratios": [0.7] * 3}, "8.43", "41.5"),
    (VimConfig, "S", {"layers": [5, 10, 15], "keep_ratios": [0.8] * 3}, "3.585", "29.3"),
]


def printed_like(value: float, figure: str) -> str:
    return f"{value:.{len(figure.split('.')[1])}f}"


@pytest.mark.parametrize(("config_class", "preset", "parameters", "flops"), PUBLISHED)
def test_published_models(config_class, preset, parameters, flops) -> None:
    config = config_class.from_preset(preset)
    count = count_flops(config)
    assert printed_like(count.dense.published / 1e9, flops) == flops
    assert count.pruned == count.dense
    assert count.reduction == 0
    with torch.device("meta"):
        model = FAMILIES[config.model_type].classifier(config)
    assert model.num_parameters() == parameters


@pytest.mark.parametrize(("config_class", "preset", "schedule", "flops", "reduction"), PUBLISHED_PRUNED)
def test_published_pruned_models(config_class, preset, schedule, flops, reduction) -> None:
    count = count_flops(config_class.from_preset(preset, token_pruning=schedule))
    assert printed_like(count.pruned.published / 1e9, flops) == flops
    assert printed_like(100 * count.reduction, reduction) == reduction
    assert count.dense == count_flops(config_class.from_preset(preset)).dense


# Of VideoMamba's tiny model: 5 for each channel of each token, dense and pruned to 12 and 8 patches.
NORMS = 5 * 16 * 17 * 5, 5 * 16 * (17 + 13 + 13 + 9 + 9)


def test_conventions(tiny_pruned_config) -> None:
    """Published figures count everything for PlainMamba and one of two directions for Vim; for VideoMamba no
    directions, but norms."""
    dense, pruned = count_flops(tiny_pruned_config).dense, count_flops(tiny_pruned_config).pruned
    for count in (dense, pruned):
        assert sum(count.breakdown.values()) == count.total
        in_directions = sum(count.breakdown[part] for part in ("convolutions", "input_projections", "scans"))
        left_out = {"plainmamba": 0, "videomamba": in_directions, "vim": in_directions / 2}
        added = NORMS[count is pruned] if tiny_pruned_config.model_type == "videomamba" else 0
        assert count.total - count.published + added == left_out[tiny_pruned_config.model_type]


@pytest.mark.parametrize("alignment", ["repeat", "zero_input", "none"])
def test_alignment_costs_nothing(alignment, tiny_pruned_config) -> None:
    aligned = type(tiny_pruned_config)(
        **{**tiny_pruned_config.to_diff_dict(), "token_pruning": TOKEN_PRUNING | {"alignment": alignment}}
    )
    assert count_flops(aligned) == count_flops(tiny_pruned_config)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_scans_are_counted_by_the_fields_formula(family) -> None:
    config = MAKE_CONFIG[family](token_pruning={"layers": [2], "keep_ratios": [0.5]})
    with_cls_token = 2 * 17 + 2 * 9, 2
    tokens, scans = {"plainmamba": (2 * 16 + 2 * 8, 4), "videomamba": with_cls_token, "vim": with_cls_token}[family]
    assert count_flops(config).pruned.breakdown["scans"] == scans * 9 * tokens * 32 * 4


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("token_pruning", [None, dict(TOKEN_PRUNING)], ids=["dense", "pruned"])
@pytest.mark.parametrize("image_size", [32, (40, 24)])
@pytest.mark.parametrize("changes", [{}, {"num_channels": 1, "expand": 3, "num_hidden_layers": 5, "num_labels": 7}])
def test_linear_layers_and_convolutions_are_those_that_run(
    family, token_pruning, image_size, changes, monkeypatch
) -> None:
    # In plain PyTorch, and without the scans' own products.
    no_scan = SimpleNamespace(unavailable=lambda device_type: None, selective_scan=lambda u, *others: u)
    monkeypatch.setitem(KERNELS, "no scan", no_scan)
    config = MAKE_CONFIG[family](token_pruning=token_pruning, scan_backend="no scan", **changes)
    height, width = config.image_height_width(image_size)
    model = FAMILIES[family].classifier(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, config.num_channels, height, width))
    counted = counter.get_total_flops() // 2  # it counts a multiply-add as two

    flops = count_flops(config, image_size)
    expected = flops.pruned.total - flops.pruned.breakdown["scans"] + extra_convolutions(model, height, width)
    assert counted == expected
    if token_pruning is not None:
        assert flops.pruned.total < flops.dense.total


def extra_convolutions(model: torch.nn.Module, height: int, width: int) -> int:
    """What plain PyTorch computes in addition to what is needed, from the shapes of its calls.

    It evaluates PlainMamba's convolutions at dropped cells of the grid, too.
    """
    config = model.config
    if config.model_type != "plainmamba":
        return 0
    tokens = tokens_of_each_layer(model, height, width)
    dropped = [tokens[0] - count for count in tokens]
    mixers = sum(dropped) * config.intermediate_size * config.conv_kernel**2
    return mixers + sum(dropped[layer] for layer in config.depthwise_layers) * config.hidden_size * 3**2


def tokens_of_each_layer(model: torch.nn.Module, height: int, width: int) -> list[int]:
    """Number of tokens that enter each layer, according to the model."""
    with torch.no_grad():
        outputs = model(torch.randn(1, model.config.num_channels, height, width), output_hidden_states=True)
    counts = [states.shape[1] for states in outputs.hidden_states[:-1]]
    for stage, kept in enumerate(outputs.kept_tokens or ()):
        counts[model.config.token_pruning["layers"][stage]] = kept.shape[1]
    return counts


def test_image_sizes(tiny_config) -> None:
    assert count_flops(tiny_config, 32) == count_flops(tiny_config, (32, 32)) == count_flops(tiny_config)
    assert count_flops(tiny_config, 64).dense.total > count_flops(tiny_config, (64, 32)).dense.total
    with pytest.raises(ValueError, match=r"is \(1, 2, 3\); it must be a number of pixels or \(height, width\)"):
        count_flops(tiny_config, (1, 2, 3))


def test_image_smaller_than_a_patch(vim_config) -> None:
    with pytest.raises(ValueError, match="`image_size` is 7, which is too small for a patch"):
        count_flops(vim_config, 7)
