"""Tasks by name: those that come with the package, those of installed packages, and those of ``--import``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from occstream.pretrain.config import Config
    from occstream.pretrain.tasks.base import Task

TASKS: dict[str, type[Task]] = {}
"""Tasks that are registered so far."""
PACKAGED = {name: f"occstream.pretrain.tasks.{name}" for name in ("b2s", "occfiner", "panoocc", "spot")}
_GROUP = "occstream.tasks"
_IMPORTS = "OCCSTREAM_IMPORT"  # children of this process import the same modules


def register(task: type[Task]) -> type[Task]:
    """Decorator of a task's class. Raises ValueError if its name is taken."""
    if task.name in TASKS and TASKS[task.name] is not task:
        raise ValueError(f"task {task.name!r} is registered twice")
    TASKS[task.name] = task
    return task


def import_modules(names: Iterable[str] = ()) -> None:
    """Imports modules that register tasks, sources or models, and those that a parent process was given.

    Args:
        names: of modules, or paths of ``.py`` files.

    Raises:
        ValueError: one cannot be imported.
    """
    earlier = [name for name in os.environ.get(_IMPORTS, "").split(os.pathsep) if name]
    wanted = list(dict.fromkeys([*earlier, *(_absolute(name) for name in names)]))
    for name in wanted:
        try:
            _import(name)
        except Exception as error:
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error
    if wanted:
        os.environ[_IMPORTS] = os.pathsep.join(wanted)


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name.endswith(".py") else name


def _import(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name)
    known = f"occstream_import_{path.stem}"
    if known in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(known, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known]
        raise


def get_task(name: str) -> type[Task]:
    """Task by name. Raises ValueError that lists the names."""
    if name not in TASKS:
        import_modules()
    if name not in TASKS and name in PACKAGED:
        importlib.import_module(PACKAGED[name])
    if name not in TASKS:
        for point in metadata.entry_points(group=_GROUP, name=name):
            register(point.load())
    if name not in TASKS:
        known = task_names()
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown task {name!r}{hint} Known: {', '.join(known)}; one of your own needs --import MODULE or an installed "
            f"package with an entry point in {_GROUP}"
        )
    return TASKS[name]


def task_names() -> list[str]:
    """All names that ``get_task`` knows."""
    return sorted({*TASKS, *PACKAGED, *(point.name for point in metadata.entry_points(group=_GROUP))})


def task_of(config: Config) -> Task:
    """The task of a recipe."""
    return get_task(config.task)(config)
