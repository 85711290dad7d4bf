"""The structure of the code: which modules import each other, and whether each argument has its own docstring entry."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


SOURCES = Path(__file__).resolve().parents[1] / "src"


def modules_in(folder: Path) -> dict[str, Path]:
    """Files by module name."""
    files = {file.relative_to(folder).with_suffix(""): file for file in folder.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): file for name, file in files.items()}


def imported_names(module: str, file: Path) -> Iterator[tuple[str, str]]:
    """For every import statement, also within functions, the module and the name imported from it (or "")."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            yield from ((source, alias.name) for alias in node.names)


def import_graph(folder: Path) -> dict[str, set[str]]:
    """For each module in `folder`, the other modules there that it imports.

    A name imported from a package counts as the module of that name, or as the package itself if there is none.
    """
    modules, graph = modules_in(folder), {}
    for module, file in modules.items():
        targets = ((f"{source}.{name}", source) for source, name in imported_names(module, file))
        found = {next((name for name in names if name in modules), None) for names in targets}
        graph[module] = found - {module, None}
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules in a circle, each imported by the next one, with the first repeated at the end; empty if there is
    none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = import_graph(SOURCES)
    assert "hf_vssm_prune.kernels.cpu" in graph["hf_vssm_prune.kernels"]
    assert not circle_in(graph)


@pytest.mark.parametrize(
    ("imports", "circle"),
    [
        ({"a": "from . import b", "b": "from .sub.c import x", "sub/c": "def f():\n    from ..a import x"}, True),
        ({"a": "import p.b", "b": "from p import a"}, True),
        ({"a": "from p.sub import c", "sub/c": "import p.b", "sub/__init__": "from ..b import x"}, False),
        ({"a": "from .sub import x", "sub/__init__": "from .c import x", "sub/c": "from p import a"}, True),
    ],
)
def test_circles_are_found_however_they_are_imported(imports, circle, tmp_path) -> None:
    for name in ("a", "b", "sub/c", "sub/__init__", "__init__"):
        file = tmp_path / "p" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(imports.get(name, ""))
    assert bool(circle_in(import_graph(tmp_path))) == circle


def test_kernels_import_mathematics_and_not_the_files_that_choose_a_kernel() -> None:
    graph = import_graph(SOURCES)
    imported = set().union(*(graph[module] for module in graph if module.startswith("hf_vssm_prune.kernels.")))
    assert {"hf_vssm_prune.selective_scan_torch", "hf_vssm_prune.convolution_torch"} <= imported
    choosing = {module for module in graph if "hf_vssm_prune.kernel_choice" in graph[module]}
    assert choosing >= {"hf_vssm_prune.selective_scan", "hf_vssm_prune.grid_convolution"}
    assert not imported & (choosing | {"hf_vssm_prune.kernel_choice"})


def test_only_the_command_line_imports_commands() -> None:
    graph, commands = import_graph(SOURCES), "hf_vssm_prune.commands"
    importing = {module for module in graph if any(name.startswith(commands) for name in graph[module])}
    assert {module for module in importing if not module.startswith(commands)} == {"hf_vssm_prune.__main__"}


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {str(file.relative_to(SOURCES)): len(file.read_text().splitlines()) for file in SOURCES.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > 500}


def swallowed_entries(source: str) -> list[str]:
    """Docstring lines that start a new entry (an argument, field or error), but are indented like the continuation of
    the previous one, so that Sphinx shows them as part of it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
            names |= {ast.unparse(each.target) for each in ast.walk(node) if isinstance(each, ast.AnnAssign)}
            entry = re.compile(rf" {{8,}}(?:(?:{'|'.join(names) or 'self'})(?:, \w+)*|\w+Error): ")
            found += filter(entry.match, (ast.get_docstring(node) or "").splitlines())
    return found


def test_each_argument_has_an_entry_of_its_own() -> None:
    assert not {file.name: lines for file in SOURCES.rglob("*.py") if (lines := swallowed_entries(file.read_text()))}


def test_an_argument_inside_another_ones_entry_is_found() -> None:
    entries = ["Args:", "    a: first,", "        wrapped.", "{}b, c: second.", "Raises:", "    OSError: it fails."]
    source = 'def f(a, b, c):\n    """Does.\n\n    ' + "\n    ".join(entries) + '\n    """\n'
    assert not swallowed_entries(source.format("    "))
    assert swallowed_entries(source.format("        ")) == ["        b, c: second."]
