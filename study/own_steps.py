"""A fourth alignment, tested on a PlainMamba: at a dropped token, the state decays by that token's own last time step.

With `repeat`, a hole has the time step of the token after it; with `zero_input`, all holes share one time step. Here
each dropped token keeps its time steps from the last layer that processed it. The scan is computed in plain PyTorch,
for measurements only; no kernel supports this alignment.

    python study/own_steps.py --model_name_or_path study/photos/plainmamba-imagenette --dataset_name <Imagenette> \\
        --flops_reduction 0.416 --device cpu
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

from hf_vssm_prune import modeling_plainmamba, pruned_layers
from hf_vssm_prune.commands.compare_methods import main as compare_methods
from hf_vssm_prune.mixer_output import MixerOutput
from hf_vssm_prune.scan_paths import gather_along_paths, scatter_along_paths
from hf_vssm_prune.selective_scan_torch import Steps, _recurrence
from hf_vssm_prune.token_pruning import snake_paths


OWN = "own last step"
reduce_stage = pruned_layers._reduce
scan = modeling_plainmamba.selective_scan


class OwnSteps:
    """The last time steps of each token of the grid, and the remaining tokens.

    Attributes:
        steps: shape (batch, cells, channels). None: nothing was dropped.
        kept: the cells of the remaining tokens, shape (batch, n).
        grid: shape of the full grid.
    """

    steps: Tensor | None = None
    kept: Tensor
    grid: tuple[int, int]

    def reduce(self, encoding: Any, mixer: MixerOutput, *options: Any) -> Any:
        """Like `pruned_layers._reduce`, but saves the time steps of the stage's tokens."""
        (inputs,) = mixer.scans
        steps = F.softplus(inputs.time_step + inputs.time_step_bias)
        if self.steps is None or not encoding.kept_tokens:
            self.steps = steps
        else:
            self.steps = _put(self.steps, encoding.kept_tokens[-1], steps)
        reduced = reduce_stage(encoding, mixer, *options)
        self.kept, self.grid = reduced.kept_tokens[-1], reduced.layout.grid
        return reduced

    def scan(self, u: Tensor, time_step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **options: Any) -> Tensor:
        """Like `selective_scan`, except for holes."""
        if options["gaps"] is None:
            return scan(u, time_step, A, B, C, D, **options)
        time_step = F.softplus(time_step + options["time_step_bias"]).unsqueeze(1)
        visited = gather_along_paths(u, options["order"])
        B = B.unsqueeze(1) + options["direction_B"][options["moves"].long()]
        steps = Steps(time_step + self.times_in_holes(), time_step * visited, B, C.unsqueeze(1))
        y = torch.addcmul(_recurrence(steps, A.t().contiguous()), visited, D)
        return scatter_along_paths(y, options["order"]) * F.silu(options["gate"])

    def times_in_holes(self) -> Tensor:
        """For each path and remaining token, the sum of the time steps of the tokens dropped before it: (batch, paths,
        n, channels)."""
        assert self.steps is not None
        order = snake_paths(self.grid).order[0]
        places = order.argsort(dim=-1)[:, self.kept].transpose(0, 1).sort(dim=-1).values  # (batch, paths, n)
        of_dropped = _put(self.steps, self.kept, torch.zeros_like(self.steps[:, : self.kept.shape[1]]))
        passed = of_dropped[:, order].cumsum(dim=2)  # (batch, paths, cells, channels)
        passed = passed.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, passed.shape[-1]))
        return passed.diff(dim=2, prepend=passed[:, :, :1])


def _put(steps: Tensor, cells: Tensor, values: Tensor) -> Tensor:
    return steps.scatter(1, cells.unsqueeze(-1).expand(-1, -1, steps.shape[-1]), values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops_reduction", type=float, default=0.416, help="default: %(default)s")
    options, of_comparison = parser.parse_known_args()
    papers = {"flops_reduction": options.flops_reduction, "method": "top"}

    def compare(schedules: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "schedules.json")
            file.write_text(json.dumps(schedules), encoding="utf-8")
            compare_methods([*of_comparison, "--schedules", str(file)])

    compare({alignment: papers | {"alignment": alignment} for alignment in ("none", "repeat", "zero_input")})
    own = OwnSteps()
    with (
        mock.patch.object(pruned_layers, "_reduce", own.reduce),
        mock.patch.object(modeling_plainmamba, "selective_scan", own.scan),
    ):
        compare({OWN: papers | {"alignment": "repeat"}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
