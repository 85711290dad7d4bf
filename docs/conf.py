"""How Sphinx builds the documentation: Markdown pages, and the reference from the docstrings.

Sphinx, because it follows every link and every name in a docstring, and can treat what leads nowhere as an error.
"""

import re

import hf_vssm_prune


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

# Links to a heading of a page, `page.md#heading`, as on GitHub.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A name in single backticks is code, in the docstrings as in Markdown; and a link where it is described here.
default_role = "py:obj"


def markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written as in transformers, in Markdown; what Sphinx would read otherwise is rewritten.

    That is: `*` and `|` outside of code, which mean themselves, and indented blocks, which are formulas.
    """
    previous_indent, is_block = 0, False
    rewritten: list[str] = []
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip():
            after_blank = index > 0 and not lines[index - 1].strip()
            if is_block:
                is_block = indent > previous_indent
            elif after_blank and indent > previous_indent:
                is_block = True
                rewritten += [" " * previous_indent + "::", ""]
            if not is_block:
                previous_indent = indent
                line = re.sub(r"(`[^`]*`)|([*|])", lambda match: match[1] or "\\" + match[2], line)
        rewritten.append(line)
    lines[:] = rewritten


def setup(app) -> None:
    # Before napoleon, which has the default priority of 500.
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=400)
