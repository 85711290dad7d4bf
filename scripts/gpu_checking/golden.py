"""The golden cases (results of the official models) on the GPU."""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from gpu_checking.report import Report, Table
from hf_vssm_prune.conversion import convert_official_state_dict, infer_config
from hf_vssm_prune.families import FAMILIES


sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from golden import GoldenCase
from golden_half import complaints, over_all, run_in_half, schedule_of


ALLOWED = 1e-4


@torch.no_grad()
def check_golden_cases(family: str, options: argparse.Namespace, report: Report) -> None:
    """Checks a family's logits and kept tokens, dense and pruned, in float32, and what rounding to bfloat16 changes."""
    if options.golden is None:
        report.say("the golden cases were not given (--golden)")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = report.table("Compared with the official models", "case", "schedule", "logits off by", "same tokens kept")
    errors = ("logits off by", "plain PyTorch's", "scores off by", "plain PyTorch's")
    of_half = report.table("In bfloat16, stage by stage", "case", *errors, "tokens moved", "errors from the threshold")
    files = sorted(options.golden.glob(f"{family}_{'small_' if options.small else ''}*.npz"))
    if not files:
        report.complain(f"--golden {options.golden} has no cases of {family}")
    for file in files[: 1 if options.small else None]:
        case = GoldenCase.load(options.golden, file.stem)
        config = infer_config(case.state_dict(), case.recipe["family"], **case.overrides())
        model = FAMILIES[config.model_type].classifier(config).eval()
        model.load_state_dict(convert_official_state_dict(config, case.state_dict()))
        model.to(options.device)
        pixel_values = case.pixel_values().to(options.device)
        for variant in [{"name": "dense"}, *case.recipe["pruned"]]:
            name = variant["name"]
            key = "dense_logits" if name == "dense" else f"{name}.logits"
            model.set_token_pruning(schedule_of(variant))
            outputs = model(pixel_values)
            off = float((outputs.logits.cpu() - torch.from_numpy(case.expected[key])).abs().max())
            kept = [torch.from_numpy(case.expected[f"{name}.kept{i}"]) for i in range(len(outputs.kept_tokens or ()))]
            same = alike(outputs.kept_tokens, kept)
            rows.add(file.stem, name, f"{off:.1e}", f"{same:.2%}")
            if not (off <= ALLOWED * (1 + abs(float(outputs.logits.abs().max()))) and same == 1):
                report.complain(f"{file.stem}, {name}: logits off by {off:.1e}, {same:.2%} of the tokens are the same")
        check_half(file.stem, case, model, of_half, report)


def check_half(name: str, case: GoldenCase, model: torch.nn.Module, rows: Table, report: Report) -> None:
    """Checks a case with weights in bfloat16; see `golden_half`."""
    variants = run_in_half(case, model)
    stages = [stage for variant in variants for stage in variant.stages]
    logits = over_all([variant.logits for variant in variants])
    scores = over_all([stage.scores for stage in stages])
    moved, farthest = sum(stage.moved for stage in stages), max(stage.farthest for stage in stages)
    rows.add(name, *(f"{error:.1e}" for error in (*logits, *scores)), moved, f"{farthest:.2f}")
    for line in complaints(variants):
        report.complain(f"{name} in bfloat16: {line}")


def alike(found: tuple[Tensor, ...] | None, expected: list[Tensor]) -> float:
    """The fraction of the expected tokens that are kept."""
    if not expected:
        return 1.0
    shares = [
        torch.isin(tokens, kept_there.cpu()).float().mean()
        for kept, tokens_of_all in zip(found or (), expected, strict=True)
        for kept_there, tokens in zip(kept, tokens_of_all, strict=True)
    ]
    return float(torch.stack(shares).mean())
