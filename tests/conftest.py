"""Settings and fixtures for all tests: no network, one thread per pytest worker, fixed seeds, tiny configurations."""

import atexit
import gc
import importlib.util
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


STARTED_WITH = dict(os.environ)

# Before all imports, because libraries read these when they are imported.
_HF_HOME = tempfile.TemporaryDirectory(prefix="hf_vssm_prune-tests-")
os.environ.update(
    HF_HOME=_HF_HOME.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)
# Triton's kernels are tested without a GPU, too.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_XDIST_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"

import datasets  # noqa: E402
import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from hf_vssm_prune import PlainMambaConfig, VideoMambaConfig, VimConfig  # noqa: E402
from hf_vssm_prune.configuration_common import VisionMambaConfig  # noqa: E402
from hf_vssm_prune.export import compilers_paths  # noqa: E402
from hf_vssm_prune.families import FAMILIES  # noqa: E402


IMPORTED_WITH = dict(os.environ)  # later, tests run commands in this process

# After each pass over a stream, datasets waits this long for threads that read remote files.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
# Imported objects need no garbage collection, which would take half a second each time, and forks share them.
gc.freeze()
atexit.register(gc.unfreeze)  # or Triton's bindings report leaks
if IS_XDIST_WORKER:
    torch.set_num_threads(1)

# No time limits, because they would depend on the machine.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before."""
    seed_generators()
    return 0


def pytest_fixture_setup(fixturedef: Any) -> None:
    """So does a fixture that several tests share: it is made before the first of them is seeded."""
    if fixturedef.scope != "function":
        seed_generators()


def seed_generators() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden cases and data that are not part of the repository."""
    folder = Path(os.environ.get("HF_VSSM_PRUNE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not os.access(folder, os.R_OK | os.X_OK):
        pytest.skip(f"{folder} is missing or closed to this user; HF_VSSM_PRUNE_SHARED may name another folder")
    return folder


needs_inductor = pytest.mark.skipif(
    any(" " in path for path in compilers_paths().values()), reason="PyTorch's inductor takes no path with spaces"
)

# A timeout for what takes seconds by itself: after this long it hangs, however busy the machine is.
PATIENCE = 600
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    """Imports a script as a module; its `main` takes command-line arguments."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))  # a script imports what lies beside it; last, as its names are common ones
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOKEN_PRUNING = {
    "layers": [1, 3],
    "keep_ratios": [0.7, 0.6],
    "alignment": "repeat",
    "importance": "clip",
    "method": "top",
}


def make_plainmamba_config(**changes) -> PlainMambaConfig:
    """4 layers, 16 tokens."""
    defaults = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "state_size": 4,
        "num_stem_convs": 1,
        "depthwise_layers": (0,),
        "num_labels": 3,
    }
    return PlainMambaConfig(**{**defaults, **changes})


def make_vim_config(**changes) -> VimConfig:
    """4 layers, 16 patch tokens and the class token."""
    defaults = {
        "image_size": 32,
        "patch_size": 8,
        "patch_stride": 8,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "state_size": 4,
        "num_labels": 3,
    }
    return VimConfig(**{**defaults, **changes})


def make_videomamba_config(**changes) -> VideoMambaConfig:
    """4 layers, 16 patch tokens and the class token. For images, like the others; see `make_video_config` for
    videos."""
    defaults = {
        "image_size": 32,
        "patch_size": 8,
        "patch_stride": 8,
        "num_frames": None,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "state_size": 4,
        "num_labels": 3,
    }
    return VideoMambaConfig(**{**defaults, **changes})


def make_video_config(**changes) -> VideoMambaConfig:
    """4 layers, 3 frames of 4 x 4 patches and the class token."""
    return make_videomamba_config(**{"num_frames": 3, **changes})


MAKE_CONFIG = {"plainmamba": make_plainmamba_config, "videomamba": make_videomamba_config, "vim": make_vim_config}

# The position of the class token among the 17 tokens of such a configuration. None: the family has none.
CLS_TOKEN_IDS = {"plainmamba": None, "videomamba": 0, "vim": 8}
NUM_CLS_TOKENS = {family: 0 if place is None else 1 for family, place in CLS_TOKEN_IDS.items()}


@pytest.fixture
def plainmamba_config() -> PlainMambaConfig:
    return make_plainmamba_config()


@pytest.fixture
def vim_config() -> VimConfig:
    return make_vim_config()


@pytest.fixture(params=sorted(MAKE_CONFIG))
def tiny_config(request: pytest.FixtureRequest) -> VisionMambaConfig:
    """Each family in turn, dense."""
    return MAKE_CONFIG[request.param]()


@pytest.fixture(params=sorted(MAKE_CONFIG))
def tiny_pruned_config(request: pytest.FixtureRequest) -> VisionMambaConfig:
    """Each family in turn, with two stages of token pruning."""
    return MAKE_CONFIG[request.param](token_pruning=dict(TOKEN_PRUNING))


@pytest.fixture
def pixel_values(seed: int) -> torch.Tensor:
    """Two images for any of the tiny configurations."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def make_model(config: VisionMambaConfig) -> Any:
    """A classifier in evaluation mode with perturbed weights. With freshly initialised weights, the layers barely
    affect the logits."""
    model = FAMILIES[config.model_type].classifier(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of `expected`, so that small values need no special tolerance."""
    return float(((actual - expected).norm() / expected.norm()).detach())


def same_tensors(first: Sequence[torch.Tensor] | None, second: Sequence[torch.Tensor] | None) -> bool:
    """Whether both are None, or have the same number of tensors and all are equal."""
    if first is None or second is None:
        return first is second
    return len(first) == len(second) and all(map(torch.equal, first, second))


def gradients_with_checkpointing(
    model: Any,
    compute_loss: Callable[[], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    use_reentrant: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of each parameter without and with activation checkpointing, from the same random state."""
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(0)
        compute_loss().backward()
        gradients.append([parameter.grad.clone() for parameter in parameters])
    return list(zip(*gradients, strict=True))


def hear_signals() -> None:
    """For `preexec_fn`: makes a process receive signals even if the tests run with SIGINT ignored, as in a shell's
    background jobs."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
