"""Checkpoints are complete or refused; transfer loads all declared keys or nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from occstream.pretrain import checkpoint, resume
from occstream.pretrain.checkpoint import Checkpoint, load_declared, newest, read_weights
from occstream.pretrain.distributed import World
from occstream.pretrain.export import export
from occstream.pretrain.partition import float_state, full_state, module_state
from occstream.pretrain.streams import _position

ALONE = World(0, 1, torch.device("cpu"))


def _write(root, step=3, keep=2):
    tensors = {"model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}, "ema": {"w": torch.ones(2, 3)}}
    path = checkpoint.save(root, step, tensors, {"step": step})
    checkpoint.prune(root, keep)
    return path


def test_round_trip_prefers_averaged_weights(tmp_path):
    path = _write(tmp_path)
    read = Checkpoint(tmp_path)
    assert read.path == path
    assert read.state["step"] == 3
    assert torch.equal(read.tensors("model")["w"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(read.weights()["w"], torch.ones(2, 3))
    assert torch.equal(read.weights()["b"], torch.zeros(2))
    assert read.tensors("optimizer") == {}


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 9):
        _write(tmp_path, step)
    assert [p.name for p in checkpoint.complete_steps(tmp_path)] == ["step-00000009", "step-00000010"]
    assert newest(tmp_path).name == "step-00000010"


def test_keeps_what_else_is_asked_for(tmp_path):
    for step in range(1, 11):
        _write(tmp_path, step, keep=10)
        checkpoint.add_scores(tmp_path, step, {"eval/miou": {2: 9.0, 3: 11.0}.get(step, 1.0), "eval/iou": float("nan")})
    checkpoint.prune(tmp_path, 1, every=5, best="eval/miou", busy=[tmp_path / "step-00000007"])
    assert [int(p.name[5:]) for p in checkpoint.complete_steps(tmp_path)] == [3, 5, 7, 10]
    checkpoint.prune(tmp_path, 1)
    assert [int(p.name[5:]) for p in checkpoint.complete_steps(tmp_path)] == [10]


def test_a_copy_at_a_url_is_complete_or_not_there(tmp_path):
    url, other = f"file://{tmp_path}/store/run", tmp_path / "other"
    assert checkpoint.latest_remote(url) is None
    path = _write(tmp_path / "here", 4)
    checkpoint.upload(path, url)
    assert checkpoint.latest_remote(url) == 4
    got = checkpoint.download(url, 4, other)
    assert torch.equal(Checkpoint(got).tensors("model")["w"], torch.arange(6.0).reshape(2, 3))
    damaged = tmp_path / "store/run/step-00000004/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        checkpoint.download(url, 4, tmp_path / "third")
    damaged.unlink()
    with pytest.raises(ValueError, match="incomplete"):
        checkpoint.download(url, 4, tmp_path / "third")
    assert not list((tmp_path / "third").iterdir()), "nothing half is left"


def test_nodes_that_share_a_disk_may_download_at_once(tmp_path, monkeypatch):
    """In containers, which all have the same process number."""
    checkpoint.upload(_write(tmp_path / "here", 4), f"{tmp_path}/store")
    node, read = ["one"], checkpoint.Checkpoint
    monkeypatch.setattr("socket.gethostname", lambda: node[0])

    def while_the_first_verifies(path, **options):
        if node == ["one"]:
            node[0] = "two"
            checkpoint.download(f"{tmp_path}/store", 4, tmp_path / "shared")
        return read(path, **options)

    monkeypatch.setattr(checkpoint, "Checkpoint", while_the_first_verifies)
    got = checkpoint.download(f"{tmp_path}/store", 4, tmp_path / "shared")
    assert read(got).tensors("model")["w"].shape == (2, 3)
    assert [p.name for p in (tmp_path / "shared").iterdir()] == [got.name]


def test_a_store_that_fails_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "store").write_text("a file where a folder should be")
    uploader = checkpoint.Uploader(f"file://{tmp_path}/store/run")
    uploader.add(_write(tmp_path / "here", 1))
    assert not uploader.close(0.1)
    assert uploader.busy, "it is not removed here"
    assert "was not uploaded" in capsys.readouterr().err


def test_an_upload_that_failed_is_made_up_for_in_the_same_run(tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.write_text("a file where a folder should be")
    monkeypatch.setattr(checkpoint.Uploader, "AGAIN", 0.01)
    uploader = checkpoint.Uploader(f"file://{store}/run")
    uploader.add(_write(tmp_path / "here", 1))
    uploader.add(_write(tmp_path / "here", 2))
    while not uploader.failed:
        time.sleep(0.001)
    store.unlink()
    assert uploader.close(30)
    assert sorted(p.name for p in (store / "run").iterdir()) == ["latest.json", "step-00000001", "step-00000002"]
    assert checkpoint.latest_remote(f"file://{store}/run") == 2


def test_a_store_that_never_takes_anything_does_not_fill_the_disk(tmp_path, monkeypatch, capsys):
    (tmp_path / "store").write_text("a file where a folder should be")
    monkeypatch.setattr(checkpoint.Uploader, "MOST", 2)
    uploader = checkpoint.Uploader(f"file://{tmp_path}/store/run")
    for step in (1, 2, 3):
        uploader.add(_write(tmp_path / "here", step, keep=3))
        while not uploader.failed:
            time.sleep(0.001)
    assert [p.name for p in uploader.busy] == ["step-00000002", "step-00000003"]
    assert "step-00000001 will not be uploaded" in capsys.readouterr().err
    uploader.close(0.1)


def test_an_uploader_that_ends_says_so_and_what_waits_stays(tmp_path, capsys, monkeypatch):
    def broken(path, url):
        raise SystemExit("a client library that ends its thread")

    monkeypatch.setattr(checkpoint, "upload", broken)
    uploader = checkpoint.Uploader(f"file://{tmp_path}/store")
    uploader.add(_write(tmp_path / "here", 1))
    assert not uploader.close(30)
    assert "nothing more is uploaded" in capsys.readouterr().err
    assert uploader.busy


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_damage_is_named(tmp_path, harm):
    file = _write(tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "truncate":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_killed_while_saving_is_as_if_not_saved(tmp_path, monkeypatch):
    _write(tmp_path, 1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        _write(tmp_path, 2)
    assert newest(tmp_path).name == "step-00000001"
    monkeypatch.undo()
    _write(tmp_path, 2)
    assert newest(tmp_path).name == "step-00000002"


def _harm(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [_harm, lambda path: (path / "COMPLETE.json").write_bytes(b"")])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, harm):
    for step in (1, 2, 3):
        _write(tmp_path, step, keep=3)
    harm(tmp_path / "step-00000003")
    assert Checkpoint(tmp_path).state["step"] == 2
    said = capsys.readouterr().err
    assert said.startswith("WARNING: ")
    assert "taking step-00000002" in said
    with pytest.raises(ValueError, match="damaged"):
        read_weights(tmp_path)
    saved, uploaded = resume.newest(tmp_path, "", ALONE)
    assert (saved.state["step"], uploaded) == (2, -1)
    assert "step-00000003" in capsys.readouterr().err
    assert [p.name for p in checkpoint.complete_steps(tmp_path)] == ["step-00000001", "step-00000002"]
    assert (tmp_path / "damaged-step-00000003").is_dir()


def test_a_damaged_checkpoint_comes_back_from_where_it_was_uploaded(tmp_path):
    url = f"file://{tmp_path}/store"
    for step in (1, 2):
        checkpoint.upload(_write(tmp_path / "here", step), url)
    _harm(tmp_path / "here/step-00000002")
    assert checkpoint.remote_steps(url) == [1, 2]
    saved, uploaded = resume.newest(tmp_path / "here", url, ALONE)
    assert (saved.state["step"], uploaded) == (2, 2)
    # And if that is gone as well, on a fresh disk.
    _harm(tmp_path / "store/step-00000002")
    assert resume.newest(tmp_path / "other", url, ALONE)[0].state["step"] == 1


def test_ranks_that_do_not_save_copy_nothing():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    ema = {name: t.detach().clone() for name, t in float_state(module)}
    main, other = World(0, 2, torch.device("cpu")), World(1, 2, torch.device("cpu"))
    with mock.patch.object(torch.Tensor, "to", side_effect=AssertionError("copied")):
        assert module_state(module, other) == {}
        assert full_state(module, ema, other) == {}
    state = module_state(module, main)
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[k], v) and state[k].data_ptr() != v.data_ptr() for k, v in module.state_dict().items())
    assert full_state(module, ema, main).keys() == ema.keys()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    for step in (1, 2):
        _harm(_write(tmp_path, step))
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            resume.newest(tmp_path, "", ALONE)
    assert resume.newest(tmp_path / "nothing", "", ALONE) == (None, -1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_complete(tmp_path, value):
    _write(tmp_path, 1)
    tensors = {"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.tensor([1.0, value])}}
    with pytest.raises(FloatingPointError, match=r"1 tensors of optimizer hold NaN or infinity \(m\)"):
        checkpoint.save(tmp_path, 2, tensors, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_files_and_folders_are_on_the_disk_before_a_checkpoint_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    path = _write(tmp_path, 1)
    partial = tmp_path / ".partial-00000001"
    names = ["ema.safetensors", "model.safetensors", "state.json", "COMPLETE.json"]
    assert synced == [*(str(partial / name) for name in names), str(partial), str(tmp_path)]
    assert path.is_dir()


def test_files_follow_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = _write(tmp_path / "run", 1)
            checkpoint.add_scores(tmp_path / "run", 1, {"a": 1.0})
            out = export(path, tmp_path / "out" / "weights.safetensors")
            checkpoint.upload(path, f"file://{tmp_path}/store")
        finally:
            os.umask(before)
        written = [p for folder in ("run", "store", "out") for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert out in written
        assert {p.stat().st_mode & 0o777 for p in written} == {mode}, mask
        shutil.rmtree(tmp_path / "store")
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "run")


def test_an_incomplete_folder_is_no_checkpoint(tmp_path):
    (_write(tmp_path) / "COMPLETE.json").unlink()
    assert newest(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        Checkpoint(tmp_path)


def test_other_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, {}, {"step": 1, "format": 99})
    with pytest.raises(ValueError, match="format 99"):
        Checkpoint(path)


def test_weights_from_files(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.full((2,), 2.0)}, tmp_path / "b.pt")
    assert read_weights(tmp_path / "a.safetensors")["w"].sum() == 2
    assert read_weights(tmp_path / "b.pt")["w"].sum() == 4
    (tmp_path / "c.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        read_weights(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="no such checkpoint"):
        read_weights(tmp_path / "d.safetensors")


def test_pickles_with_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"x": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="refused"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_transfer_is_all_or_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = ["0.weight", "0.bias"]
    good = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4), "unrelated": torch.ones(1)}
    for bad, reason in [
        ({"0.weight": torch.ones(4, 3)}, r"1 of 2 declared tensors are missing \(0\.bias\)"),
        ({**good, "0.bias": torch.ones(5)}, r"0\.bias \(5,\) instead of \(4,\)"),
        (good, r"1 tensors that this model neither uses nor drops on purpose \(unrelated\)"),
    ]:
        with pytest.raises(ValueError, match=reason):
            load_declared(model, bad, expected, origin="here")
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert load_declared(model, good, expected, origin="here", dropped=("unr",)) == ["1.weight", "1.bias"]
    assert torch.equal(model[0].weight, torch.ones(4, 3))
    assert torch.equal(model[1].weight, before["1.weight"])


def test_complete_lists_every_file(tmp_path):
    path = _write(tmp_path)
    listed = json.loads((path / "COMPLETE.json").read_text())["files"]
    assert set(listed) == {p.name for p in path.iterdir()} - {"COMPLETE.json"}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", ".hidden", "", "a\n"])
def test_a_checkpoint_names_no_file_outside_its_folder(tmp_path, name):
    path = _write(tmp_path / "run")
    listed = json.loads((path / checkpoint.COMPLETE).read_text())
    listed["files"][name] = {"size": 0, "sha256": "a" * 64}
    (path / checkpoint.COMPLETE).write_text(json.dumps(listed))
    with pytest.raises(checkpoint.Damaged, match="not what was written"):
        Checkpoint(path)
    with pytest.raises(checkpoint.Damaged, match="not what was written"):
        checkpoint.upload(path, str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    shutil.copytree(path, tmp_path / "store" / path.name)
    with pytest.raises(checkpoint.Damaged, match="not what was written"):
        checkpoint.download(str(tmp_path / "store"), 3, tmp_path / "got")


@pytest.mark.parametrize(
    "state",
    [
        [],
        None,
        {"step": -1},
        {"step": 1e9},
        {"step": "3"},
        {"config": []},
        {"cameras": [1]},
        {"sensors": [1]},
        {"cameras": -1},
        {"cameras": None},
        {"data": 5},
        {"ema_updates": True},
    ],
)
def test_a_state_of_other_types_is_damaged(tmp_path, state):
    path = _write(tmp_path)
    text = json.dumps({"format": 1, **state} if isinstance(state, dict) else state).encode()
    (path / "state.json").write_bytes(text)
    listed = json.loads((path / checkpoint.COMPLETE).read_text())
    listed["files"]["state.json"] = {"size": len(text), "sha256": checkpoint.sha256(path / "state.json")}
    (path / checkpoint.COMPLETE).write_text(json.dumps(listed))
    with pytest.raises(checkpoint.Damaged, match=r"state\.json: .* not what was written"):
        Checkpoint(path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"checkpoint": "../x"}', b'{"checkpoint": 5}', b"\xff"])
def test_what_names_the_newest_upload_is_checked(tmp_path, content):
    (tmp_path / checkpoint.LATEST).write_bytes(content)
    with pytest.raises(checkpoint.Damaged, match="does not name a checkpoint"):
        checkpoint.latest_remote(str(tmp_path))


@pytest.mark.parametrize(
    "state",
    [None, [], {}, {"epoch": 0}, {"epoch": -1, "offset": 0, "batches": 0}, {"epoch": 0, "offset": 1e9, "batches": 0}],
)
def test_a_position_in_the_data_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match="position of the main stream"):
        _position(state, "main")
    assert _position({"epoch": 1, "offset": 2, "batches": 3}, "main") == {"epoch": 1, "offset": 2, "batches": 3}
