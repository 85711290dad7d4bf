"""Adapters (PEFT) on pruned models, from training to loading from a Hub."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from conftest import TOKEN_PRUNING, make_plainmamba_config, make_vim_config
from forking import run_forked
from hub_server import HubServer
from test_training import fresh_accelerator  # noqa: F401
from transformers import AutoModelForImageClassification, TrainingArguments

from hf_vssm_prune.training import TokenPruningTrainer


peft = pytest.importorskip("peft")


def lora(**options):
    targets = ["in_proj", "x_proj", "out_proj"]
    return peft.LoraConfig(r=2, target_modules=targets, **{"modules_to_save": ["classifier"], **options})


def train(model, folder: Path, batches: int = 3) -> None:
    items = [{"pixel_values": torch.randn(3, 32, 32) + i % 3, "labels": i % 3} for i in range(4 * batches)]
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), use_cpu=True, num_train_epochs=1, save_strategy="no", **options)
    TokenPruningTrainer(model, arguments, train_dataset=items).train()


def logits(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values).logits


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("make_config", [make_plainmamba_config, make_vim_config])
def test_train_save_load_and_merge(make_config, use_dora, pixel_values, tmp_path):
    model = AutoModelForImageClassification.from_config(make_config(token_pruning=dict(TOKEN_PRUNING)))
    model.save_pretrained(tmp_path / "base")
    before = logits(model, pixel_values)
    adapted = peft.get_peft_model(model, lora(use_dora=use_dora))
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running_" in name}
    assert bool(frozen) == (make_config is make_plainmamba_config)  # the others have no batch norm
    train(adapted, tmp_path / "run")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in frozen.items())
    trained = logits(adapted, pixel_values)
    assert not torch.allclose(trained, before, atol=1e-3)

    adapted.save_pretrained(tmp_path / "adapters")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    torch.testing.assert_close(logits(loaded, pixel_values), trained, atol=1e-5, rtol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, pixel_values), trained, atol=1e-4, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(opened, pixel_values), trained, atol=1e-4, rtol=1e-3)
    assert opened.config.token_pruning["layers"] == TOKEN_PRUNING["layers"]


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"method": "dyvm"}, ["token_predictors.1", "token_predictors.3"]),
        ({"method": "top", "alignment": "learned"}, ["hole_time_step"]),
        ({"block_keep_ratio": 0.7}, ["block_selector"]),
    ],
)
def test_parameters_of_pruning_are_trained_if_they_are_saved(options, saved, pixel_values, tmp_path, caplog):
    stages = {"layers": [1, 3], "keep_ratios": [0.7, 0.6]}
    AutoModelForImageClassification.from_config(make_vim_config(token_pruning=stages | options)).save_pretrained(
        tmp_path / "base"
    )
    for added in ([], saved):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
        adapted = peft.get_peft_model(model, lora(modules_to_save=["classifier", *added]))
        of_pruning = {
            name: (parameter, parameter.detach().clone())
            for name, parameter in adapted.named_parameters()
            if any(module in name for module in saved) and ".original_module." not in name
        }
        caplog.clear()
        train(adapted, tmp_path / "run", batches=1)
        assert ("to train them, add their modules to the adapters' `modules_to_save`" in caplog.text) == (not added)
        assert of_pruning
        assert all(torch.equal(*each) == (not added) for each in of_pruning.values())
        adapted.save_pretrained(tmp_path / "adapters")
        base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
        expected = logits(adapted, pixel_values)
        torch.testing.assert_close(logits(loaded, pixel_values), expected)
        torch.testing.assert_close(logits(loaded.merge_and_unload(), pixel_values), expected, atol=1e-5, rtol=1e-4)


def test_the_card_of_added_adapters_is_transformers_own(tmp_path):
    """They are saved without the model, so examples that load a whole model would not work."""
    model = AutoModelForImageClassification.from_config(make_vim_config())
    model.add_adapter(lora(modules_to_save=None))
    TokenPruningTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")).create_model_card()
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()


PROGRAM = """
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification
import hf_vssm_prune

base = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["in_proj", "out_proj"]))
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
pixel_values = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    expected = adapted.eval()(pixel_values).logits
adapted.push_to_hub("user/adapters")
fresh = AutoModelForImageClassification.from_pretrained(sys.argv[1])
opened = PeftModel.from_pretrained(fresh, "user/adapters").eval()
with torch.no_grad():
    torch.testing.assert_close(opened(pixel_values).logits, expected)
print("same")
"""


def test_adapters_are_pushed_and_loaded_by_name(tmp_path):
    model = AutoModelForImageClassification.from_config(make_vim_config(token_pruning=dict(TOKEN_PRUNING)))
    model.save_pretrained(tmp_path / "base")
    with HubServer() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {**hub.environment(tmp_path / "home", "hf_test"), "OMP_NUM_THREADS": "1"}
        done = run_forked(
            "-c",
            PROGRAM,
            tmp_path / "base",
            environment=environment,
            prepare=lambda: hub.use_in_this_process(pytest.MonkeyPatch(), tmp_path / "home"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == "same"
        files = hub.files("user/adapters")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert "model.safetensors" not in files


def test_the_comparison_in_the_docs(tmp_path, capsys):
    """`docs/examples/compare_adapters.py` prints a row per training method and writes a results file."""
    main = runpy.run_path(str(Path(__file__).resolve().parents[1] / "docs" / "examples" / "compare_adapters.py"))[
        "main"
    ]
    few = ["--max_train_samples", "4", "--max_eval_samples", "6"]
    assert main([*few, "--output_dir", str(tmp_path / "runs")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == [
        "dense",
        "pruned, not fine-tuned",
        "LoRA of rank 8",
        "DoRA of rank 8",
        "all parameters",
    ]
    assert len((tmp_path / "runs" / "accuracies.jsonl").read_text().splitlines()) == 3
