"""The golden cases, results of the official models, on the GPU."""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

from gpu_checking.report import Report
from hf_vssm_prune.conversion import convert_official_state_dict, infer_config
from hf_vssm_prune.families import FAMILIES


sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from golden import GoldenCase


ALLOWED = 1e-4


@torch.no_grad()
def check_golden_cases(family: str, options: argparse.Namespace, report: Report) -> None:
    """Of a family: logits and kept tokens, dense and pruned, in float32; how many tokens are kept alike in bfloat16."""
    if options.golden is None:
        report.say("the golden cases were not given (--golden)")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = report.table(
        "Beside the official models", "case", "schedule", "logits off by", "tokens kept alike", "alike in bfloat16"
    )
    for file in sorted(options.golden.glob(f"{family}_*.npz"))[: 1 if options.small else None]:
        case = GoldenCase.load(options.golden, file.stem)
        config = infer_config(case.state_dict(), case.recipe["family"], **case.overrides())
        model = FAMILIES[config.model_type].classifier(config).eval()
        model.load_state_dict(convert_official_state_dict(config, case.state_dict()))
        model.to(options.device)
        pixel_values = case.pixel_values().to(options.device)
        for variant in [{"name": "dense"}, *case.recipe["pruned"]]:
            name = variant["name"]
            key = "dense_logits" if name == "dense" else f"{name}.logits"
            model.set_token_pruning(schedule(variant))
            outputs = model(pixel_values)
            off = float((outputs.logits.cpu() - torch.from_numpy(case.expected[key])).abs().max())
            kept = [torch.from_numpy(case.expected[f"{name}.kept{i}"]) for i in range(len(outputs.kept_tokens or ()))]
            same = alike(outputs.kept_tokens, kept)
            half = copy.deepcopy(model).bfloat16()
            in_half = alike(half(pixel_values.bfloat16()).kept_tokens, kept)
            rows.add(file.stem, name, f"{off:.1e}", f"{same:.2%}", f"{in_half:.2%}")
            if not (off <= ALLOWED * (1 + abs(float(outputs.logits.abs().max()))) and same == 1):
                report.complain(f"{file.stem}, {name}: logits off by {off:.1e}, {same:.2%} of the tokens alike")


def schedule(variant: dict) -> dict | None:
    if "layers" not in variant:
        return None
    return {
        "layers": variant["layers"],
        "keep_ratios": variant["keep"],
        "alignment": variant["alignment"],
        "importance": variant["importance"],
    }


def alike(found: tuple[Tensor, ...] | None, expected: list[Tensor]) -> float:
    """The share of the expected tokens that are kept."""
    if not expected:
        return 1.0
    shares = [
        torch.isin(tokens, kept_there.cpu()).float().mean()
        for kept, tokens_of_all in zip(found or (), expected, strict=True)
        for kept_there, tokens in zip(kept, tokens_of_all, strict=True)
    ]
    return float(torch.stack(shares).mean())
