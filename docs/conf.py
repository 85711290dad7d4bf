"""Sphinx configuration: Markdown pages, and an API reference from docstrings.

Sphinx reads the docstrings unchanged, checks all links between pages, and can treat broken links as errors.
"""

import inspect
import re
from pathlib import Path

import hf_vssm_prune
from hf_vssm_prune.configuration_common import VisionMambaConfig


project = "hf_vssm_prune"
version = release = hf_vssm_prune.__version__
copyright = "the authors of hf_vssm_prune"

exclude_patterns = ["figures", "images"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
# One parameter per line if there are many.
maximum_signature_line_length = 90
highlight_language = "text"

# Links to a heading of a page, `page.md#heading`, as on GitHub.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# As in Markdown, names in single backticks are code; they are links if they are documented here.
default_role = "py:obj"
MODULES = "|".join(file.stem for file in Path(hf_vssm_prune.__file__).parent.glob("*.py"))


def markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written in Markdown, as in transformers. This converts the parts that Sphinx would read
    differently.

    These are fenced code, indented blocks (formulas), and literal `*` and `|`.
    """
    rewritten: list[str] = []
    text_indent, in_fence, in_block, after_blank = 0, False, False, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if fence := re.match(r"( *)```(\w*)$", line):
            in_fence = not in_fence
            rewritten += [f"{fence[1]}.. code-block:: {fence[2] or 'text'}", ""] if in_fence else [""]
        elif in_fence:
            rewritten.append(f"    {line}")
        elif not line.strip():
            rewritten.append("")
        else:
            if in_block or after_blank:
                starts_block = not in_block and indent > text_indent
                in_block = indent > text_indent
                rewritten += [" " * text_indent + "::", ""] if starts_block else []
            if not in_block:
                text_indent = indent
                line = re.sub(r"(`[^`]*`|\*\w[^*]*\w\*(?!\w))|([*|])", lambda match: match[1] or "\\" + match[2], line)
                # A module of the package by the last part of its name, for instance `flops.count_flops`.
                line = re.sub(rf"`((?:{MODULES})\.\w+)`", r"`\1 <hf_vssm_prune.\1>`", line)
            rewritten.append(line)
        after_blank = not line.strip()
    lines[:] = rewritten


def options_of_family(app, what, name, obj, options, signature, return_annotation) -> tuple[str, None] | None:
    """A configuration's own options and their defaults, without those that transformers adds to every configuration."""
    if what != "class" or not issubclass(obj, VisionMambaConfig):
        return None
    classes = [ancestor for ancestor in obj.__mro__ if issubclass(ancestor, VisionMambaConfig)]
    own = {option for ancestor in classes for option in ancestor.__annotations__ if not option.startswith("_")}
    parameters = inspect.signature(obj).parameters.values()
    return f"({', '.join(f'{p.name}={p.default!r}' for p in parameters if p.name in own)})", None


def setup(app) -> None:
    app.connect("autodoc-process-signature", options_of_family)
    # Runs before napoleon, which has the default priority of 500.
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
