"""Passwords and tokens reach nothing that is written; whoever puts one into a URI is told where it belongs."""

import pytest

from occstream.launch import cli
from occstream.pretrain.config import load_config, parse_config
from occstream.pretrain.events import VARIABLE
from occstream.sharding.secrets import redact, redacted

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://u:p@host/x", "https://***@host/x"),
        ("https://ghp_token@host/x", "https://***@host/x"),
        ("postgresql+psycopg2://u:p@host/db", "postgresql+psycopg2://***@host/db"),
        ("https://host/x?X-Amz-Signature=abc&part=1", "https://host/x?X-Amz-Signature=***&part=1"),
        ("failed: https://host/x?a=1&sig=abc (403)", "failed: https://host/x?a=1&sig=*** (403)"),
        ("https://host/x?access_token=abc#y", "https://host/x?access_token=***#y"),
        ("sqlite:///a.db", "sqlite:///a.db"),
        ("s3://b/k@2x?part=1", "s3://b/k@2x?part=1"),
        ("mail me at a@b", "mail me at a@b"),
    ],
)
def test_redact(uri, shown):
    assert redact(uri) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        (f"track.uri=https://me:{SECRET}@tracker", "MLFLOW_TRACKING_PASSWORD"),
        (f"track.uri=postgresql://me:{SECRET}@db/mlflow", "PGPASSWORD"),
        (f"train.upload=s3://key:{SECRET}@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        (f"data.url=https://store/data?token={SECRET}", "AWS credentials"),
        (f"replay.more=[{{url: 's3://key:{SECRET}@bucket/b'}}]", "AWS_SECRET_ACCESS_KEY"),
        (f"track.tags={{from: 'https://me:{SECRET}@git'}}", "track.tags"),
        (f"train.init=https://me:{SECRET}@host/w.safetensors", "train.init"),
    ],
)
def test_a_secret_in_a_setting_is_refused_with_the_way_to_give_it(setting, remedy):
    with pytest.raises(ValueError, match=r"contains a password or token") as caught:
        load_config("tiny", [setting])
    assert remedy in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_secret_in_the_environment_or_on_a_command_line_is_refused(monkeypatch, capsys, tmp_path):
    for command in (
        ["inspect", f"s3://key:{SECRET}@bucket/data"],
        ["compare", "--uri", f"http://me:{SECRET}@tracker"],
        ["shard", "synthetic", "scenes=1", "--grid", "tiny", "--out", f"s3://key:{SECRET}@bucket/data"],
    ):
        assert cli.main(command) == 2
    monkeypatch.setenv(VARIABLE, f"http://me:{SECRET}@tracker")
    with pytest.raises(ValueError, match=VARIABLE):
        load_config("tiny")
    said = "".join(capsys.readouterr())
    assert said.count("contains a password or token") == 3
    assert SECRET not in said


def test_a_config_from_before_loses_its_secrets_and_can_be_read():
    config = load_config("tiny").to_dict()
    config["train"]["upload"] = f"s3://key:{SECRET}@bucket/runs"
    assert SECRET not in str(parse_config(redacted(config)).to_dict())
