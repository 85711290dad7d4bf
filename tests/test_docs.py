"""The documentation: its commands and code run and print the output shown, quoted error messages match the code, and
the sections that errors refer to exist."""

import ast
import glob
import inspect
import pkgutil
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
import transformers.dynamic_module_utils
import transformers.models.auto.configuration_auto
from accelerate.state import AcceleratorState, GradientState
from conftest import load_script

import hf_vssm_prune
from hf_vssm_prune import PlainMambaConfig
from hf_vssm_prune.__main__ import main
from hf_vssm_prune.commands import VERBS, make_parser_of
from hf_vssm_prune.conversion import infer_config
from hf_vssm_prune.documentation import DOCUMENTATION, see
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.pruning_importances import IMPORTANCES
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.training import data
from hf_vssm_prune.training.arguments.help import OptionParser
from hf_vssm_prune.training.data import load_evaluation_dataset
from hf_vssm_prune.training.tasks import TASKS


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
TROUBLESHOOTING = DOCS / "troubleshooting.md"


class Block(NamedTuple):
    """A block of code on a page.

    Attributes:
        language: language named by its fence.
        code: its lines.
        output: the text block directly after it, which shows what it prints; None if there is none.
    """

    language: str
    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    found = re.findall(
        r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return [Block(language, code, output or None) for language, code, output in found]


def pages_with(*languages: str) -> list[str]:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with links to what commands use in the repository, so that they write nothing into it. If a page limits
    the number of evaluation images, the limit is lowered."""
    for name in ("scripts", "recipes", "src", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_evaluation_dataset", few_images)
    tables = (hf_vssm_prune.kernels.KERNELS, TASKS, FAMILIES, METHODS, IMPORTANCES)
    tables = [(table, dict(table)) for table in tables]
    paths = list(sys.path)
    yield tmp_path
    sys.path[:] = paths
    for table, before in tables:
        table.clear()
        table.update(before)


FEW = 8


def few_images(name: str, max_samples: int | None = None) -> tuple[datasets.Dataset, list[str]]:
    return load_evaluation_dataset(name, max_samples=max_samples and min(max_samples, FEW))


@pytest.mark.parametrize("page", pages_with("python", "bash"))
def test_what_a_page_shows_runs(page: str, repository: Path):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        printed = StringIO()
        with redirect_stdout(printed):
            if block.language == "python":
                exec(compile(block.code, page, "exec"), namespace)
            elif block.language == "bash":
                for command in commands_of(block.code):
                    run_command(command)
        if block.language in ("python", "bash") and block.output is not None:
            assert matches(printed.getvalue(), block.output), printed.getvalue()


def commands_of(code: str) -> list[list[str]]:
    """Words of each command: lines ending in a backslash are joined, file name patterns expanded, and the number of
    evaluation images lowered."""
    commands = []
    code = re.sub(r"(--max_eval_samples) \d+", rf"\1 {FEW}", code.replace("\\\n", " "))
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        commands.append([file for word in words for file in (sorted(glob.glob(word)) or [word])])
    return commands


def run_command(command: list[str]) -> None:
    """Runs a script like a user would, but in this process, for speed. Commands that would change the machine are only
    looked up."""
    match command:
        case ["python", script, *arguments] | ["accelerate", "launch", script, *arguments] if script.endswith(".py"):
            assert script == f"scripts/{Path(script).name}"
            assert load_script(Path(script).stem).main(arguments) == 0, command
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        case ["hf-vssm-prune", verb, *arguments] | ["accelerate", "launch", "-m", "hf_vssm_prune", verb, *arguments]:
            assert main([verb, *arguments]) == 0, command
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        case ["pip", "install", "-e", target]:
            for extra in re.fullmatch(r"\.\[([\w,]+)\]", target)[1].split(","):
                assert re.search(rf"^{extra} = \[$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
        case ["python", "-m", "venv", _] | ["source", ".venv/bin/activate"]:
            pass
        case ["make", target]:
            assert re.search(rf"^{target}: .*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        case _:
            pytest.fail(f"no way to check this command: {shlex.join(command)}")


def matches(printed: str, shown: str) -> bool:
    """Whether the printed text matches what a page shows, where "…" stands for anything within a line."""
    pattern = ".*".join(map(re.escape, shown.strip().split("…")))
    return re.fullmatch(pattern, printed.strip()) is not None


# Options of `accelerate launch`, of Slurm's `sbatch` and `srun`, of transformers' example scripts, of Python's
# `http.server`, and of the toy task in docs/extend.md.
OTHERS_OPTIONS = {
    *("main_process_ip", "main_process_port", "machine_rank", "multi_gpu", "num_machines", "num_processes"),
    *("cpus-per-task", "gpus-per-node", "job-name", "kill-on-bad-exit", "nodes", "ntasks-per-node", "requeue"),
    *("signal", "do_eval", "do_train", "image_processor_name", "max_steps", "remove_unused_columns", "train_dir"),
    *("trust_remote_code", "bind", "noise"),
}


def options_that_exist() -> set[str]:
    """Options of all verbs, tasks and scripts."""
    parsers = [make_parser_of(verb)() for verb in VERBS]
    parsers += [OptionParser([task.training_arguments], "") for task in TASKS.values()]
    code = "".join(file.read_text() for folder in ("demo", "docs", "scripts") for file in (ROOT / folder).rglob("*.py"))
    names = {name for parser in parsers for action in parser._actions for name in action.option_strings}
    return {name.lstrip("-") for name in names} | set(re.findall(r"[\"']--([a-z][\w-]*\w)", code))


def test_what_sentences_name_exists():
    """Checks files, make targets, command-line options, and names in the package."""
    text = "".join((DOCS / page).read_text() for page in PAGES)
    for file in re.findall(r"`((?:scripts|recipes|tests|docs|src)/[\w/.]+)", text):
        assert (ROOT / file).exists(), file
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}: .*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
    options = set(re.findall(r"(?<![\w-])--([a-z][\w-]*\w)", text))
    assert options - OTHERS_OPTIONS - options_that_exist() == set()
    assert options >= OTHERS_OPTIONS, "no page names them any more"
    for name in re.findall(r"`(hf_vssm_prune(?:\.\w+)+)", text):
        pkgutil.resolve_name(name)


def test_figure_is_what_its_script_draws():
    draw = runpy.run_path(str(DOCS / "figures" / "draw_method.py"))["draw"]
    assert draw() == (DOCS / "figures" / "method.svg").read_text()


# Error messages


def quoted_messages() -> list[str]:
    return [
        line
        for block in re.findall(r"```text\n(.*?)```", TROUBLESHOOTING.read_text(), flags=re.DOTALL)
        for line in block.splitlines()
    ]


def strings_of(source: str) -> Iterator[str]:
    """All strings in a module, with "…" in place of inserted values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def strings() -> list[str]:
    sources = [file.read_text() for file in Path(hf_vssm_prune.__file__).parent.rglob("*.py")]
    others = (transformers.dynamic_module_utils, transformers.models.auto.configuration_auto)
    return [text for source in [*sources, *map(inspect.getsource, others)] for text in strings_of(source)]


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_messages_are_those_of_the_code(message: str, strings: list[str]):
    parts = [part.strip() for part in message.split("…") if len(part.strip()) > 1]
    assert parts
    assert any(all(part in text for part in parts) for text in strings)


def slugs(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def sections_in_errors() -> list[tuple[str, str]]:
    package = Path(hf_vssm_prune.__file__).parent
    return [
        (file.relative_to(package).as_posix(), section)
        for file in sorted(package.rglob("*.py"))
        for section in re.findall(r"\bsee\([\"']([^\"']+)[\"']\)", file.read_text())
    ]


@pytest.mark.parametrize(("file", "section"), sections_in_errors())
def test_what_errors_point_to_is_there(file: str, section: str):
    assert section in slugs(TROUBLESHOOTING)


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ("schedule-not-allowed", lambda: PlainMambaConfig(token_pruning={"layers": [0], "keep_ratios": [0.5]})),
        ("budget-out-of-reach", lambda: PlainMambaConfig(token_pruning={"flops_reduction": 0.99})),
        ("checkpoint-of-another-layout", lambda: infer_config({"model": {"fc.weight": torch.ones(1)}})),
        ("backend-cannot-be-used", lambda: selective_scan(*[torch.ones(1, 1, 1)] * 7, backend="mamba_ssm")),
    ],
)
def test_errors_end_with_where_to_read_on(section: str, wrong):
    with pytest.raises((ValueError, ImportError)) as error:
        wrong()
    assert see(section) in str(error.value)
    assert see(section) == f"See {DOCUMENTATION}/troubleshooting.md#{section}."
