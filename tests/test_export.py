"""Exported files give the same results as the model, in runtimes without this package."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import MAKE_CONFIG, PATIENCE, load_script, make_model, needs_inductor
from test_selective_scan import OPTIONS, make_arguments
from torch import nn

from hf_vssm_prune import EXAMPLE_MODEL, export
from hf_vssm_prune.export import FORMATS, Format, check_answers, export_classifier, trace, write_onnx
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_classifier, new_image_processor
from hf_vssm_prune.quantization import quantize_linears
from hf_vssm_prune.selective_scan_torch import selective_scan_torch
from hf_vssm_prune.token_pruning import select_tokens


def make_small_model(family: str, alignment: str | None) -> nn.Module:
    """A model with two layers and 16 patches; if pruned, the second layer gets 10."""
    schedule = {"layers": [1], "keep_ratios": [0.6], "method": "top", "alignment": alignment} if alignment else None
    return make_model(MAKE_CONFIG[family](num_hidden_layers=2, token_pruning=schedule))


@pytest.fixture(scope="module")
def export_small_model(tmp_path_factory):
    """Creates and exports a small model, once per family and alignment."""

    @functools.cache
    def export(family: str, alignment: str | None) -> tuple[nn.Module, Path]:
        model = make_small_model(family, alignment)
        processor = new_image_processor(model.config, [0.5] * 3, [0.25] * 3, crop_pct=0.875)
        folder = tmp_path_factory.mktemp("export") / "exported"
        return model, export_classifier(model, folder, ["onnx", "torch"], processor)

    return export


# Merged tokens: in `test_rows_that_merge…`, in test_videomamba.py, and on the documentation's page. `none` is theirs.
@pytest.mark.parametrize(
    ("family", "alignment"),
    [("plainmamba", "repeat"), ("vim", "zero_input"), ("vim", "learned"), ("plainmamba", None)],
)
def test_any_batch_gives_the_models_answers(family, alignment, export_small_model):
    model, exported = export_small_model(family, alignment)
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    assert [tuple(input.shape[1:]) for input in session.get_inputs()] == [(3, 32, 32)]
    names = [output.name for output in session.get_outputs()]
    assert names == ["logits"] + ["kept_tokens_0"] * (alignment is not None)
    program = torch.export.load(exported / "model.pt2").module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = model(images)
            by_torch = program(pixel_values=images)
        by_onnxruntime = session.run(None, {"pixel_values": images.numpy()})
        for logits, *kept in (by_onnxruntime, by_torch):
            np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4, rtol=0)
            for ids, expected_ids in zip(kept, expected.kept_tokens or (), strict=True):
                np.testing.assert_array_equal(ids, expected_ids.numpy())


def test_equal_scores_keep_the_earlier_tokens_in_onnx_too(tmp_path):
    class Select(nn.Module):
        def forward(self, scores):
            return select_tokens(scores, 3)

    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    batch = torch.export.Dim("batch", min=1)
    write_onnx(torch.export.export(Select(), (scores,), dynamic_shapes=({0: batch},)), tmp_path, tmp_path / "sort.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "sort.onnx")
    assert session.run(None, {"scores": scores.numpy()})[0].tolist() == [[0, 1, 5], [0, 1, 2]]


def test_onnx_file_has_labels_and_preprocessing(export_small_model):
    _, exported = export_small_model("plainmamba", "repeat")
    file = exported / FORMATS["onnx"].file
    metadata = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["config.json"])["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    for name in ("config.json", "preprocessor_config.json"):
        assert metadata[name] == (exported / name).read_text()
    assert b"stack_trace" not in file.read_bytes()
    assert [path.name for path in exported.parent.iterdir()] == ["exported"]


def test_torch_export_file_names_no_folder_of_this_machine(export_small_model):
    _, exported = export_small_model("plainmamba", "repeat")
    content = (exported / FORMATS["torch"].file).read_bytes()
    for module in (export, torch):
        assert str(Path(module.__file__).parent).encode() not in content


def test_torch_export_file_opens_where_the_package_is_not_installed(export_small_model, tmp_path):
    model, exported = export_small_model("plainmamba", "repeat")
    torch.save(torch.randn(2, 3, 32, 32), tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        "images = torch.load('images.pt')\n"
        f"logits, kept = torch.export.load({str(exported / 'model.pt2')!r}).module()(pixel_values=images)\n"
        "torch.save([logits, kept], 'outputs.pt')\n"
        "assert not [name for name in sys.modules if name.startswith(('hf_vssm_prune', 'transformers'))]\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    logits, kept = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        expected = model(torch.load(tmp_path / "images.pt"))
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(kept, expected.kept_tokens[0])


# ---- The scan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [OPTIONS["all"], []], ids=["all", "plain"])
def test_exported_scan_in_float64(names):
    class Scan(nn.Module):
        def forward(self, arguments):
            return selective_scan_torch(**arguments)

    arguments = make_arguments(names)
    batch = torch.export.Dim("batch", min=1)
    of_weights = ("A", "D", "time_step_bias", "hole_time_step", "direction_B")
    dynamic = {name: None if name in of_weights else {0: batch} for name in arguments}
    program = torch.export.export(Scan(), (arguments,), dynamic_shapes={"arguments": dynamic})
    loops = [node for node in program.graph.nodes if node.target is torch.ops.higher_order.scan]
    assert len(loops) == 1
    for size in (2, 1, 3):
        arguments = make_arguments(names, batch=size)
        output = program.module()(arguments)
        torch.testing.assert_close(output, selective_scan_torch(**arguments), rtol=1e-12, atol=1e-12)


def test_a_longer_sequence_makes_no_longer_program():
    lengths = {}
    for image_size in (32, 64):  # at 16 there are as many tokens as paths, and the program counts them together
        model = make_model(MAKE_CONFIG["plainmamba"](num_hidden_layers=1, image_size=image_size))
        lengths[image_size] = len(trace(model).graph.nodes)
    assert lengths[32] == lengths[64]


def test_what_is_exported_has_no_operator_of_this_package(export_small_model):
    _, exported = export_small_model("plainmamba", "repeat")
    nodes = torch.export.load(exported / FORMATS["torch"].file).graph.nodes
    assert not [node for node in nodes if "hf_vssm_prune" in str(node.target)]


# ---- Refusals ----------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path):
    model = make_small_model("vim", None)
    with pytest.raises(
        ValueError, match=r"unknown formats \['tflite'\]; allowed values are \['onnx', 'torch', 'aotinductor'\]"
    ):
        export_classifier(model, tmp_path / "exported", ["tflite"])
    with pytest.raises(ValueError, match="VimModel is not a classifier; only classifiers can be exported"):
        export_classifier(model.base_model, tmp_path / "exported")
    with pytest.raises(ValueError, match="training mode"):
        export_classifier(model.train(), tmp_path / "exported")
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16; call its `float\(\)`"):
        export_classifier(make_small_model("vim", None).bfloat16(), tmp_path / "exported")
    with pytest.raises(ValueError, match="int8 linear layers, which cannot be exported"):
        export_classifier(quantize_linears(make_small_model("vim", None)), tmp_path / "exported")
    larger = new_image_processor(MAKE_CONFIG["vim"](image_size=40))
    with pytest.raises(
        ValueError, match=r"makes images of \(height, width\) \(40, 40\), but .* `image_size`, \(32, 32\)"
    ):
        export_classifier(model.eval(), tmp_path / "exported", image_processor=larger)
    model.config.scan_backend = "cpu"
    with pytest.raises(ValueError, match="`scan_backend` is 'cpu'"):
        export_classifier(model, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_torch_without_the_loop_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.7.1+cpu"))
    with pytest.raises(ImportError, match=r"needs torch 2\.8 or newer; the installed version is 2\.7\.1"):
        export_classifier(make_small_model("vim", None), tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="will not be overwritten"):
        export_classifier(make_small_model("vim", None), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", [".", "linked"])
def test_an_empty_folder_is_filled(name, tmp_path, monkeypatch):
    """The folder is not replaced, because it may be the current one, a link, or a mount point."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(folder if name == "." else tmp_path)
    inode = folder.stat().st_ino
    monkeypatch.setattr(export, "trace", lambda _: None)
    monkeypatch.setattr(export, "check_answers", lambda *_: None)
    monkeypatch.setitem(FORMATS, "text", Format("a/b.txt", lambda *words: words[-1].write_text("b"), lambda *_: None))
    export_classifier(make_small_model("vim", None), name, ["text"])
    assert sorted(path.name for path in folder.iterdir()) == ["a", "config.json"]
    assert (folder / "a" / "b.txt").read_text() == "b"
    assert folder.stat().st_ino == inode


def test_wrong_answers_are_not_kept(tmp_path, monkeypatch):
    model = make_model(MAKE_CONFIG["plainmamba"](num_hidden_layers=1))

    def load_damaged(file, threads):
        return lambda images: (FORMATS["torch"].load(file, threads)(images)[0] + 0.01,)

    monkeypatch.setitem(FORMATS, "damaged", FORMATS["torch"]._replace(load=load_damaged))
    with pytest.raises(
        RuntimeError, match=r"the damaged file does not reproduce .* 1 at a time: its logits are up to 1.0e-02 away"
    ):
        export_classifier(model, tmp_path / "exported", ["damaged"])
    assert not list(tmp_path.iterdir())


def test_other_kept_tokens_are_found():
    model = make_small_model("vim", "repeat")
    with pytest.raises(RuntimeError, match="1 at a time: it keeps different tokens"):
        check_answers(model, lambda images: (model(images).logits, model(images).kept_tokens[0].flip(1)), "mirrored")


def test_one_image_on_which_rounding_decides_is_no_fault():
    model, batches = make_small_model("vim", "repeat"), []

    def unlucky(images):
        outputs = model(images)
        batches.append(len(images))
        return outputs.logits + 0.02 * (len(batches) == 1), *outputs.kept_tokens

    check_answers(model, unlucky, "unlucky")
    assert batches == [1, 1, 3]


# ---- Loaders -----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def loaders(language: str) -> list[str]:
    """Code blocks in docs/export.md."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), flags=re.DOTALL)


def test_rows_that_merge_are_not_lost_where_several_threads_add_them(tmp_path):
    """Uses the first two layers of the example model, which has enough tokens for several threads."""
    model = load_classifier(EXAMPLE_MODEL)
    del model.base_model.layers[2:]
    model.config.num_hidden_layers = 2
    model.set_token_pruning({"layers": [1], "keep_ratios": [0.5], "method": "local_merge"})
    exported = export_classifier(model, tmp_path / "exported", ["onnx"])
    run = FORMATS["onnx"].load(exported / FORMATS["onnx"].file, 2)
    images = torch.randn(6, 3, 144, 144)
    with torch.no_grad():
        torch.testing.assert_close(run(images)[0], model(images).logits, atol=1e-5, rtol=0)


@needs_inductor
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="AOTInductor needs a C++ compiler")
def test_aotinductor(tmp_path, monkeypatch):
    """Any batch size works, outputs equal the model's, and the documentation's code loads the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = make_small_model("vim", "repeat")
    export_classifier(model, "exported", ["aotinductor"])
    (code,) = loaders("py")
    for batch in (1, 2, 5):
        namespace = {"pixel_values": torch.randn(batch, 3, 32, 32)}
        with torch.no_grad():
            exec(compile(code, "docs/export.md", "exec"), namespace)
            expected = model(namespace["pixel_values"])
        torch.testing.assert_close(namespace["logits"], expected.logits, atol=1e-4, rtol=0)
        assert torch.equal(namespace["kept_tokens"][0], expected.kept_tokens[0])


ONNXRUNTIME_WEB = ROOT / "demo" / "web" / "node_modules" / "onnxruntime-web"


@pytest.mark.skipif(
    shutil.which("node") is None or not ONNXRUNTIME_WEB.is_dir(), reason="needs node, and `npm install` in demo/web"
)
def test_code_of_the_page_in_node(export_small_model):
    model, exported = export_small_model("plainmamba", "repeat")
    pixels = np.random.randint(0, 256, (32, 32, 4), dtype=np.uint8)
    code = f"""
        import {{ readFile }} from "node:fs/promises";
        import * as ort from "onnxruntime-web";
        import {{ classify, openClassifier }} from "./classify.mjs";
        ort.env.wasm.numThreads = 1;
        const classifier = await openClassifier(ort, {json.dumps(str(exported))}, readFile);
        const result = await classify(classifier, Uint8ClampedArray.from({pixels.flatten().tolist()}));
        console.log(JSON.stringify(result));
    """
    node = ["node", "--input-type=module", "--eval", code]
    result = subprocess.run(node, cwd=ROOT / "demo" / "web", capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    inputs = (torch.from_numpy(pixels[..., :3].copy()).permute(2, 0, 1) / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = model(inputs.unsqueeze(0))
    logits = {entry["label"]: entry["logit"] for entry in answer["labels"]}
    for i, label in model.config.id2label.items():
        assert logits[label] == pytest.approx(expected.logits[0, i].item(), abs=1e-4)
    assert [entry["score"] for entry in answer["labels"]] == pytest.approx(
        expected.logits[0].softmax(-1).sort(descending=True).values.tolist(), abs=1e-4
    )
    assert answer["keptTokens"] == expected.kept_tokens[0].tolist()


# ---- Script ------------------------------------------------------------------------------------------------------


def test_script(tmp_path, capsys):
    config = MAKE_CONFIG["vim"](num_hidden_layers=2)
    processor = new_image_processor(config, [0.5] * 3, [0.25] * 3, crop_pct=1.0)
    save_for_hub(make_model(config), tmp_path / "model", processor)
    script, arguments = load_script("export"), [str(tmp_path / "model"), str(tmp_path / "exported")]
    assert script.main([*arguments, "--formats", "torch", "--flops_reduction", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("config.json", "preprocessor_config.json", "model.pt2"))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["token_pruning"] is not None
    assert script.main(arguments) == 1
    assert "will not be overwritten" in capsys.readouterr().err


def test_without_a_compiler(tmp_path):
    import torch._inductor.config as config

    no_compiler = config.patch({"cpp.cxx": ("no-such-compiler",)})  # monkeypatch would hide the option for good
    with no_compiler, pytest.raises(ImportError, match=r"AOTInductor compiles C\+\+: install g\+\+ or clang\+\+"):
        FORMATS["aotinductor"].write(None, tmp_path, tmp_path / "model.pt2")


@needs_inductor
def test_paths_with_spaces_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a cache"))
    with pytest.raises(
        ValueError, match=r"cannot handle paths with spaces, and TORCHINDUCTOR_CACHE_DIR is '.*a cache'"
    ):
        FORMATS["aotinductor"].write(None, tmp_path, tmp_path / "model.pt2")
