"""``config.yaml`` in a run's folder, and what happens to it when a run resumes with other settings."""

from __future__ import annotations

from pathlib import Path

import yaml

from occstream.pretrain.checkpoint import Checkpoint
from occstream.pretrain.config import Config
from occstream.pretrain.events import flatten
from occstream.pretrain.resume import settings_then
from occstream.pretrain.tracking import Tracker
from occstream.sharding import storage


def write_config(run: Path, config: Config, ranks: int, *, saved: Checkpoint | None, tracker: Tracker) -> None:
    """Keeps ``config.yaml`` as what the run does now; what a resumed one changes is said, and noted in MLflow.

    Args:
        run: its folder.
        ranks: of this start.
        saved: what it resumes from; None: it is new.
    """
    path = run / "config.yaml"
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    changed: dict[str, tuple[object, object]] = {}
    if saved:
        old = settings_then(saved, config) | {"world_size": saved.state.get("world_size")}
        new = flatten(config.to_dict()) | {"world_size": ranks}
        changed = {k: (old.get(k), new.get(k)) for k in {**new, **old} if old.get(k) != new.get(k)}
    if changed or not path.exists():
        storage.publish(text.encode(), str(path))
    if not saved:
        tracker.artifact(path)
        if config.track.axes:
            tracker.log(0, {f"axis/{name}": value for name, value in config.track.axes.items()})
    elif changed:
        step = saved.state["step"]
        kept = run / f"config-step-{step:08d}.yaml"
        storage.publish(text.encode(), str(kept))
        tracker.changed(step, changed)
        tracker.artifact(kept)
        listed = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in changed.items())
        print(f"changed from step {step} on: {listed} (in {kept.name}, and as tags of the MLflow run)", flush=True)
