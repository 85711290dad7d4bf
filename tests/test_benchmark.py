"""The benchmark: its baselines compute the same as our functions, and it writes its measurements."""

import io
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import load_script, make_model, make_plainmamba_config, relative_error

from hf_vssm_prune import PlainMambaForImageClassification, VideoMambaConfig, VideoMambaForVideoClassification
from hf_vssm_prune.modeling_common import TimeStepProjection
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.selective_scan_torch import selective_scan_torch


benchmark = load_script("benchmark")

from benchmarking import (  # noqa: E402
    baselines,
    bf16,
    blocks,
    budgets,
    calls,
    earlier,
    earlier_kernels_worker,
    earlier_worker,
    int8,
    measuring,
    models,
    peer_worker,
    peers,
    profiling,
    scan,
    training,
)


def test_baselines_compute_the_scan():
    single = scan.one_direction(scan.scan_inputs(2))
    for name in ("hidden_states", "time_step", "B", "C", "gate"):
        single[name] = single[name][:, :9]
    expected = selective_scan_torch(**single)
    by_channel = baselines.reference_scan(*scan.in_layout(single, 0, 2, 1)).transpose(1, 2)
    torch.testing.assert_close(by_channel, expected, rtol=1e-4, atol=1e-4)
    by_time = baselines.time_major_scan(*scan.in_layout(single, 1, 0, 2)).transpose(0, 1)
    torch.testing.assert_close(by_time, expected, rtol=1e-4, atol=1e-4)


def test_the_reference_kernel_computes_a_dense_model():
    model = make_model(make_plainmamba_config())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).logits
        with baselines.registered("reference", baselines.reference_kernel()):
            model.config.scan_backend = "reference"
            torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="unknown backend 'reference'"):
        model(images)


def test_the_frame_of_other_projects_scans_computes_ours():
    inputs = scan.one_direction(scan.scan_inputs(2)) | {"gate": None, "D": torch.zeros(scan.CHANNELS)}

    def states(decay: torch.Tensor, entering: torch.Tensor) -> torch.Tensor:
        for step in range(1, decay.shape[1]):
            entering[:, step] += decay[:, step] * entering[:, step - 1]
        return entering

    arguments = {name: tensor.numpy() for name, tensor in inputs.items() if tensor is not None}
    found = peer_worker.in_torch(arguments, torch.get_num_threads(), states)()
    torch.testing.assert_close(torch.from_numpy(found), selective_scan(**inputs), rtol=1e-4, atol=1e-4)


def test_an_earlier_checkout_takes_turns_with_this_one(monkeypatch, capsys):
    """A worker prints one CPU time for each name it reads. Both workers are asked equally often."""
    config = make_plainmamba_config(scan_backend="torch")
    monkeypatch.setattr(earlier_worker.PlainMambaConfig, "from_preset", lambda preset, **options: config)
    monkeypatch.setattr("sys.stdin", io.StringIO("dense\npruned\n"))
    earlier_worker.main("L3", 0.4, "top", 1, torch.get_num_threads())
    printed = [float(line) for line in capsys.readouterr().out.split()]
    assert len(printed) == 2
    assert min(printed) > 0

    command = [sys.executable, "-c", "import sys\nfor line in sys.stdin: print(len(line), flush=True)"]
    workers = [subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    times = earlier.in_turns(workers, ["dense", "pruned"], seconds=0)
    assert times == {
        f"{case}, {which}": [len(case) + 1.0] * 3 for case in ("dense", "pruned") for which in ("before", "after")
    }
    for worker in workers:
        worker.communicate()


def test_a_worker_that_has_ended_is_named():
    worker = subprocess.Popen([sys.executable, "-c", ""], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker.wait()
    with pytest.raises(RuntimeError, match="a process of the benchmark ended"):
        earlier.cpu_time(worker, "dense")
    worker.communicate()


def test_each_kernel_is_timed_forward_and_backward(monkeypatch, capsys):
    """Every requested name gets a time. If the forward pass had not run, the backward pass would fail."""
    monkeypatch.setattr(earlier_kernels_worker, "SIDE", 3)
    monkeypatch.setattr(earlier_kernels_worker, "CHANNELS", 8)
    sizes = {"image_size": 32, "num_hidden_layers": 1, "hidden_size": 16}
    monkeypatch.setattr(earlier_kernels_worker, "COMMON", {**earlier_kernels_worker.COMMON, **sizes})
    names = [*earlier_kernels_worker.KERNELS, *earlier_kernels_worker.STEPS]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(names)))
    earlier_kernels_worker.main(1, torch.get_num_threads())
    times = [float(line) for line in capsys.readouterr().out.split()]
    assert len(times) == len(names)
    assert min(times) > 0


@pytest.mark.parametrize("section", ["earlier", "earlier_kernels"])
def test_a_folder_that_is_no_checkout_is_named(section, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--sections", section, "--earlier", str(tmp_path)])
    assert f"--earlier {tmp_path}: the section `{section}` needs the folder of a checkout" in capsys.readouterr().err


def test_a_project_that_cannot_be_installed_or_run_is_left_out(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    one, other = "mambapy's pscan", "ggml's SSM_SCAN"
    missing = {one: peers.PEERS[one]._replace(requirements=("no-such-project==1",))}
    monkeypatch.setattr(peers, "PEERS", missing | {other: peers.PEERS[other]._replace(requirements=())})
    arguments = ["--sections", "peers", "--batch_sizes", "1", "--seconds", "0.1", "--peers", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    output = capfd.readouterr().out
    assert f"{one} is left out" in output
    assert f"{other} is left out" in output
    assert list(tmp_path.rglob(".installed")) == []


def test_int8_beside_torchao():
    """If torchao is installed, its int8 layers give nearly the same results on our models."""
    model = make_model(make_plainmamba_config())
    images = torch.randn(2, 3, 32, 32)
    models = int8.int8_models(model)
    assert {"float32", int8.OURS} <= models.keys()
    with torch.no_grad():
        expected = model(images).logits
        for name, other in models.items():
            assert relative_error(other(images).logits, expected) < 0.05, name


def test_calls_of_a_layer_and_conversions_of_dtype_are_counted():
    model = PlainMambaForImageClassification(make_plainmamba_config()).eval()
    with torch.no_grad():
        (run,) = profiling.profiled(calls.last_layer(model, 1), 1)
        seconds = calls.seconds_of_calls([run])
        (of_half,) = profiling.profiled(calls.last_layer(model.bfloat16(), 1), 1)
    assert {"aten::linear × 4", "hf_vssm_prune::selective_scan", "aten::exp", calls.BETWEEN} <= seconds.keys()
    assert sum(one for (one,) in seconds.values()) == pytest.approx(run.cpu_time_total / 1e6)
    assert calls.count(run).endswith("transposes 4, copies 2, clones 0, detached 0, conversions of dtype 0")
    # `bfloat16()` converts all parameters, and the decay is computed in float32.
    assert calls.count(of_half).endswith("conversions of dtype 1")


def test_the_time_of_conversions_is_part_of_a_forward():
    model = PlainMambaForImageClassification(make_plainmamba_config()).eval().bfloat16()
    options = benchmark.parse_options(["--sections", "bf16", "--threads", "1"])
    group = bf16.conversions(model, [3.0, 4.0, 2.0, 5.0], 1, options)
    assert group.seconds["forward"] == [2.0]
    share, _ = group.ratio("share of the time, %")
    assert share == 50 * group.seconds["conversions of dtype"][0] > 0


def test_matrix_products_are_all_of_the_models():
    model = PlainMambaForImageClassification(make_plainmamba_config()).eval()
    with torch.no_grad():
        products = blocks.matrix_products(model, partial(model, torch.randn(1, 3, 32, 32)))()
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear | TimeStepProjection)]
    assert len(products) == len(linears) == 4 * 4 + 1


def test_preset_of_another_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_options(["--family", "vim"])
    assert "--preset L3: vim has ['T', 'S', 'B']." in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch_sizes", "--threads"])
def test_there_is_at_least_one_image_and_one_thread(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_options([option, "0"])
    assert f"argument {option}: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_cases_take_turns():
    order = []
    cases = {name: partial(order.append, name) for name in "ab"}
    options = benchmark.parse_options(["--seconds", "0"])
    group = measuring.take_turns("turns", cases, {"a / b": (2.0, "a", "b")}, options)
    # Before the first turn all run once unmeasured, and short ones in every later turn.
    assert order == ["a", "b"] * 2 + ["a", "a", "b", "b"] * 2
    assert [len(runs) for runs in group.seconds.values()] == [3, 3]
    times = iter(range(100))
    group = measuring.take_turns("turns", cases, {}, options, clock=lambda: next(times))
    assert group.seconds == {"a": [1] * 3, "b": [1] * 3}
    group.ratios["a / b"] = (2.0, "a", "b")
    group.seconds = {"a": [3.0, 8.0, 4.0], "b": [1.0, 2.0, 2.0]}
    assert group.ratio("a / b") == (6.0, 6.0)


def test_figures_are_written(tmp_path, capsys):
    threads = torch.get_num_threads()
    file = tmp_path / "benchmark.json"
    arguments = ["--sections", "convolution", "--batch_sizes", "1", "--seconds", "0", "--json", str(file)]
    assert benchmark.main([*arguments, "--threads", str(threads)]) == 0
    results = json.loads(file.read_text())
    (group,) = results["groups"]
    assert results["machine"]["threads"] == str(threads)
    assert set(group["ratios"]["torch / ours, all cells"]) == {"fastest", "median"}
    assert "| torch / ours, all cells |" in capsys.readouterr().out


def test_a_section_that_fails_costs_only_itself(tmp_path, monkeypatch):
    """The figures of those before it are in the file."""

    def fail(options):
        raise RuntimeError("out of memory")

    sections = {"scan": lambda options: [measuring.Group("measured", {"ours": [1.0]})], "model": fail}
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    file = tmp_path / "benchmark.json"
    threads = str(torch.get_num_threads())
    with pytest.raises(RuntimeError, match="out of memory"):
        benchmark.main(["--sections", "scan", "model", "--json", str(file), "--threads", threads])
    assert [group["title"] for group in json.loads(file.read_text())["groups"]] == ["measured"]


def test_models_of_videos_are_measured_too(monkeypatch):
    """They have fewer labels than models of images, and a clip at every size."""
    config = VideoMambaConfig(
        num_labels=2, num_frames=2, image_size=32, patch_size=8, hidden_size=8, num_hidden_layers=2
    )
    model = VideoMambaForVideoClassification(config).eval()
    assert models.random_labels(model, 50).max() < 2
    shapes = {}

    def look(title, cases, ratios, options):
        shapes.update({name: tuple(case.args[0].shape) for name, case in cases.items()})

    monkeypatch.setattr(models, "make_models", lambda options: {"pruned, aligned": model})
    monkeypatch.setattr(models, "ViTForImageClassification", lambda config: torch.nn.Identity())
    monkeypatch.setattr(models, "take_turns", look)
    models.resolution_section(benchmark.parse_options(["--family", "videomamba", "--preset", "Ti"]))
    assert shapes["pruned, 448²"] == (1, 2, 3, 448, 448)
    assert shapes["ViT-S/16, 448²"] == (1, 3, 448, 448)


def test_scan_inputs_with_holes_are_those_of_a_pruned_model():
    inputs = scan.scan_inputs(2, 0.5)
    assert inputs["hidden_states"].shape[1] == 98
    assert inputs["gaps"].sum(-1).max() <= scan.LENGTH
    assert "gaps" not in scan.scan_inputs(2, 0.5, "none")
    assert selective_scan(**inputs).isfinite().all()


def test_memory_of_a_step_is_what_is_kept_for_the_backward(capsys):
    """Two layers with a square in between keep their inputs and the input of the square."""
    first, second = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
    model, rows = torch.nn.ModuleList([first, second]), torch.randn(2**13, 64)
    training.report_memory(model, "small", lambda: second(first(rows).square()).sum().backward())
    kept, products = (64 + 128 + 128) * 2**15, (64 + 128 + 128 + 64) * 2**15  # float32
    assert capsys.readouterr().out.startswith(
        f"small: {kept / 2**20:.0f} MiB are kept for the backward, {kept / products:.2f} times the inputs and outputs "
        f"of the matrix products ({products / 2**20:.0f} MiB); "
    )


def test_the_roofline_is_above_the_scan(capsys):
    (group,) = benchmark.roofline_section(benchmark.parse_options(["--seconds", "0.2"]))
    share, _ = group.ratio("share of the roofline: its multiply-adds / the scan")
    assert 0.02 < share < 1
    assert "GFLOP/s" in capsys.readouterr().out


def test_the_plot_is_drawn(tmp_path):
    shares = {"dense": 1.0, "30% fewer FLOPs": 0.7}
    groups = [
        measuring.Group(
            f"model at growing budgets, batch {batch}", {"dense": [2.0], "30% fewer FLOPs": [1.5]}, images=batch
        )
        for batch in (1, 8)
    ]
    budgets.plot_budgets(groups, shares, tmp_path / "budgets.svg")
    drawn = (tmp_path / "budgets.svg").read_text()
    assert drawn.startswith("<?xml")
    assert [file.name for file in tmp_path.iterdir()] == ["budgets.svg"]


def test_layers_alone_compute_what_they_compute_in_the_model():
    model = make_model(make_plainmamba_config(image_size=112)).plainmamba
    with torch.no_grad():
        tokens, grid = model.embeddings(torch.randn(1, 3, 112, 112), False)
        assert grid == scan.GRID
        expected = blocks.run_layers(model, tokens)
        products = blocks.matrix_products(model.layers, lambda: blocks.run_layers(model, tokens))
        assert len(products()) == 4 * model.config.num_hidden_layers
        with baselines.registered("reference", baselines.reference_kernel()):
            model.config.scan_backend = "reference"
            torch.testing.assert_close(blocks.run_layers(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_device_that_is_not_there_and_sections_of_another_are_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse_options(["--device", "cuda"])
    assert "finds no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "roofline" not in benchmark.parse_options(["--device", "cuda"]).sections
    with pytest.raises(SystemExit):
        benchmark.parse_options(["--device", "cuda", "--sections", "model", "roofline"])
    assert "roofline: not for plainmamba on cuda" in capsys.readouterr().err
    assert "blocks" not in benchmark.parse_options(["--family", "vim", "--preset", "S"]).sections
