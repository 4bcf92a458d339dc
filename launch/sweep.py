"""``occstream sweep STUDY.yaml``: runs a study's cells, here or written as cluster jobs; a rerun does what is missing."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow.entities import Metric

from occstream.evaluation.charts import arrange_charts
from occstream.evaluation.compare import DATA_CARD, compare
from occstream.evaluation.studyreport import study_report
from occstream.launch.chain import ChainStudy, Command, words_of
from occstream.launch.grid import Study, Training, finish, plan
from occstream.launch.study import load_study
from occstream.pretrain.events import EVENTS, describe_uri, read_events
from occstream.pretrain.guards import WATCHED, in_use
from occstream.pretrain.sender import Sender, open_client
from occstream.pretrain.tasks.registry import get_task
from occstream.sharding.datacard import data_card
from occstream.sharding.manifest import Manifest
from occstream.sharding.secrets import redact

HERE = Path(__file__).resolve().parent


def sweep(
    path: str,
    *,
    jobs: int = 0,
    dry_run: bool = False,
    write: str = "",
    overrides: dict | None = None,
) -> int:
    """Runs a study.

    Args:
        path: of the study, or the name of a packaged one.
        jobs: trainings at a time; 0: one for each core up to 4 (on GPUs: use ``write``, or 1).
        dry_run: make the data, check every cell and show the plan only.
        write: "slurm" or "kubernetes": write jobs below the study's folder instead of running them.
        overrides: of the study.

    Returns:
        0 if every run is finished, 1 if some failed.

    Raises:
        ValueError: the study is wrong, or a cell could not start.
    """
    study = load_study(path, overrides)
    _prepare(study)
    jobs = jobs or min(4, os.cpu_count() or 1)
    if isinstance(study, ChainStudy):
        return _chain(study, jobs, dry_run, write)
    runs = plan(study)
    finish(runs, study)
    done = {run.name for run in runs if finished(study, run)}
    print(outline(study, runs, done, jobs), flush=True)
    print(f"MLflow: {describe_uri(study.uri)}, experiment {study.name}", flush=True)
    if dry_run:
        return 0
    if write:
        from occstream.launch.clusterjobs import write_jobs

        for file in write_jobs(write, study, [r for r in runs if r.name not in done]):
            print(f"wrote {file}")
        return 0
    page = _page(study, runs)
    failed = _Sweep(study, runs, done, jobs).run()
    if failed:
        print(f"\n{len(failed)} of {len(runs)} runs failed; the others are done. Fix the cause and run this again:")
        for name, reason in failed.items():
            print(f"  {name}: {reason}")
        return 1
    print(f"\nall {len(runs)} runs are done\n\n{_report(study)}")
    if page and study.uri.startswith("http"):
        print(f"curves: {redact(study.uri).rstrip('/')}/{page}")
    elif page:
        print(f"curves: mlflow ui --backend-store-uri {redact(study.uri)}, then http://127.0.0.1:5000/{page}")
    return 0


def compared(uri: str, experiment: str, *, by: str = "", out: Path | None = None, partial: bool = False) -> str:
    """What ``occstream compare`` prints: a scaling study's report, or a table of any runs.

    Args:
        uri: MLflow tracking URI.
        by: tag that names the rows of a table; "": the arm, unless it is a scaling study.
        out: folder for files.
        partial: report on a scaling study although cells are missing.

    Raises:
        ValueError: there is nothing to compare, which is said.
    """
    report = None if by else study_report(open_client(uri), experiment, out, partial)
    return report if report is not None else compare(uri, experiment, by=by or "arm", out=out)


def _report(study: Study) -> str:
    """The comparison of a study's runs, also written below its folder; how to get it later where the server has not all."""
    out = Path(study.output) / "report"
    try:
        return f"{compared(study.uri, study.name, out=out)}\n\nwrote {out}"
    except Exception as error:  # the server's trouble is not training's
        later = f"occstream compare --uri {redact(study.uri)} --experiment {study.name} --out {out}"
        return f"no report yet ({_first_line(error)}); later: {later}"


def _chain(study: ChainStudy, jobs: int, dry_run: bool, write: str) -> int:
    """Runs a study of steps, seeds side by side, and prints its table."""
    if write:
        raise ValueError(
            f"--write: the steps of {study.name} read what others wrote; run it on one machine, without --write"
        )
    steps = study.plan()
    done = {step.name for step in steps if isinstance(step, Training) and finished(study, step)}
    print(f"study {study.name}: {len(steps)} steps, {len(done)} trainings done")
    if dry_run:
        for step in steps:
            print(f"  {step.name}: {words_of(step)}{' (done)' if step.name in done else ''}")
        return 0
    failed = _Sweep(study, steps, done, jobs).run()
    if failed:
        print(f"\n{len(failed)} of {len(steps)} steps failed. Fix the cause and run this again:")
        for name, reason in failed.items():
            print(f"  {name}: {reason}")
        return 1
    print(f"\n{study.report()}\n\nwrote {study.output}/scores.md and scores.json")
    return 0


def _prepare(study: Study) -> None:
    """Calls the commands that make the study's data."""
    for line in study.prepare:
        print(f"$ occstream {line}", flush=True)
        command = [sys.executable, "-m", "occstream.launch.cli", *shlex.split(line)]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"prepare: `occstream {line}` failed")


def _page(study: Study, runs: Sequence[Training]) -> str:
    """As ``_log_card``; "" where the server does not take it, which is said."""
    try:
        return _log_card(study, runs)
    except Exception as error:  # the server's trouble is not training's
        print(
            f"MLflow at {redact(study.uri)} does not accept the data card ({_first_line(error)}); runs continue and "
            "keep their metrics, `occstream sync RUN` sends them later",
            file=sys.stderr,
            flush=True,
        )
        return ""


def _first_line(error: Exception) -> str:
    return redact((str(error).splitlines() or [type(error).__name__])[0][:160])


def _log_card(study: Study, runs: Sequence[Training]) -> str:
    """The data card as a run of its own (once), as ``occstream compare`` reads MLflow only, and the arranged charts.

    Returns:
        Their page, to put behind the server's address.
    """
    client = open_client(study.uri)
    experiment = Sender(Path(study.output), study.uri, study.name).experiment(client)
    task = get_task(runs[0].config.task)
    page = arrange_charts(client, experiment, task.headline, task.terms)
    if client.search_runs([experiment], f"tags.kind = '{DATA_CARD}'", max_results=1):
        return page
    config = next((r.config for r in runs if r.config.stage == "finetune"), runs[-1].config)
    others = {r.config.data.labels for r in runs} - {"labels"}
    card = data_card(Manifest.load(config.data.url), min(others, default=""))
    run = client.create_run(experiment, run_name=DATA_CARD, tags={"kind": DATA_CARD, "study": study.name})
    now = int(time.time() * 1000)
    metrics = [Metric(f"card/{key}", value, now, 0) for key, value in card.items() if value == value]
    client.log_batch(run.info.run_id, metrics=metrics)
    client.set_terminated(run.info.run_id, "FINISHED")
    return page


def finished(study: Study, run: Training | Command) -> bool:
    """Whether a run has ended well before, by its own record, with the settings it has now; a command is called again."""
    if isinstance(run, Command):
        return False
    events = read_events(Path(study.output) / run.name / EVENTS)
    status = [e["status"] for e in events if "status" in e]
    cell = [e["run"]["tags"].get("cell_id") for e in events if "run" in e]
    if cell and cell[-1] != run.cell_id:
        raise ValueError(
            f"{Path(study.output) / run.name}: was trained with different settings (cell {cell[-1]}, now {run.cell_id}); "
            "give the study another output, or remove that folder"
        )
    return bool(status) and status[-1] == "FINISHED"


def outline(study: Study, runs: Sequence[Training], done: set[str], jobs: int) -> str:
    """The plan as text: runs, frames, and time at the rate of the runs that have finished."""
    rate = study.rate or _rate(study, done)
    lines = [f"study {study.name}: {sum(len(r.cells) for r in runs)} cells from {len(runs)} runs, {len(done)} done"]
    for stage in dict.fromkeys(r.config.stage for r in runs):
        mine = [r for r in runs if r.config.stage == stage]
        frames = sum(r.frames for r in mine if r.name not in done)
        lines.append(f"  {stage}: {len(mine)} runs, {frames:,} frames to train on")
    left = sum(r.frames for r in runs if r.name not in done)
    if rate and left:
        hours = left / rate / 3600
        lines.append(
            f"  about {hours:.2f} hours of one worker (GPU or core), {hours / jobs:.2f} with {jobs} at a time, "
            f"at {rate:.1f} frames/s"
        )
    elif left:
        lines.append("  time: unknown until the first runs have finished, or set rate= (frames/s of one worker)")
    return "\n".join(lines)


def _rate(study: Study, done: set[str]) -> float:
    rates = []
    for name in done:
        for event in reversed(read_events(Path(study.output) / name / EVENTS)):
            if "perf/samples_per_s" in event.get("metrics", {}):
                rates.append(event["metrics"]["perf/samples_per_s"])
                break
    return statistics.median(rates) if rates else 0.0


def command(study: Study, run: Training | Command) -> list[str]:
    """How a run starts, on one device."""
    if isinstance(run, Command):
        return [sys.executable, "-m", "occstream.launch.cli", *shlex.split(run.line)]
    recipe = Path(study.output) / "recipes" / f"{run.name}.yaml"
    return [sys.executable, str(HERE / f"{run.config.stage}.py"), "--recipe", str(recipe)]


class _Sweep:
    """Trains what is not done, ``jobs`` at a time.

    Attributes:
        waiting: not started yet; ``running``: process and time of its start by name; ``done``: names.
        failed: the reasons, by name, for what failed or could not start.
    """

    def __init__(self, study: Study, runs: Sequence[Training | Command], done: set[str], jobs: int) -> None:
        self.study, self.jobs = study, jobs
        self.waiting = [run for run in runs if run.name not in done]
        self.running: dict[str, tuple[subprocess.Popen, float]] = {}
        self.done, self.failed = set(done), {}
        self._total = len(self.waiting)
        self._busy: set[str] = set()
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self._env = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1", WATCHED: "1"}

    def run(self) -> dict[str, str]:
        """Trains until nothing is left; returns ``failed``."""
        began = time.perf_counter()
        try:
            while self.waiting or self.running:
                self._drop_orphans()
                ready = [run for run in self.waiting if not run.needs or run.needs in self.done]
                for run in ready[: self.jobs - len(self.running)]:
                    self._start(run)
                self._reap()
                time.sleep(0.2)
        finally:
            for process, _ in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            for process, _ in self.running.values():
                process.wait()
        print(f"took {time.perf_counter() - began:.0f} s")
        return self.failed

    def _log(self, name: str) -> Path:
        return Path(self.study.output) / name / "log.txt"

    def _drop_orphans(self) -> None:
        for run in [run for run in self.waiting if run.needs in self.failed]:
            self.failed[run.name] = f"{run.needs}, which it starts from, failed"
            self.waiting.remove(run)

    def _start(self, run: Training | Command) -> None:
        """Starts a run unless another process is at it, or was and has finished it."""
        if in_use(Path(self.study.output) / run.name):
            # What a sweep that was killed has left is about to save and stop; another sweep's is not.
            if run.name not in self._busy:
                print(f"{run.name}: another process is training it; waiting for it to finish", flush=True)
            self._busy.add(run.name)
            return
        self.waiting.remove(run)
        if run.name in self._busy and finished(self.study, run):
            self.done.add(run.name)
            return
        log = self._log(run.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            # A group of its own: an interrupt reaches it through us, once.
            process = subprocess.Popen(
                command(self.study, run), env=self._env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.running[run.name] = process, time.perf_counter()

    def _reap(self) -> None:
        """Says what has ended."""
        for name, (process, start) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            if code == 0:
                self.done.add(name)
            else:
                log = self._log(name)
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["said nothing"]
                self.failed[name] = f"exit code {code}: {last[0][:200]} ({log})"
            ended = self._total - len(self.waiting) - len(self.running)
            took = time.perf_counter() - start
            print(f"[{ended}/{self._total}] {name} {'done' if code == 0 else 'FAILED'} in {took:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """``python launch/sweep.py STUDY.yaml …``: the same as ``occstream sweep``."""
    from occstream.launch.cli import main as occstream

    return occstream(["sweep", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
