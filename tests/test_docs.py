"""The front page is short, the site builds without a warning, and its references come from the code."""

import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTES = re.compile(r"\b(SPEC|OPERATIONS|DESIGN|STREAMING)\b")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    out = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out))
    try:
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert warnings == []
    return out


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines if not line.startswith("|")) <= 135


def test_the_site_has_every_command_and_every_key(site):
    from occstream.launch import cli
    from occstream.pretrain.config import load_config
    from occstream.pretrain.configdocs import recipe_keys

    commands = (site / "reference/cli.html").read_text()
    [choices] = [a.choices for a in cli._parser()._actions if isinstance(a.choices, dict)]
    assert [name for name in choices if f">occstream {name}<" not in commands] == []
    assert "--dry-run" in commands
    keys = (site / "reference/config.html").read_text()
    for recipe in ("r50", "spot"):
        assert [k.name for k in recipe_keys(load_config(recipe)) if f"<code>{k.name}</code>" not in keys] == []


def test_pages_are_in_the_navigation(site):
    front = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in front, page.name


def test_links_between_files_of_the_repository_lead_somewhere():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "infra").glob("*.md"),
        *(ROOT / "sharding").rglob("*.md"),
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_nothing_cites_notes_that_readers_do_not_have():
    places = ("sharding", "models", "evaluation", "pretrain", "launch", "infra", "docs")
    kinds = {".py", ".md", ".yaml", ".sh", ".sbatch", ".example"}
    files = [ROOT / "README.md", *(p for place in places for p in (ROOT / place).rglob("*") if p.suffix in kinds)]
    found = [f"{p}:{n}" for p in files for n, line in enumerate(p.read_text().splitlines(), 1) if NOTES.search(line)]
    assert found == []
