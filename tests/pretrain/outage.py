"""Outage test: the MLflow server and the object store go away during a training, one after the other; nothing may be lost.

    python tests/pretrain/outage.py FOLDER [--seconds 60] [--save-every 100]

The server is a real one on SQLite, which is killed and started again; the store is OpenStack Swift behind a proxy that cuts
every connection. The training streams from the store, uploads its checkpoints there, and is told to stop once both have been
back for a while. Then every number of its event file must be at the server, each once, and every checkpoint that it saved
must be complete in the store. Prints what was found; exit code 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from occstream.pretrain.checkpoint import COMPLETE
from occstream.pretrain.events import EVENTS, read_events
from occstream.pretrain.sender import Sender, open_client
from occstream.sharding import storage
from tests import faultproxy, objectstore
from tests.pretrain.small import RECIPE, ROOT, environment, free_port, losses, pack_small


class MlflowServer:
    """A server on a port of its own, to be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [Path(sys.executable).parent / "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        log = (self.folder / "mlflow.log").open("a")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, "the MLflow server", 180)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        return False

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def wait_for(look, what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not arrive within {seconds:.0f} s")
        time.sleep(0.5)


def outage(folder: Path, seconds: float, save_every: int) -> list[str]:
    """Runs it; returns what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    run, server, faults = folder / "run", MlflowServer(folder), faultproxy.Faults()
    with objectstore.running(folder / "swift") as endpoint, faultproxy.before(endpoint, faults) as proxy:
        os.environ |= {
            "AWS_ENDPOINT_URL_S3": proxy,
            "AWS_ACCESS_KEY_ID": objectstore.KEY,
            "AWS_SECRET_ACCESS_KEY": objectstore.SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "OCCSTREAM_CACHE": str(folder / "cache"),
        }
        pack_small("s3://outage/data", scenes=4)
        server.start()
        words = [
            "data.url=s3://outage/data",
            "train.upload=s3://outage/run",
            f"track.uri={server.uri}",
            f"output={run}",
        ]
        words += ["train.steps=1000000", f"train.save_every={save_every}", "train.keep=2"]
        command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--recipe", RECIPE, *words]
        with (folder / "log.txt").open("w") as log:
            training = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: len(losses(run)) > 3, "the first steps")
            wait_for(lambda: Sender(run).run_id is not None, "MLflow's first answer")
            for name, leave, come_back in (
                ("MLflow", server.kill, server.start),
                ("the store", lambda: setattr(faults, "away", True), lambda: setattr(faults, "away", False)),
            ):
                before = max(losses(run))
                leave()
                time.sleep(seconds)
                print(f"{name} was away for {seconds:.0f} s; training went on from step {before} to {max(losses(run))}")
                come_back()
                time.sleep(min(10.0, seconds))
            (run / "STOP").touch()
            code = training.wait(600)
            print((folder / "log.txt").read_text()[-1500:])
            return [*_missing(run, server.uri), *([] if code == 75 else [f"training ended with {code}"])]
        finally:
            training.kill()
            server.kill()


def _missing(run: Path, uri: str) -> list[str]:
    problems, client, sender = [], open_client(uri), Sender(run)
    events = [e for e in read_events(run / EVENTS) if "metrics" in e]
    wanted = Counter((key, e["step"]) for e in events for key, v in e["metrics"].items() if v is not None and v == v)
    keys = {key for key, _ in wanted}
    there = Counter((key, m.step) for key in keys for m in client.get_metric_history(sender.run_id, key))
    if wanted - there:
        problems.append(f"{len(wanted - there)} numbers are not at the server, such as {min(wanted - there)}")
    if there - wanted:
        problems.append(f"{len(there - wanted)} numbers are there more than once")
    saved = sorted({e["step"] for e in events if "ckpt/save_s" in e["metrics"]})
    whole = {n for n in storage.folders("s3://outage/run") if storage.size(f"s3://outage/run/{n}/{COMPLETE}")}
    lost = [step for step in saved if f"step-{step:08d}" not in whole]
    if lost:
        problems.append(f"checkpoints of steps {lost} are not in the store")
    print(
        f"{sum(wanted.values())} numbers, {sum(there.values())} at the server; {len(saved)} checkpoints, {len(whole)} uploaded"
    )
    return problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="that each is away (default 60)")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    found = outage(args.folder.resolve(), args.seconds, args.save_every)
    print(found or "nothing is missing")
    sys.exit(bool(found))
