"""Streams of a task that balances classes: rare ones come more often, whatever the number of ranks, and it says so."""

import pytest
import torch

from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import TrainData
from occstream.pretrain.tasks.b2s import B2STask
from occstream.sharding.frameclasses import FrameClasses, table_name
from occstream.sharding.manifest import Manifest
from tests.pretrain.small import RECIPE, pack_small


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = tmp_path_factory.mktemp("balancing") / "data"
    pack_small(str(url))
    return url


def opened(data, rank=0, world=1):
    overrides = [f"data.url={data}", "data.holdout=0", "train.batch=4", "train.threads=0"]
    return TrainData(load_config(RECIPE, overrides, stage="finetune"), World(rank, world, torch.device("cpu")))


def first_pass(data, monkeypatch, wanted):
    """Keys of one pass by two ranks of one stream, and the lines it prints."""
    monkeypatch.setattr(B2STask, "balance", lambda self, source: wanted)
    # A world of two ranks in one process: what they take is agreed on by nobody.
    monkeypatch.setattr(World, "agree", lambda self, error, stop=False: _raise(error))
    ranks, keys, states = [opened(data, rank, 2) for rank in range(2)], [], []
    size = ranks[0].epoch_samples
    for _ in range(-(-size // 4)):
        keys += [key for stream in ranks for key in stream.next().keys]
        states += [stream.state_dict() for stream in ranks]
        assert states[-1] == states[-2]
    later = opened(data)
    later.load_state_dict(states[1])
    assert list(later.next().keys) == keys[4:8]
    assert 0 < ranks[0].epoch_position <= 2
    for stream in (*ranks, later):
        stream.close()
    return keys[:size], ranks[0].notes


def _raise(error):
    if error:
        raise error
    return False


def test_frames_of_rare_classes_come_more_often(data, monkeypatch):
    table = FrameClasses.load(Manifest.load(str(data)))
    counts, frames = table.counts(), Manifest.load(str(data)).num_frames
    rare = min((n for n in counts if counts[n] < frames), key=lambda n: (counts[n], n))
    plain, notes = first_pass(data, monkeypatch, None)
    assert len(plain) == len(set(plain)) == frames
    assert not any("rare" in note for note in notes)
    keys, notes = first_pass(data, monkeypatch, ("car", rare))
    assert len(keys) > frames
    assert set(keys) == set(plain)
    [note] = [note for note in notes if "rare" in note]
    assert note.startswith(
        f"data: {frames} frames hold car {counts['car']}, {rare} {counts[rare]}; those of rare classes"
    )
    assert "\n" not in note


def test_what_is_missing_is_said_in_one_line(data, monkeypatch):
    monkeypatch.setattr(B2STask, "balance", lambda self, source: ("tram",))
    with pytest.raises(ValueError, match="none of its frames holds any of tram, so they cannot be balanced; switch"):
        opened(data)
    path = data / table_name("labels")
    path.rename(path.with_suffix(".gone"))
    with pytest.raises(ValueError, match="no table of the classes of each frame there; run `occstream classes"):
        opened(data)
    path.with_suffix(".gone").rename(path)
