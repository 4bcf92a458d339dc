"""Study files: which kind a file is, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from occstream.launch.b2sarms import ArmSpec, ArmStudy
from occstream.launch.chain import ChainStudy, StepSpec
from occstream.launch.grid import AxesStudy, StageSpec, Study
from occstream.pretrain.config import build_section, dotted_keys, merge, read_recipe


def load_study(path: str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads a study; a path or the name of a packaged recipe.

    With ``axes`` it is one of any axes, with ``steps`` one of several steps, otherwise one of B2S.

    A strategy, a value of an axis, a step or a row that is null leaves out that of ``base``.

    Raises:
        ValueError: that names the key.
    """
    data = merge(read_recipe(path), overrides or {})
    if "axes" in data:
        stages = data.get("stages") or ()
        if isinstance(stages, (list, tuple)):
            known = list(dotted_keys(StageSpec, "stages."))
            data["stages"] = tuple(build_section(StageSpec, s, "stages", known) for s in stages)
        if isinstance(data["axes"], Mapping):
            data["axes"] = {axis: _there(values) for axis, values in data["axes"].items()}
        return build_section(AxesStudy, data, "", list(dotted_keys(AxesStudy)))
    if "steps" in data:
        steps, score = _there(data["steps"]), data.get("score") or {}
        known = [*dotted_keys(ChainStudy), *dotted_keys(StepSpec, "steps.NAME.")]
        if isinstance(score, Mapping) and "rows" in score:
            data["score"] = {**score, "rows": _there(score["rows"])}
        return build_section(ChainStudy, {**data, "steps": steps}, "", known)
    data |= {"strategies": _there(data["strategies"])} if "strategies" in data else {}
    known = [*dotted_keys(ArmStudy), *dotted_keys(ArmSpec, "strategies.NAME.")]
    return build_section(ArmStudy, data, "", known)


def _there(values: Any) -> Any:
    return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values
