"""The help of commands with many options: an overview of the groups, and a description of each group."""

import argparse
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from hf_vssm_prune.training.paths import PathParser


WIDTH = 100
ALL = "all"
TYPE_NAMES = {int: "INT", float: "FLOAT"}


class OptionParser(PathParser, HfArgumentParser):
    """Parses dataclasses. Each is a group of options, named by its `_argument_group_name`.

    `--help` lists the groups with the names of their options, `--help GROUP` describes one group, and `--help all` all
    of them.

    Args:
        dataclass_types: dataclasses of the options.
        description: what the command does.
        prog: the program's name in messages; None: that of the running script.
    """

    def __init__(self, dataclass_types: Sequence[Any], description: str | None, prog: str | None = None) -> None:
        usage = "%(prog)s --help [GROUP]\n       %(prog)s [--recipe RECIPE] --OPTION VALUE ..."
        super().__init__(
            dataclass_types, prog=prog, usage=usage, description=description, allow_abbrev=False, add_help=False
        )
        common = self.add_argument_group("common", "Options of every command.")
        common.add_argument(
            "--recipe",
            help="YAML file of options, or a recipe of the package, e.g. few_images; the command line overrides it",
        )
        common.add_argument("-h", "--help", nargs="?", action=_Help, help="this overview, a group, or all options")

    @property
    def groups(self) -> dict[str, Any]:
        """The groups that have options, by name."""
        return {str(group.title): group for group in self._action_groups if group._group_actions}

    def add_argument_group(self, title: str | None = None, *args: Any, **options: Any) -> Any:
        """The group with this title, which is created if it does not exist."""
        same = [group for group in self._action_groups if group.title == title]
        return same[0] if same else super().add_argument_group(title, *args, **options)

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        # transformers reads it. It is removed again, because a class that derives from this one would inherit it.
        has_name = hasattr(dtype, "_argument_group_name")
        if not has_name:
            dtype._argument_group_name = _group_name(dtype)
        super()._add_dataclass_arguments(dtype)
        group = self.add_argument_group(dtype._argument_group_name)
        group.description = group.description or _summary(dtype)
        if not has_name:
            del dtype._argument_group_name

    # Output

    def format_help(self) -> str:
        """The overview."""
        required = [action for action in self._actions if action.required]
        lines = [self.format_usage().rstrip(), "", *(self.description or "").strip().splitlines(), "", "required:"]
        lines += [line for action in required for line in _describe(action)]
        lines += ["", "options by group (`--help GROUP` describes a group, `--help all` all groups):"]
        for name, group in self.groups.items():
            lines += ["", f"{name}: {group.description}"]
            names = " ".join(f"--{action.dest}" for action in _shown(group))
            lines += textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines) + "\n"

    def format_group(self, name: str) -> str:
        group = self.groups[name]
        lines = [f"{name}: {group.description}"]
        lines += [line for action in _shown(group) for line in _describe(action)]
        return "\n".join(lines) + "\n"


class _Help(argparse.Action):
    """Prints help and exits."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if values is None:
            text = parser.format_help()
        elif values == ALL:
            text = "\n".join(parser.format_group(name) for name in parser.groups)
        elif values in parser.groups:
            text = parser.format_group(values)
        else:
            parser.error(f"--help {values}: the groups are {', '.join(parser.groups)} and {ALL}.")
        print(text, end="")
        parser.exit()


def _summary(dtype: Any) -> str:
    """The first sentence of a dataclass's docstring."""
    return " ".join((inspect.getdoc(dtype) or "").split()).partition(". ")[0].removesuffix(".") + "."


def _group_name(dtype: Any) -> str:
    """The group name of a class that does not define one: `MeanColourArguments` becomes "mean_colour"."""
    words = re.findall(r"[A-Z][a-z0-9]*", dtype.__name__.removesuffix("Arguments"))
    return "_".join(words).lower()


def _shown(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """The options of a group, except those that only switch off another option, which are described with that
    option."""
    return [action for action in group._group_actions if not isinstance(action, argparse._StoreFalseAction)]


def _names(action: argparse.Action) -> list[str]:
    """The names of an option, as used in the documentation. Names with underscores can also be written with dashes."""
    spelled = [name.lstrip("-").replace("-", "_") for name in action.option_strings]
    return [name for i, name in enumerate(action.option_strings) if spelled.index(spelled[i]) == i]


def _describe(action: argparse.Action) -> list[str]:
    """Name, value, meaning and default of an option, usually in two lines."""
    is_switch = action.const is True
    value = "" if is_switch else f" {_value(action)}"
    lines = [f"  {', '.join(_names(action))}{value}"]
    text = action.help or ""
    if is_switch and action.default:
        text += f" (on; --no_{action.dest} turns it off)"
    elif not action.required and action.default not in (None, argparse.SUPPRESS, False, []):
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        text += f" (default: {default})"
    indent = " " * 8
    return lines + textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _value(action: argparse.Action) -> str:
    if action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    elif isinstance(action, _Help):
        return "[GROUP]"
    else:
        name = TYPE_NAMES.get(action.type, "TEXT")  # type: ignore[call-overload]
    return f"{name} ..." if action.nargs in ("+", "*") else name
