"""Options: output of a run, and distribution over devices."""

import math
from dataclasses import dataclass, field

from hf_vssm_prune.hub.pushing import check_repo_id
from hf_vssm_prune.training.arguments.parsing import MOST_SEED, check_range, describe


BATCH_NORM_MODES = ("local", "frozen", "sync")
DEFAULT_TRACKER = "tensorboard"


@dataclass
class RunArguments:
    """Output, checkpoints, logging and the Hub."""

    _argument_group_name = "run"

    output_dir: str = field(
        metadata=describe("output folder: best/, last/, last_ema/, checkpoint-*/, all_results.json")
    )
    seed: int = field(default=0, metadata=describe("random seed"))
    checkpointing_steps: str = field(default="epoch", metadata=describe("steps between checkpoints, or 'epoch'"))
    save_total_limit: int = field(
        default=2, metadata=describe("maximum number of checkpoints to keep", "--checkpoint_hist")
    )
    resume: str | None = field(
        default=None,
        metadata=describe(
            "checkpoint folder to resume from, or 'latest' (starts a new run if there is none)",
            "--resume_from_checkpoint",
        ),
    )
    logging_steps: int = field(default=50, metadata=describe("steps between log lines", "--log_interval"))
    with_tracking: bool = field(default=False, metadata=describe("log metrics to experiment trackers"))
    report_to: str | None = field(
        default=None,
        metadata=describe(
            "experiment tracker with --with_tracking: tensorboard, wandb, ..., or 'all' that are installed; by default "
            f"{DEFAULT_TRACKER}"
        ),
    )
    use_cpu: bool = field(default=False, metadata=describe("train on the CPU even if there is a GPU"))
    push_to_hub: bool = field(
        default=False,
        metadata=describe(
            "push the best model at the end, with the token of `hf auth login` or HF_TOKEN; the picture in a pruned "
            "model's card shows four evaluation images"
        ),
    )
    hub_model_id: str | None = field(default=None, metadata=describe("Hub repository to push to, 'user/name'"))
    hub_private_repo: bool = field(
        default=False, metadata=describe("make a new repository private; by default as the account is set up")
    )

    def __post_init__(self) -> None:
        check_range("seed", self.seed, 0, MOST_SEED)
        if self.checkpointing_steps != "epoch" and not (
            self.checkpointing_steps.isdecimal() and int(self.checkpointing_steps) > 0
        ):
            raise ValueError(
                f"--checkpointing_steps is {self.checkpointing_steps!r}: it must be a number of steps or 'epoch'."
            )
        check_range("save_total_limit", self.save_total_limit, 1, math.inf)
        check_range("logging_steps", self.logging_steps, 1, math.inf)
        if self.report_to is not None and not self.with_tracking:
            raise ValueError(f"--report_to is {self.report_to!r}: it needs --with_tracking.")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub needs --hub_model_id user/name.")
        if self.hub_private_repo and not self.push_to_hub:
            raise ValueError("--hub_private_repo needs --push_to_hub.")
        if self.hub_model_id is not None:
            check_repo_id(self.hub_model_id)

    @property
    def tracker(self) -> str | None:
        """The experiment tracker; None: nothing is tracked."""
        return (self.report_to or DEFAULT_TRACKER) if self.with_tracking else None


@dataclass
class ScaleArguments:
    """Distribution over devices, and memory."""

    _argument_group_name = "scale"

    fsdp: bool = field(
        default=False,
        metadata=describe("shard weights, gradients and optimizer states (FSDP2) instead of DDP"),
    )
    ddp_timeout: int = field(default=1800, metadata=describe("seconds to wait for another process before the run ends"))
    gradient_checkpointing: bool = field(
        default=False, metadata=describe("recompute each layer in the backward pass to save memory")
    )
    batch_norm: str = field(
        default="local",
        metadata=describe(
            "batch norm statistics of PlainMamba and of heads in training: per device, frozen, or synchronised over "
            "devices (GPU only)",
            choices=BATCH_NORM_MODES,
        ),
    )
    deterministic: bool = field(default=False, metadata=describe("use deterministic algorithms only; slower on a GPU"))

    def __post_init__(self) -> None:
        check_range("ddp_timeout", self.ddp_timeout, 1, math.inf)
