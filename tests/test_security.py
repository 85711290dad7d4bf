"""What must never happen: running code from data, writing files outside a folder, or a dependency audit that passes
without a result.

test_faults.py covers malicious repositories and checkpoints.
"""

import ast
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MAKE_CONFIG, load_script
from transformers import AutoModelForImageClassification

import hf_vssm_prune
from hf_vssm_prune.hub import save_for_hub


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(hf_vssm_prune.__file__).parent
SOURCES = sorted(
    path for folder in ("src", "scripts", "demo") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)
# Modules that unpickle, or unpack archives under the names that stand in them.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile", "zipfile"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "shutil.unpack_archive"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported_modules(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def unsafe(source: str) -> list[str]:
    tree = ast.parse(source)
    found = sorted(imported_modules(tree) & FORBIDDEN_MODULES)
    for name, call in calls(tree):
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in FORBIDDEN_CALLS:
            found.append(name)
        if name == "torch.load" and not _is(options.get("weights_only"), True):
            found.append("torch.load without weights_only=True")
        if name.endswith("load") and _is(options.get("allow_pickle"), True):
            found.append("allow_pickle=True")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
        if _is(options.get("shell"), True):
            found.append("shell=True")
        if _is(options.get("trust_remote_code"), True):
            found.append("trust_remote_code=True")
    return found


def _is(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
        "import tarfile",
    ],
)
def test_the_search_finds(source) -> None:
    assert unsafe(source)


def test_sources_run_no_code_from_data() -> None:
    assert len(SOURCES) > 30
    assert {str(path.relative_to(ROOT)): found for path in SOURCES if (found := unsafe(path.read_text()))} == {}


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_code_in_a_folder_is_the_packages_byte_for_byte(family, tmp_path) -> None:
    model = AutoModelForImageClassification.from_config(MAKE_CONFIG[family]())
    save_for_hub(model, tmp_path / "atomic")
    model.save_pretrained(tmp_path / "plain")
    code = sorted(file.name for file in (tmp_path / "atomic").glob("*.py"))
    assert len(code) >= 6
    assert sorted(file.name for file in (tmp_path / "plain").glob("*.py")) == code
    for folder in ("atomic", "plain"):
        for name in code:
            assert (tmp_path / folder / name).read_bytes() == (PACKAGE / name).read_bytes()


# The audit


def audit(monkeypatch, stdout: str = "", stderr: str = "", error: Exception | None = None) -> int:
    def run(*_: object, **__: object) -> SimpleNamespace:
        if error is not None:
            raise error
        return SimpleNamespace(stdout=stdout, stderr=stderr)

    script = load_script("audit")
    monkeypatch.setattr(script.subprocess, "run", run)
    return script.main()


def packages(*entries: dict) -> str:
    return json.dumps({"dependencies": [{"name": "torch", "version": "1", **entry} for entry in entries], "fixes": []})


SKIPPED = {"skip_reason": "not found on PyPI"}
VULNERABLE = {"vulns": [{"id": "PYSEC-1", "fix_versions": ["2"], "aliases": [], "description": ""}]}


@pytest.mark.parametrize(
    ("answer", "status", "last_line"),
    [
        ({"stdout": packages({"vulns": []}, SKIPPED)}, 0, "1 packages audited, 1 not, 0 with known vulnerabilities."),
        ({"stdout": packages({"vulns": []}, VULNERABLE)}, 1, "2 packages audited, 0 not, 1 with known"),
        ({"stdout": packages(SKIPPED, SKIPPED)}, 0, "NOT AUDITED: PyPI's advisories were not reached; none of 2"),
        ({"stderr": "Traceback\nConnectionError: no route"}, 0, "NOT AUDITED: .* ConnectionError: no route"),
        ({"error": subprocess.TimeoutExpired("pip_audit", 300)}, 0, "NOT AUDITED: .* within 300 s"),
    ],
    ids=["clean", "vulnerable", "nothing was looked up", "no answer", "no end"],
)
def test_audit_says_what_it_could_not_do(answer, status, last_line, monkeypatch, capsys) -> None:
    assert audit(monkeypatch, **answer) == status
    printed = capsys.readouterr().out.splitlines()
    assert re.match(last_line, printed[-1]), printed
    assert ("VULNERABLE: torch 1: PYSEC-1; fixed in 2" in printed) == (status == 1)
