"""What ``train.precision=auto`` stands for: one of the two, on all ranks, said aloud and kept."""

import pytest
import torch

from occstream.pretrain import device, networks, trainer
from occstream.pretrain.config import parse_config
from occstream.pretrain.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def config(precision, output=""):
    return parse_config({"train": {"precision": precision}, "data": {"url": "x"}, "output": str(output)})


@pytest.mark.parametrize("able", [True, False])
def test_auto_is_bf16_where_the_device_computes_in_it(able, monkeypatch, capsys):
    monkeypatch.setattr(networks, "computes_bf16", lambda where: able)
    asked = config("auto")
    found = networks.settled(asked, ALONE)
    assert found.train.precision == ("bf16" if able else "fp32")
    why = "bf16, as this CPU computes in it" if able else "fp32, as this CPU has no instructions for bf16"
    assert capsys.readouterr().out == f"train.precision=auto: {why}\n"
    assert asked.train.precision == "auto", "the recipe stays what it is"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_asked_for_is_not_looked_at(precision, monkeypatch, capsys):
    monkeypatch.setattr(networks, "computes_bf16", lambda where: pytest.fail("nobody asked"))
    assert networks.settled(config(precision), ALONE).train.precision == precision
    assert capsys.readouterr().out == ""


def test_ranks_that_differ_compute_in_fp32(monkeypatch):
    monkeypatch.setattr(networks, "computes_bf16", lambda where: True)
    monkeypatch.setattr(networks.dist, "all_reduce", lambda able, op: able.zero_())
    assert networks.settled(config("auto"), World(0, 2, torch.device("cpu"))).train.precision == "fp32"


def test_training_and_checkpoints_see_what_it_stands_for(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "computes_bf16", lambda where: True)
    seen = []

    class Stopped(Exception):
        pass

    def begin(self, config, world):
        seen.append(config.train.precision)
        raise Stopped

    monkeypatch.setattr(trainer._Training, "__init__", begin)
    with pytest.raises(Stopped):
        trainer.train(config("auto", tmp_path / "run"), ALONE)
    assert seen == ["bf16"]


@pytest.mark.parametrize(("capability", "able"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_from_ampere_on(capability, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    assert device.computes_bf16(torch.device("cuda", 0)) == able


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_cpus_with_instructions_for_it(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert device.computes_bf16(torch.device("cpu")) == (avx512 or amx)
