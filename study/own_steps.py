"""A fourth alignment, tested and left out: at a dropped token, the state decays by that token's own last time step.

With `repeat`, a hole has the time step of the token after it; with `zero_input`, all holes share one time step. Here,
dropped tokens keep the time steps from the last layer that processed them: for each channel ("own"), or relative to the
mean over tokens and multiplied by the mean time step of the current layer's channel ("relative"), since channels of
different layers do not correspond. It is for measurements only. It runs with any kernel: the decay in a hole is added
to the time step, and the input is scaled down accordingly.

    python study/own_steps.py --model_name_or_path study/photos/vim-imagenette --dataset_name <Imagenette> --device cpu
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_vssm_prune import modeling_bidirectional, modeling_plainmamba, pruned_layers
from hf_vssm_prune.commands.compare_methods import main as compare_methods
from hf_vssm_prune.mixer_output import MixerOutput
from hf_vssm_prune.scan_paths import gather_along_paths, scatter_along_paths
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.token_pruning import snake_paths


METHODS = ("top", "local_top")
reduce_stage = pruned_layers._reduce


class OwnSteps:
    """The last time steps of each token, and the remaining tokens.

    Attributes:
        relative: Whether the time steps are relative to the mean over tokens and channels.
        steps: For each scan of a mixer, shape (batch, all tokens, channels or 1), in raster order.
        kept: The remaining tokens, shape (batch, n).
        grid: The shape of the full grid.
    """

    def __init__(self, relative: bool) -> None:
        self.relative = relative
        self.steps: list[Tensor] = []
        self.kept = torch.empty(0)
        self.grid: tuple[int, ...] = ()

    def reduce(self, encoding: Any, mixer: MixerOutput, *options: Any) -> Any:
        """Like `pruned_layers._reduce`, but stores the time steps of the stage's tokens first."""
        steps = []
        for inputs in mixer.scans:
            own = F.softplus(inputs.time_step + inputs.time_step_bias)
            own = own.flip(1) if inputs.reversed else own
            steps.append(own.mean(2, keepdim=True) / own.mean((1, 2), keepdim=True) if self.relative else own)
        if encoding.kept_tokens:
            before = encoding.kept_tokens[-1]
            steps = [_put(earlier, before, new) for earlier, new in zip(self.steps, steps, strict=True)]
        reduced = reduce_stage(encoding, mixer, *options)
        self.steps, self.kept, self.grid = steps, reduced.kept_tokens[-1], reduced.layout.grid
        return reduced

    def scan(self, u: Tensor, time_step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **options: Any) -> Tensor:
        """Like `selective_scan`, except for the decay in holes."""
        if options["gaps"] is None:
            return selective_scan(u, time_step, A, B, C, D, **options)
        steps = F.softplus(time_step + options["time_step_bias"])
        order, directions = options["order"], options.get("direction_B")
        holes = self.times_in_holes(reverse=directions is None and order is not None, snake=directions is not None)
        if self.relative:
            holes = holes * steps.mean(1, keepdim=True).unsqueeze(1)
        visited = u.unsqueeze(1) if order is None else gather_along_paths(u, order)
        outputs = []
        for path in range(holes.shape[1]):
            decay = steps + holes[:, path]
            of_path = B if directions is None else B + directions[options["moves"][:, path].long()]
            entering = visited[:, path] * (steps / decay)
            none = torch.zeros_like(D)
            y = selective_scan(entering, _before_softplus(decay), A, of_path, C, none, time_step_bias=none)
            outputs.append(y + visited[:, path] * D)
        y = torch.stack(outputs, dim=1)
        return (y.squeeze(1) if order is None else scatter_along_paths(y, order)) * F.silu(options["gate"])

    def times_in_holes(self, reverse: bool, snake: bool) -> Tensor:
        """For each path and remaining token, the time steps of the tokens dropped before it, of shape (batch, paths,
        n, channels or 1)."""
        steps = self.steps[reverse]
        tokens = torch.arange(steps.shape[1]).unsqueeze(0)
        order = snake_paths(self.grid).order[0] if snake else tokens.flip(1) if reverse else tokens  # type: ignore
        places = order.argsort(dim=-1)[:, self.kept].transpose(0, 1).sort(dim=-1).values  # (batch, paths, n)
        of_dropped = _put(steps, self.kept, torch.zeros_like(steps[:, : self.kept.shape[1]]))
        passed = of_dropped[:, order].cumsum(dim=2)  # (batch, paths, tokens, channels)
        passed = passed.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, passed.shape[-1]))
        return passed.diff(dim=2, prepend=passed[:, :, :1])


def _put(steps: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    return steps.scatter(1, tokens.unsqueeze(-1).expand(-1, -1, steps.shape[-1]), values)


def _before_softplus(steps: Tensor) -> Tensor:
    return steps + torch.log(-torch.expm1(-steps))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops_reduction", type=float, default=0.416, help="default: %(default)s")
    options, of_comparison = parser.parse_known_args()

    def compare(schedules: dict[str, Any]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "schedules.json")
            file.write_text(json.dumps(schedules), encoding="utf-8")
            return compare_methods([*of_comparison, "--schedules", str(file)])

    def schedule(method: str, alignment: str) -> dict[str, Any]:
        return {"flops_reduction": options.flops_reduction, "method": method, "alignment": alignment}

    known = ("none", "repeat", "zero_input")
    status = compare(
        {f"{method}, {alignment}": schedule(method, alignment) for method in METHODS for alignment in known}
    )
    for name in ("own", "relative"):
        own = OwnSteps(relative=name == "relative")
        with (
            mock.patch.object(pruned_layers, "_reduce", own.reduce),
            mock.patch.object(modeling_plainmamba, "selective_scan", own.scan),
            mock.patch.object(modeling_bidirectional, "selective_scan", own.scan),
        ):
            status = max(status, compare({f"{method}, {name}": schedule(method, "repeat") for method in METHODS}))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
