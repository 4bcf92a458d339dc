"""Every task goes through all that the training loop and the commands do; one is of somebody else, in a file of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from occstream.launch import cli, run
from occstream.launch.bench_step import bench_step
from occstream.launch.dryrun import dry_run
from occstream.launch.grid import plan
from occstream.launch.predict import predict_checkpoint
from occstream.launch.study import load_study
from occstream.pretrain import distributed, trained, trainer
from occstream.pretrain.config import load_config
from occstream.pretrain.distributed import World
from occstream.pretrain.streams import TrainData
from occstream.pretrain.tasks.registry import PACKAGED, get_task, import_modules, task_names, task_of
from occstream.pretrain.terms import combine, joint_counts
from occstream.sharding.check import verify
from occstream.sharding.grid import get_grid
from occstream.sharding.manifest import Manifest
from occstream.sharding.pack import pack
from occstream.sharding.sources import open_source, source_options
from occstream.sharding.stream import ShardReader
from tests.evaluation.drives import predictions
from tests.forked import Forked
from tests.launch.test_sweep import FORKING
from tests.pretrain.inprocess import world  # noqa: F401  a fixture
from tests.pretrain.small import HERE, RECIPE, environment, losses, run_jobs

TOY = str(HERE / "toy_task.py")
OTHERS = {name: str(HERE / f"small-{name}.yaml") for name in ("occfiner", "panoocc", "spot")}
RECIPES = {"b2s": RECIPE, "toy": str(HERE / "toy.yaml"), **OTHERS}
SAME = ("train.batch=4", "train.steps=4", "train.save_every=2", "train.keep=9", "train.seed=3")


@pytest.fixture(scope="module", autouse=True)
def the_toy():
    import_modules([TOY])


def first_and_last(name: str) -> tuple[str, str]:
    """Stages of a task: the one that it begins with, and the last one that starts from it; the same where it has one."""
    stages = list(get_task(name).stages)
    return stages[0], stages[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    url = str(tmp_path_factory.mktemp("tasks") / "data")
    options = {"scenes": 5, "frames": 3, "image_size": (32, 88), "grid": "tiny"}
    pack(open_source("synthetic", options), url, groups=("cameras", "lidar", "labels"), grid=get_grid("tiny"))
    predictions(url, "pseudo-noise")  # what a refiner refines
    return url


@pytest.fixture(scope="module", params=sorted(RECIPES))
def runs(request, data, world, tmp_path_factory):  # noqa: F811
    """A task, its pre-training, and fine-tuning that starts from it and replays where the task does."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe, words = RECIPES[request.param], [f"data.url={data}", *SAME]
    first, last = first_and_last(request.param)
    pre = trainer.train(load_config(recipe, [*words, f"output={folder}/pre"], stage=first), world)
    more = [f"output={folder}/fine", f"train.init={folder}/pre", f"replay.url={data}"]
    fine = trainer.train(load_config(recipe, [*words, *more], stage=last), world)
    return request.param, folder, pre, fine


def test_every_registered_task_is_tested():
    assert {*PACKAGED, "toy"} == set(RECIPES)


def test_every_recipe_trains_and_has_the_scores_of_its_headline(runs):
    name, folder, pre, fine = runs
    task = get_task(name)
    for result, stage in ((pre, "pre"), (fine, "fine")):
        assert (result.steps, result.samples) == (4, 16)
        assert all(values["train/loss"] > 0 for values in losses(folder / stage).values())
    scored = [word for score, word in task.headline.items() if score in fine.evaluation.metrics()]
    assert {f"eval/{score}" for score in fine.evaluation.headline} <= set(task.headline)
    assert len(scored) >= 2
    assert all(word in fine.evaluation.summary() for word in scored)
    assert set(fine.terms) & {f"train/{term}" for term in task.terms[:2]}


@pytest.mark.parametrize("stage", ["pre", "fine"])
def test_a_run_that_was_killed_continues_as_if_it_had_not_been(runs, data, world, tmp_path, stage):  # noqa: F811
    name, folder, *_ = runs
    shutil.copytree(folder / stage, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    more = [f"train.init={folder}/pre", f"replay.url={data}"] if stage == "fine" else []
    words = [f"data.url={data}", *SAME, *more, f"output={tmp_path}/run"]
    trainer.train(load_config(RECIPES[name], words, stage=first_and_last(name)[stage == "fine"]), world)
    again, before = losses(tmp_path / "run"), losses(folder / stage)
    assert {step: again[step] for step in (3, 4)} == {step: before[step] for step in (3, 4)}


@pytest.mark.process
def test_other_numbers_of_processes_give_the_same_run(runs, data, tmp_path):
    name, folder, *_ = runs
    shutil.copytree(folder / "fine", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    words = [f"data.url={data}", *SAME, f"output={tmp_path}/run", f"train.init={folder}/pre", f"replay.url={data}"]
    stage = first_and_last(name)[1]
    job = {"recipe": RECIPES[name], "stage": stage, "overrides": [*words, "train.zero_stage=3"], "import": [TOY]}
    run_jobs([job], 2, tmp_path / "log")
    again, before = losses(tmp_path / "run"), losses(folder / "fine")
    for step in (3, 4):
        assert again[step]["train/loss"] == pytest.approx(before[step]["train/loss"], rel=2e-3)


def test_a_checkpoint_is_evaluated_and_predicts(runs, data):
    name, folder, _, fine = runs
    pictures = folder / "pictures" if name == "spot" else None
    alone = trained.evaluate_checkpoint(folder / "fine", picture=pictures)
    if pictures:  # a network that reads no camera is shown in them all the same, below the picture from above
        wide, high = Image.open(next(path for path in pictures.iterdir() if "points" not in path.name)).size
        assert high > 1.3 * wide
    assert alone.metrics() == pytest.approx(fine.evaluation.metrics(), nan_ok=True)
    run = folder / ("pre" if name == "spot" else "fine")  # what predicts voxels
    done = predict_checkpoint(run, data, f"pseudo-{name}")
    assert done.frames == 15
    assert verify(data, group=f"pseudo-{name}") == []
    alone = ShardReader(done.manifest, (f"pseudo-{name}",)).frame(0, 1).labels
    frame = ShardReader(Manifest.load(data).with_label_sets([f"pseudo-{name}"]), ("labels", f"pseudo-{name}")).frame(
        0, 1
    )
    assert set(frame.label_sets) == {"labels", f"pseudo-{name}"}
    assert frame.labels is frame.label_sets["labels"]
    assert (frame.label_sets[f"pseudo-{name}"].semantic == alone.semantic).all()
    assert (frame.labels.semantic != alone.semantic).any()


def test_dry_run_and_bench_know_it(runs, data, capsys):
    name, folder, *_ = runs
    words = [f"data.url={data}", f"output={folder}/x", f"replay.url={data}", *SAME]
    stage = first_and_last(name)[1]
    task = task_of(load_config(RECIPES[name], words, stage=stage))
    assert dry_run(stage, RECIPES[name], words, ranks=2, memory_gb=0, rate=0, price=0) == 0
    out = capsys.readouterr().out
    assert task.title in out
    assert ("plus 4 replayed" in out) == task.replays
    found = bench_step(RECIPES[name], tuple(words), stage, batch=2, repeats=1)
    assert found["builds"]["plain fp32"]["step"] > 0
    assert set(found["parts"]) & set(found["builds"]["plain fp32"])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_sweep_plans_its_runs(name, data, tmp_path):
    first, last = first_and_last(name)
    with_replay = f"""
pretrain: {{recipe: {RECIPES[name]}, scenes: [0, 3]}}
finetune: {{recipe: {RECIPES[name]}, scenes: [2]}}
replay: {{url: {data}, holdout: 1}}
strategies: {{S+B: {{replay: true}}}}
"""
    without = f"""
stages: [{{stage: {first}, recipe: {RECIPES[name]}}}, {{stage: {last}, recipe: {RECIPES[name]}}}]
axes: {{start: {{scratch: {{{first}: null}}, pretrained: {{}}}}}}
"""
    single = f"""
stages: [{{stage: {first}, recipe: {RECIPES[name]}}}]
axes: {{rate: {{low: {{{first}: {{optim: {{lr: 0.0001}}}}}}, high: {{{first}: {{optim: {{lr: 0.01}}}}}}, default: {{}}}}}}
"""
    study = tmp_path / "study.yaml"
    study.write_text(f"""
name: {name}-study
output: {tmp_path}/runs
uri: sqlite:///{tmp_path}/mlflow.db
set: {{data: {{url: {data}, holdout: 1}}, train: {{batch: 2, steps: null, epochs: 1}}}}
seeds: [0, 1]
{single if first == last else without if name == "spot" else with_replay}
""")
    runs = plan(load_study(str(study)))
    assert len(runs) == 6
    assert {run.config.task for run in runs} == {name}
    assert {run.config.stage for run in runs} == {first, last}


@pytest.mark.process
def test_a_sweep_of_somebody_elses_task_runs(data, tmp_path):
    """The smallest: pre-training, and fine-tuning from it."""
    study, script = tmp_path / "study.yaml", tmp_path / "sweep.py"
    study.write_text(f"""
name: small
output: {tmp_path}/runs
set: {{data: {{url: {data}, holdout: 1}}, train: {{batch: 2, steps: 1}}}}
stages: [{{stage: pretrain, recipe: {RECIPES["toy"]}}}, {{stage: finetune, recipe: {RECIPES["toy"]}}}]
axes: {{start: {{pretrained: {{}}}}}}
seeds: [0]
""")
    script.write_text(FORKING)
    words = [script, "sweep", study, "--jobs", "1", "--import", TOY]
    done = Forked(words, environment(), tmp_path / "log", parent=True)
    said, _ = done.communicate(200)
    assert done.returncode == 0, said
    assert "all 2 runs are done" in said
    assert "mean ± sample standard deviation over seeds" in said
    assert "| pretrained | 0 |" in (tmp_path / "runs/report/comparison.md").read_text()
    for stage in ("pretrain", "finetune"):
        assert sorted(losses(tmp_path / f"runs/{stage}-pretrained-s0")) == [1]


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("last", [False, True])
def test_sums_over_frames_are_sums_over_batches(name, last):
    """Loss of two batches by joint counts is that of one batch of both, for what does not look at its neighbors."""
    task = task_of(load_config(RECIPES[name], [], stage=first_and_last(name)[last]))
    torch.manual_seed(0)
    model = task.model().eval()
    batch = task.synthetic_batch(3 if task.labeled else 0, 0 if task.labeled else 3)
    parts = [batch.select(slice(0, 1)), batch.select(slice(1, 3))]
    outputs, each = model(batch), [model(part) for part in parts]
    whole, _ = combine(task.sums(outputs, batch), joint_counts([task.counts(outputs, batch)]), task.weights)
    counts = joint_counts([task.counts(o, part) for o, part in zip(each, parts)])
    mean = sum(combine(task.sums(o, part), counts, task.weights)[0] for o, part in zip(each, parts)) / 2
    torch.testing.assert_close(mean, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_parameter_is_left_without_a_gradient(name):
    """ZeRO relies on it: also for a rank that has no labeled frame."""
    task = task_of(load_config(RECIPES[name], [], stage=first_and_last(name)[1]))
    for labeled in (2, 0):
        model = task.model().train()
        batch = task.synthetic_batch(labeled, 2 - labeled)
        task.loss(model(batch), batch)[0].backward()
        assert not [key for key, p in model.named_parameters() if p.grad is None]


def command(*words: str) -> int:
    with contextlib.suppress(SystemExit):
        return run.main("", ["--recipe", *words])
    return 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "task=b3s"], "unknown task 'b3s'; did you mean 'b2s'?"),
        (["tiny", "task=toy"], "task toy has no model_name, "),
        ([RECIPES["toy"], "stage=refine"], "task toy has no stage 'refine'; it has: pretrain, finetune"),
        ([RECIPES["toy"], "loss.binary_weight=2"], "unknown key 'loss.binary_weight'"),
        (["tiny", "--import", "no_such_module"], "--import no_such_module: ModuleNotFoundError"),
    ],
)
def test_wrong_uses_are_one_line_each(words, said, capsys):
    assert command(*words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("words", "stage"), [((), "pretrain"), (("stage=finetune",), "finetune")])
def test_the_stage_that_a_recipe_runs_is_printed(words, stage, monkeypatch, capsys):
    def stop(*_):
        raise ValueError("far enough")

    monkeypatch.setattr(distributed, "init_distributed", stop)
    assert command(RECIPES["toy"], *words) == 2
    assert capsys.readouterr().out == f"task toy, stage {stage}\n"


def test_a_missing_group_is_named(tmp_path):
    options = {"scenes": 2, "frames": 2, "image_size": (32, 88), "grid": "tiny", "lidar": False}
    pack(open_source("synthetic", options), str(tmp_path), groups=("cameras", "labels"), grid=get_grid("tiny"))
    config = load_config(RECIPES["toy"], [f"data.url={tmp_path}"])
    with pytest.raises(ValueError, match="has no group 'lidar', only cameras, labels; pack it as well"):
        TrainData(config, World(0, 1, torch.device("cpu")))


@pytest.mark.process
def test_a_task_outside_the_repository_works_from_the_command_line(data, tmp_path, monkeypatch):
    """Copied elsewhere, as somebody's own file is."""
    theirs = tmp_path / "theirs.py"
    text = Path(TOY).read_text().replace('name = "toy"', 'name = "theirs"')
    theirs.write_text(text)
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(Path(RECIPES["toy"]).read_text().replace("task: toy", "task: theirs"))
    monkeypatch.setenv("OCCSTREAM_IMPORT", str(theirs))
    words = [f"data.url={data}", *SAME, f"output={tmp_path}/run"]
    job = {"recipe": str(recipe), "stage": "finetune", "overrides": words, "import": [str(theirs)]}
    run_jobs([job], 1, tmp_path / "log")
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4]
    assert cli.main(["evaluate", "--import", str(theirs), str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())["config"]["task"] == "theirs"


def test_installed_packages_bring_tasks_and_sources(tmp_path, monkeypatch, capsys):
    """By entry points, as pip writes them."""
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[occstream.tasks]\nbrought = their_package:Brought\n[occstream.sources]\nbrought = their_package:open_source\n"
    )
    text = Path(TOY).read_text().replace("@register\n", "").replace("class Toy(", "class Brought(")
    text = text.replace('name = "toy"', 'name = "brought"')
    text += """

def open_source(scenes: int = 1):
    from occstream.sharding.sources import open_source as known

    return known("synthetic", {"scenes": scenes, "frames": 2, "image_size": (32, 88), "grid": "tiny"})
"""
    (tmp_path / "their_package.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_task("brought").stages.keys() == {"pretrain", "finetune"}
    assert "brought" in task_names()
    assert list(source_options("brought")) == ["scenes"]
    assert len(open_source("brought", {"scenes": 3}).scene_names()) == 3
    with pytest.raises(ValueError, match="source 'brought' has no option 'scnes'; did you mean 'scenes'"):
        open_source("brought", {"scnes": 3})


def test_recipes_round_trip():
    for name, recipe in RECIPES.items():
        config = load_config(recipe, [], stage=first_and_last(name)[1])
        assert dataclasses.is_dataclass(config.model)
        assert config.to_dict()["task"] == name
