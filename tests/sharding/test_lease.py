"""Two packers on one target: the second is refused while the first lives; what a killed one left is in nobody's way."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from occstream.sharding import lease, storage
from occstream.sharding.lease import only_writer
from occstream.sharding.pack import pack
from tests.pretrain.small import ROOT, environment
from tests.sharding.toy import GRID, ToySource


@pytest.fixture(params=["local", "remote"])
def target(request, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED", 0.02)
    monkeypatch.setattr(lease, "EXPIRED", 0.3)
    yield str(tmp_path / "out") if request.param == "local" else f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def left(url):
    return [name for name in storage.listing(url) if name.endswith(".lease")]


def test_the_second_is_refused_while_the_first_lives(target):
    with only_writer(target, "pack"):
        if "://" in target:  # as another process would find it
            place = storage.join(target, ".pack-1-of-1.lease")
            assert json.loads(storage.read_bytes(place))["process"] == os.getpid()
        errors = []

        def second(part):
            try:
                with only_writer(target, "pack", part):
                    pass
            except ValueError as error:
                errors.append(str(error))

        for part in ((1, 1), (1, 2)):
            # By its process the first could not be told from this one.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lease.socket, "gethostname", lambda: "other")
                thread = threading.Thread(target=second, args=(part,))
                thread.start()
                thread.join()
        assert len(errors) == 2
        assert all("another packer is writing there" in e for e in errors)
    assert left(target) == []
    with only_writer(target, "pack"):
        pass


def test_parts_pack_beside_each_other(target):
    with only_writer(target, "pack", (1, 2)), only_writer(target, "pack", (2, 2)):
        assert len(left(target)) == 2
    assert left(target) == []


def test_what_a_killed_one_left_expires(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED", 0.02)
    monkeypatch.setattr(lease, "EXPIRED", 0.1)
    url = f"memory://{tmp_path.name}"
    storage.publish(json.dumps({"process": 1, "host": "gone", "run": "x"}).encode(), f"{url}/.pack-1-of-1.lease")
    storage.publish(b"nonsense", f"{url}/.pack-1-of-3.lease")
    with only_writer(url, "pack"):
        assert left(url) == [".pack-1-of-1.lease"]
    assert left(url) == []


def test_packing_holds_the_lease_and_leaves_nothing(tmp_path):
    with only_writer(str(tmp_path), "pack"), pytest.raises(ValueError, match="another packer is writing there"):
        pack(ToySource((1,)), str(tmp_path), grid=GRID)
    pack(ToySource((1,)), str(tmp_path), grid=GRID)
    assert left(str(tmp_path)) == []


PACK = """
import sys, time
from occstream.sharding.pack import pack
from tests.sharding.toy import GRID, ToySource

class Slow(ToySource):
    def load(self, name):
        open(f"{sys.argv[1]}/{__import__('os').getpid()}.pid", "w").close()
        time.sleep(60)

if __name__ == "__main__":
    pack(Slow((1, 1)), sys.argv[1] + "/out", grid=GRID, workers=2)
"""


@pytest.mark.process
def test_a_killed_packer_takes_its_workers_along(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PACK)
    process = subprocess.Popen([sys.executable, script, tmp_path], env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT)
    workers = wait_for(lambda: [int(p.stem) for p in tmp_path.glob("*.pid")], 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_for(lambda: [p for p in workers if not Path(f"/proc/{p}").exists()], 2) == workers


def wait_for(look, count):
    deadline = time.monotonic() + 60
    while len(found := look()) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_a_lock_on_a_file_that_its_last_holder_has_just_removed_keeps_others_out_too(tmp_path, monkeypatch):
    lock, path = lease.fcntl.flock, tmp_path / ".pack-1-of-1.lease"

    def late(file, how):
        if path.exists() and not path.read_text():
            monkeypatch.setattr(lease.fcntl, "flock", lock)
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(lease.fcntl, "flock", late)
    with only_writer(str(tmp_path), "pack"):
        assert json.loads(path.read_text())["process"] == os.getpid()
        with pytest.raises(ValueError, match="another packer is writing there"), only_writer(str(tmp_path), "pack"):
            pass
