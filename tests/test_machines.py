"""Training on two hosts, simulated by network namespaces connected by a virtual cable (Linux, as root)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE
from forking import run_forked
from test_distributed import write_images


TRAIN = ["train", "--family", "vim", "--image_size", "32", "--patch_size", "8", "--use_cpu", "--workers", "0"]
TRAIN += ["--config_overrides", "hidden_size=16", "num_hidden_layers=3", "state_size=4"]
# Nothing random that depends on the process.
TRAIN += [
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--drop_path",
    "0",
    "--lr",
    "1e-3",
    "--no_model_ema",
    "--checkpointing_steps",
    "4",
]


class Hosts:
    """Two hosts, 0 and 1, and the launchers running on them."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}a", f"{name}b"]
        self.started: list[subprocess.Popen] = []

    def set_up(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.names[0], "type", "veth", "peer", "name", self.names[1])
        for i, name in enumerate(self.names):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"10.231.0.{i + 1}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def tear_down(self) -> None:
        for launcher in self.started:
            self.kill(launcher)
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, host: int, *words: str) -> subprocess.Popen:
        """Starts `accelerate launch` on a host, as shown in docs/machines.md."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2"]
        launch += ["--num_processes=2", f"--machine_rank={host}", "--main_process_ip=10.231.0.1"]
        launch += ["--main_process_port=29512", "--mixed_precision=no", "--dynamo_backend=no", "-m", "hf_vssm_prune"]
        name = self.names[host]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name}
        command = ["ip", "netns", "exec", name, *launch, *words]
        launcher = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(launcher)
        return launcher

    def pull_the_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", self.names[1], "down")

    @staticmethod
    def kill(launcher: subprocess.Popen) -> None:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("two hosts need `ip` of iproute2")
    made = Hosts(f"hfv{os.getpid() % 10_000}")
    try:
        made.set_up()
    except (subprocess.CalledProcessError, OSError) as error:
        made.tear_down()
        pytest.skip(f"this machine lets nobody make network namespaces: {getattr(error, 'stderr', error)}")
    yield made
    made.tear_down()


def on_one_host(*words: str) -> str:
    done = run_forked("-m", "hf_vssm_prune", *words, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "all_results.json").read_text())["history"]


def test_two_hosts_have_the_losses_of_one_process(hosts, tmp_path):
    write_images(tmp_path)
    options = [*TRAIN, "--dataset_name", str(tmp_path / "images"), "--num_train_epochs", "2", "--no_random_crop"]
    spread = [*options, "--batch_size", "8", "--output_dir", str(tmp_path / "two")]
    launchers = [hosts.start(host, *spread) for host in (0, 1)]
    outputs = [launcher.communicate(timeout=PATIENCE)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    on_one_host(*options, "--batch_size", "16", "--output_dir", str(tmp_path / "one"))
    for mine, other in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        assert mine["step"] == other["step"]
        assert mine["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-4)


def test_a_lost_host_ends_the_run_which_goes_on_on_one(hosts, tmp_path):
    write_images(tmp_path)
    options = [*TRAIN, "--dataset_name", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    options += ["--num_train_epochs", "8"]  # 72 steps
    launchers = [hosts.start(host, *options, "--batch_size", "8", "--ddp_timeout", "15") for host in (0, 1)]
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "checkpoint-4").exists():
        assert launchers[0].poll() is None, launchers[0].communicate()[0][-3000:]
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.1)
    hosts.pull_the_cable()
    hosts.kill(launchers[1])
    output = launchers[0].communicate(timeout=PATIENCE)[0]
    assert launchers[0].returncode != 0
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Another of the 2 processes died or did not respond")
    assert "--resume latest" in line

    saved = max(int(folder.name.partition("-")[2]) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert saved < 72
    said = on_one_host(*options, "--batch_size", "16", "--resume", "latest")
    assert f"Resuming from {tmp_path / 'run' / f'checkpoint-{saved}'}" in said
    assert history(tmp_path / "run")[-1]["step"] == 72
