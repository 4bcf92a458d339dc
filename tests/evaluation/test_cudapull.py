"""The GPU's kernel of votes against the CPU's, through Triton's interpreter (on a GPU: infra/gpu_check.sh)."""

import dataclasses

import numpy as np
import pytest

from occstream.evaluation.bayes import Confusions, naive_bayes
from occstream.evaluation.cudapull import pull_into, usable
from occstream.evaluation.propagate import packed, pull, pull_maps
from occstream.evaluation.rules import Pulled
from occstream.evaluation.votes import VoteConfig, voting
from occstream.sharding.schema import IGNORE
from tests.evaluation.test_propagate import MIXED, SMALL, pose, some_confusions

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def drive():
    """Maps, sources and second classes of five frames on turned grids."""
    rng = np.random.default_rng(3)
    poses = [pose(*rng.uniform(-1.5, 1.5, 2), rng.uniform(-0.6, 0.6), rng.uniform(-70, 70)) for _ in range(5)]
    said = [rng.choice([0, 1, 2, 3, IGNORE], SMALL.shape, p=(0.2, 0.3, 0.2, 0.2, 0.1)).astype(np.uint8) for _ in poses]
    sources = np.stack([packed(v, rng.random(SMALL.shape) < 0.7) for v in said])
    second = rng.choice([0, 1, 2, IGNORE], sources.shape).astype(np.uint8)
    sure = rng.integers(0, 256, sources.shape).astype(np.uint8)
    return rng, pull_maps(SMALL, poses[2], SMALL, np.stack(poses)), sources, said[2], (second, sure)


def rules(rng):
    bayes = naive_bayes(some_confusions(rng, 4, 0.7), SMALL, MIXED)
    doubtful = naive_bayes(Confusions(rng.integers(0, 200, (9, 2, 4, 7)), 0.7), SMALL, MIXED)
    untrusting = dataclasses.replace(bayes, trusted=np.zeros(0, bool))
    for rule in (voting(VoteConfig(box=1.0), SMALL, MIXED), bayes, untrusting, doubtful):
        yield from (dataclasses.replace(rule, parked=parked) for parked in (False, True))


@pytest.mark.parametrize(("itself", "unsure"), [(-1, False), (2, True)])
def test_it_makes_the_bytes_of_the_cpu(drive, itself, unsure):
    rng, maps, certain, said, doubts = drive
    doubted = certain.copy()
    doubted[(certain & 127 == 3) & (rng.random(certain.shape) < 0.5)] += 2  # free, but in doubt
    before = said if itself >= 0 else np.full(SMALL.shape, IGNORE, np.uint8)
    index = np.argwhere(rng.random(SMALL.shape) < 0.9)
    wanted = np.zeros(SMALL.shape, bool)
    wanted[tuple(index.T)] = True
    slots, numbers = [3, 1, 4, 0, 2], [7, 2, 9, 0, 5]
    for rule in rules(rng):
        details = not rule.bayes
        sources = doubted if len(rule.things) > 4 else certain
        options = {"itself": itself, "numbers": numbers, "doubts": doubts if unsure else None}
        want = pull(rule, maps, sources, slots, before=before, wanted=wanted, details=details, device="cpu", **options)
        got = Pulled(before.copy())
        if details:
            zeros = np.zeros(SMALL.shape, np.int32)
            got = Pulled(before.copy(), zeros, zeros - 1, zeros.astype(np.uint8))
        pull_into(got, rule, maps, sources, slots=slots, index=index, device="cpu", **options)
        assert (want.semantic != before).any()
        for name in ("semantic", "frames", "last", "confidence")[: 4 if details else 1]:
            assert (getattr(want, name) == getattr(got, name)).all(), (name, rule.bayes, rule.parked)


def test_the_cpu_works_where_there_is_no_gpu(drive, monkeypatch):
    _, maps, sources, said, _ = drive
    rule = voting(VoteConfig(), SMALL, MIXED)
    if not usable():
        with pytest.raises(ValueError, match="there is no CUDA device here"):
            pull(rule, maps, sources, range(5), before=said, device="cuda")
    called = []
    monkeypatch.setattr("occstream.evaluation.propagate.GPU_FILES", ("/",))
    monkeypatch.setattr("occstream.evaluation.cudapull.usable", lambda: True)
    monkeypatch.setattr("occstream.evaluation.cudapull.pull_into", lambda *a, **k: called.append(k["index"]))
    pull(rule, maps, sources, range(5), before=said, device="cpu")
    assert not called
    pull(rule, maps, sources, range(5), before=said, begin=(1, 0, 0), end=(3, 7, 3))
    assert len(called[0]) == 2 * 7 * 3
    assert called[0].min(0).tolist() == [1, 0, 0]
    pull(rule, maps, sources, range(5), before=said, wanted=said == 0, begin=(1, 0, 0), end=(3, 7, 3))
    assert {tuple(place) for place in called[1]} == {p for p in zip(*np.nonzero(said == 0)) if 1 <= p[0] < 3}
