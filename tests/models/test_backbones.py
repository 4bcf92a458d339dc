"""Pretrained backbones."""

import ast
import time
from concurrent.futures import ThreadPoolExecutor

from occstream.models import backbones


def test_one_of_several_processes_asks_the_hub_for_weights(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    file, asked = tmp_path / "model.safetensors", []

    def download(name, filename, local_files_only=False):
        if local_files_only:
            if not file.exists():
                raise LocalEntryNotFoundError("not in the cache")
        else:
            asked.append(name)
            time.sleep(0.05)
            file.touch()
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(backbones._from_hub, ["microsoft/resnet-50"] * 8))
    assert paths == [file] * 8
    assert asked == ["microsoft/resnet-50"]


def test_only_who_builds_a_network_waits_for_transformers(repo_root):
    """Reading a recipe imports the models for their settings."""
    for folder in ("models", "evaluation", "pretrain", "launch"):
        for path in (repo_root / folder).rglob("*.py"):
            lines = [
                ast.unparse(n) for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))
            ]
            assert not [line for line in lines if "transformers" in line], path
