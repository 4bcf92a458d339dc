"""YAML of other people: errors say where, nothing is dropped silently, nothing grows without end."""

import pytest

from occstream.launch.study import load_study
from occstream.pretrain.config import parse_overrides, read_recipe
from occstream.pretrain.yamlfile import NotYaml, read_yaml


def test_plain_values_come_out():
    assert read_yaml("a: {b: [1, 2.5, x], c: null}\nd: &x {e: 1}\nf: *x\n", "w") == {
        "a": {"b": [1, 2.5, "x"], "c": None}, "d": {"e": 1}, "f": {"e": 1},
    }  # fmt: skip
    assert read_yaml("", "w") is None
    assert read_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}", "w")["c"] == {"b": 1, "d": 2}


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{k{i}: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n\tlr: 1\n", "line 2, column 1: a tab cannot indent"),
        ("a: [1\nb: 2", "line 2, column 2"),
        ("a: 'x", "line 1"),
        ("a: b: c", "line 1, column 5"),
        ("a: \x00", "character 4"),
        ("a: *x", "line 1, column 4: found undefined alias"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [1, 2]\n: x", "unhashable key"),
    ],
)
def test_syntax_is_named_by_line_and_column(text, message):
    with pytest.raises(NotYaml, match=f"recipe r.yaml is not valid YAML: .*{message}") as caught:
        read_yaml(text, "recipe r.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {lr: 1}\ndata: {}\ntrain: {lr: 2}\n", r"w has 'train' twice \(line 3\)"),
        ("a:\n  b: 1\n  b: 1\n", r"w has 'b' twice \(line 3\)"),
        (LAUGHS, "w: its aliases expand to more than"),
        (MERGES, "w: its aliases expand to more than"),
        ("a: &a [*a]", r"w: an alias refers to a value that contains it \(line 1\)"),
        ("[" * 60 + "]" * 60, "more than 50 deep"),
        ("[" * 5000, "more than 50 deep|not valid YAML"),
        ("a: 2020-13-45", "w: a value is not valid"),
        ("a: " + "9" * 5000, "w: a value is not valid"),
        ("x" * 2_000_000, "w has 2000000 characters"),
    ],
)
def test_what_would_be_dropped_or_grow_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_yaml(text, "w")


def test_recipes_and_settings_are_read_by_it(tmp_path):
    (tmp_path / "dup.yaml").write_text("base: demo\ntrain: {lr: 1}\ntrain: {warmup: 5}\n")
    with pytest.raises(ValueError, match=r"recipe .*dup\.yaml has 'train' twice \(line 3\)"):
        read_recipe(str(tmp_path / "dup.yaml"))
    (tmp_path / "circle.yaml").write_text("base: circle.yaml\n")
    with pytest.raises(ValueError, match="its bases form a cycle"):
        read_recipe(str(tmp_path / "circle.yaml"))
    (tmp_path / "odd.yaml").write_text("base: [1]\n")
    with pytest.raises(ValueError, match="not the name of a recipe"):
        read_recipe(str(tmp_path / "odd.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.yaml: is not text"):
        read_recipe(str(tmp_path / "bytes.yaml"))
    with pytest.raises(ValueError, match="'a' twice"):
        parse_overrides(["train={a: 1, a: 2}"])
    assert parse_overrides(["data.url=[x"]) == {"data": {"url": "[x"}}


def test_a_newline_in_a_name_or_folder_of_a_study_reaches_no_job_file(tmp_path):
    for field, value in (
        ("name", "a\n#SBATCH --uid=0"),
        ("output", "runs/a\n#SBATCH --uid=0"),
        ("output", "a\r\x1b[2J"),
    ):
        with pytest.raises(ValueError, match=field):
            load_study("sweep-demo", {field: value})
