"""A dry run says what a run will be and refuses what cannot work."""

import pytest
from torch import nn

from occstream.launch.dryrun import activations, states, statistics
from occstream.launch.run import main
from occstream.models.layers import conv_bn
from occstream.pretrain.config import load_config
from tests.pretrain.small import RECIPE, pack_small


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("dry") / "data")
    pack_small(url)
    return url


def test_it_says_batch_length_data_memory_and_time(data, capsys):
    words = ["--recipe", RECIPE, f"data.url={data}", f"replay.url={data}", "data.scenes=2", "train.batch=8"]
    options = ["--dry-run", "--world-size", "4", "--rate", "10", "--price", "2"]
    assert main("finetune", [*words, *options]) == 0
    said = capsys.readouterr().out
    assert "8 labeled frames a step in 1 micro-steps: 2 per process, plus 8 replayed" in said
    assert "20 steps, 320 frames" in said
    assert "replay     4 scenes" in said
    assert "at other stages: stage 1" in said
    assert "0.01 h, 0.0 GPU-hours at 10 frames/s" in said or "0.00 h" in said


def test_it_refuses_what_cannot_start_or_fit(data, capsys):
    words = ["--recipe", RECIPE, f"data.url={data}"]
    assert main("pretrain", [*words, "--dry-run", "--memory-gb", "0.001"]) == 2
    assert "change train.accumulate" in capsys.readouterr().err
    assert main("pretrain", [*words, "--dry-run", "--world-size", "64"]) == 2
    assert "raise train.batch to at least 64" in capsys.readouterr().err
    assert main("pretrain", [*words, "--dry-run", "optim.groups.image=0.1"]) == 2
    assert "optim.groups names 'image'" in capsys.readouterr().err


def test_states_are_divided_as_zero_says():
    size = 1000
    whole = states(size, 0, 8, True)
    assert sum(whole.values()) == 4 * size * (1 + 1 + 2 + 1)
    third = states(size, 3, 8, True)
    assert third["weights"] == third["gradients"] == third["average"] == 4 * size / 8
    assert states(size, 1, 8, True)["gradients"] == 4 * size
    assert states(size, 2, 8, True)["optimizer"] == 8 * size / 8
    buckets = [states(size, stage, 8, True)["buckets"] for stage in range(4)]
    assert buckets == [0, 4e8 + 4 * size / 8, 4e8 + 4 * size / 8, 2e8 + 4 * size / 8]


@pytest.mark.slow
def test_activations_grow_with_frames_and_shrink_with_checkpointing():
    config = load_config(RECIPE, ["model.dropout=0.0"], stage="pretrain")
    two, four = activations(config, 0, 2), activations(config, 0, 4)
    assert 1.5 * two < four < 2.2 * two
    lean = load_config(RECIPE, ["model.dropout=0.0", "model.checkpointing=true"], stage="pretrain")
    assert activations(lean, 0, 4) < four


def test_statistics_of_batch_norms_are_counted_over_ranks():
    net = nn.Sequential(conv_bn(2, 3, 8), conv_bn(2, 8, 4))
    assert statistics(net, 1) == 0
    assert statistics(net, 10) == 4 * (2 * 10 * 17 + 3 * 8 + 10 + 3 * 4 + 10)
