"""Our models compared with the official ones, dense and pruned."""

import pytest
import torch
from golden import GoldenCase
from golden_half import FARTHEST, _moved, complaints, run_in_half

from hf_vssm_prune.conversion import convert_official_state_dict, convert_to_official_state_dict, infer_config
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.kernels import cpu


CASES = [
    "plainmamba_small_even",
    "plainmamba_small_odd",
    "plainmamba_small_padded",
    "plainmamba_small_resized",
    "plainmamba_l3_full",
    "vim_small_even",
    "vim_small_odd",
    "vim_small_stride",
    "vim_s_full",
    "videomamba_small_image",
    "videomamba_small_tubelet",
    "videomamba_small_video",
    "videomamba_ti_image_full",
    "videomamba_ti_video_full",
]


@pytest.fixture(params=CASES)
def case(request, shared):
    return GoldenCase.load(shared / "golden", request.param)


@pytest.fixture
def model(case):
    state_dict = case.state_dict()
    family = case.recipe["family"]
    config = infer_config(state_dict, family, **case.overrides())
    model = FAMILIES[family].classifier(config).eval()
    model.load_state_dict(convert_official_state_dict(config, state_dict))
    return model


# Hidden states and scores of these random weights differ by 2e-4 between our own float32 and float64.
INTERMEDIATE_TOLERANCE = 1e-3


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=tolerance, rtol=tolerance)


def test_model_matches_official(case, model):
    pixel_values, expected = case.pixel_values(), case.expected
    assert pixel_values.double().sum().item() == pytest.approx(expected["pixel_checksum"].item(), abs=1e-6)
    assert sum(parameter.numel() for parameter in model.parameters()) == case.recipe["num_parameters"]

    with torch.no_grad():
        assert_close(model(pixel_values).logits, expected["dense_logits"])
        if "dense_last_hidden_state" in expected:
            last_hidden_state = model.base_model(pixel_values).last_hidden_state
            assert_close(last_hidden_state, expected["dense_last_hidden_state"], INTERMEDIATE_TOLERANCE)
        for variant in case.recipe["pruned"]:
            name = variant["name"]
            model.set_token_pruning(
                {
                    "layers": variant["layers"],
                    "keep_ratios": variant["keep"],
                    "alignment": variant["alignment"],
                    "importance": variant["importance"],
                }
            )
            outputs = model(pixel_values)
            for stage, (kept, scores) in enumerate(zip(outputs.kept_tokens, outputs.token_scores, strict=True)):
                assert kept.tolist() == expected[f"{name}.kept{stage}"].tolist()
                assert_close(scores, expected[f"{name}.scores{stage}"], INTERMEDIATE_TOLERANCE)
            assert_close(outputs.logits, expected[f"{name}.logits"])
            if f"{name}.last_hidden_state" in expected:
                last_hidden_state = model.base_model(pixel_values).last_hidden_state
                assert_close(last_hidden_state, expected[f"{name}.last_hidden_state"], INTERMEDIATE_TOLERANCE)


def test_conversion_round_trip(case, model):
    official = convert_to_official_state_dict(model.config, model.state_dict())
    expected = case.state_dict()
    assert official.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(official[key], tensor), key


# `scripts/gpu_check.py` runs all of them.
HALF_CASES = ["plainmamba_small_odd", "vim_small_odd", "videomamba_small_video"]


@pytest.mark.parametrize("case", HALF_CASES, indirect=True)
def test_weights_in_bfloat16(case, model):
    assert complaints(run_in_half(case, model)) == []


@pytest.mark.skipif(cpu.unavailable("cpu") is not None, reason="no CPU kernels")
@pytest.mark.parametrize("case", ["videomamba_small_video"], indirect=True)
def test_what_rounding_does_not_explain_is_noticed(case, model, monkeypatch):
    scan = cpu.selective_scan

    def coarse(hidden_states, *arguments, **options):
        """Rounds values to four bits less than bfloat16."""
        values = scan(hidden_states, *arguments, **options)
        fraction, exponent = torch.frexp(values)
        return values if values.dtype == torch.float32 else torch.ldexp((fraction * 16).round() / 16, exponent)

    monkeypatch.setattr(cpu, "selective_scan", coarse)
    logits, scores = complaints(run_in_half(case, model))
    assert logits.startswith("logits are off by")
    assert scores.startswith("scores are off by")


def test_tokens_that_cross_the_cut():
    official = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    plain = official + torch.tensor([0.5, 0.0, 0.0, 0.0])
    ours = torch.tensor([[4.0, 2.0, 3.0, 1.0], [3.0, 4.0, 2.0, 1.0]])
    kept = torch.tensor([[0, 1], [0, 1]])
    # In the first image tokens 1 and 2 change places, half a point from the cut, where an error is half a point.
    assert _moved({"official": official, "plain": plain, "ours": ours}, kept) == (2, 1.0)
    ours[1] = torch.tensor([1.0, 3.0, 2.0, 4.0])
    moved, farthest = _moved({"official": official, "plain": plain, "ours": ours}, kept)
    assert (moved, farthest) == (4, 3.0)
    assert farthest > FARTHEST
