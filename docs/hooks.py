"""MkDocs hooks: pages generated from the code and from files next to it, so that nothing is duplicated."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# File of the repository -> page.
COPIES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "sharding/FORMAT.md": "reference/format.md",
    "sharding/sources/README.md": "reference/sources.md",
}


def on_config(config):
    """Drops pages from the navigation that this version does not have."""
    made = {*COPIES.values(), "reference/cli.md", "reference/config.md"}
    config.nav = [_present(entry, made) for entry in config.nav]
    return config


def _present(entry: dict, made: set[str]) -> dict:
    [(title, inside)] = entry.items()
    if isinstance(inside, str):
        return entry
    there = lambda page: page in made or (ROOT / "docs" / page).exists()  # noqa: E731
    return {title: [page for page in inside if there(next(iter(page.values())))]}


def on_files(files, config):
    """Adds the pages that are made or copied."""
    for source, page in COPIES.items():
        files.append(File.generated(config, page, content=_moved((ROOT / source).read_text(), source, page)))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "reference/config.md", content=configuration()))
    return files


def _moved(text: str, source: str, page: str) -> str:
    """The file's text with its links as the page needs them; links to files without a page become plain text."""
    up = "../" * page.count("/")

    def link(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = target.partition("#")
        path = ((ROOT / source).parent / path).resolve().relative_to(ROOT).as_posix()
        known = COPIES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
        return f"[{label}]({up}{known}{'#' + anchor if anchor else ''})" if known else label

    return re.sub(r"(?<!`)\[([^\]\n]*)\]\(([^)\s]+)\)", link, text)


def command_line() -> str:
    """The page of all commands and their arguments, from the argument parsers."""
    from occstream.launch import cli, run

    parser = cli._parser()
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    text = "# Command line\n\nGenerated from the argument parsers. `occstream COMMAND --help` prints the same.\n"
    for name, sub in commands.choices.items():
        text += _command(f"occstream {name}", sub)
    text += (
        "\n## Training\n\n`deepspeed launch/pretrain.py`, `launch/finetune.py` and, for the stage that a recipe names, "
        "`launch/train.py` (or `torchrun`, or plain `python`) take the same arguments. Exit codes: 0 done, 2 wrong "
        "input, 3 training failed, 75 stopped and saved.\n"
    )
    return text + _arguments(run.parser("pretrain"))


def _command(title: str, parser: argparse.ArgumentParser) -> str:
    text = f"\n## {title}\n\n{_escaped(parser.description or '')}"
    text += f" {_escaped(parser.epilog)}" if parser.epilog else ""
    return text + "\n" + _arguments(parser)


def _arguments(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        name = ", ".join(action.option_strings) or action.metavar or action.dest
        takes = "" if action.nargs == 0 or not action.option_strings else action.metavar or _choices(action)
        help = (action.help or "") % {"default": action.default, "prog": parser.prog}
        rows.append(f"| `{name}{' ' + takes if takes else ''}` | {_escaped(help)} |")
    return "\n| argument | |\n|---|---|\n" + "\n".join(rows) + "\n" if rows else ""


def _choices(action: argparse.Action) -> str:
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def configuration() -> str:
    """The page of all keys of a recipe, from the config dataclasses."""
    from occstream.models import MODELS
    from occstream.pretrain.configdocs import keys_of
    from occstream.pretrain.tasks.registry import PACKAGED, get_task

    text = (
        "# Configuration\n\nA recipe is a YAML file; `key=value` after a command overrides it. Generated from the config "
        "dataclasses; `occstream recipe NAME` prints the same with a recipe's own values.\n"
    )
    configs: dict[type, list[str]] = {}
    for name, entry in sorted(MODELS.items()):
        configs.setdefault(entry.config, []).append(name)
    first = next(iter(configs))
    recipes = {name: get_task(name).Config for name in PACKAGED}
    keys = {name: {k.name: k for k in keys_of(c, inner=c.open_sections({}))} for name, c in recipes.items()}
    shared = {n for n, key in keys["b2s"].items() if all(own.get(n) == key for own in keys.values())}
    text += "\n## Every task\n" + _sections([key for n, key in keys["b2s"].items() if n in shared], "###")
    for name, own in keys.items():
        text += f"\n## Task {name}\n"
        if name == "b2s":
            text += f"\nSection `model` is of {', '.join(f'`{n}`' for n in configs[first])}.\n"
        text += _sections([key for n, key in own.items() if n not in shared], "###")
    return text


def _sections(keys: Sequence[Any], mark: str) -> str:
    """Tables of keys, one for each section of a recipe."""
    from occstream.launch.showrecipe import _plain

    sections: dict[str, list] = {}
    for key in keys:
        sections.setdefault(key.name.partition(".")[0] if "." in key.name else "", []).append(key)
    text = ""
    for section, found in sections.items():
        text += f"\n{mark} {section or 'Top level'}\n\n| key | type | default | |\n|---|---|---|---|\n"
        for key in found:
            value = list(key.default) if isinstance(key.default, tuple) else key.default
            default = "required" if value is ... else f"`{_plain(value)}`"
            text += f"| `{key.name}` | `{key.type}` | {default} | {_escaped(key.doc)} |\n"
    return text


def _escaped(text: str) -> str:
    """Help as Markdown inside a table."""
    text = " ".join(text.replace("``", "`").split())
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>\[\]|])", r"\\\1", p) for p in parts)
