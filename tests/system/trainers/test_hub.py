"""`--push-to-hub`, with huggingface_hub itself and a server on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from system.trainers.hub_server import TOKEN, Hub, serving

import ckpt_avg

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.trainers


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        tensors = {f"layer{n}.weight": torch.arange(1200.0).view(30, 40) + step + n for n in range(4)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "run"


def push(hub: Hub, tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Averages the run into release/ and uploads it to org/name, in a process that only knows the server."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE"))}
    known |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    known |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-m", "ckpt_avg", "average", "run", "-o", "release/", "--push-to-hub", "org/name"]
    found = subprocess.run([*command, *arguments], env=known, cwd=tmp_path, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, found.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("arguments", [(), ("--max-shard-size", "6KB", "--sha256")], ids=["one file", "shards"])
def test_the_repository_has_the_bytes_of_the_folder(hub: Hub, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, out, err = push(hub, tmp_path, *arguments)
    assert code == 0, err
    assert hub.repositories == {"org/name": files_of(tmp_path / "release")}
    assert f"uploaded to {hub.endpoint}/org/name" in out
    assert "it/s" not in err  # no bars of the library in a log
    shards = [name for name in hub.repositories["org/name"] if name.endswith(".safetensors")]
    assert (len(shards) > 1) == bool(arguments)
    assert not any("private" in str(each) for each in hub.created)


@pytest.mark.usefixtures("run")
def test_a_new_repository_can_be_private_and_an_old_one_gets_the_files(hub: Hub, tmp_path: Path) -> None:
    assert push(hub, tmp_path, "--private")[0] == 0
    assert "private" in str(hub.created)
    hub.repositories["org/name"] = {}
    assert push(hub, tmp_path, "--overwrite")[0] == 0
    assert len(hub.created) == 1
    assert hub.repositories["org/name"] == files_of(tmp_path / "release")


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("refused", ["/repos/create", "/preupload/", "/objects/batch", "/commit/"])
def test_if_the_upload_fails_the_folder_is_complete(hub: Hub, tmp_path: Path, refused: str) -> None:
    """If it failed, hours of averaging could be lost to a token that may not write."""
    hub.refuse = refused
    code, _, err = push(hub, tmp_path)
    assert code == 5
    assert "release/: is complete, but was not uploaded to org/name: " in err
    assert err.rstrip().endswith("Upload it with: hf upload org/name release/ .")
    assert not any(hub.repositories.values())
    assert ckpt_avg.verify(tmp_path / "release", sources=tmp_path / "run")


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"HF_TOKEN": "hf_other"}, "the Hub does not accept the token"),
        ({"HF_TOKEN": ""}, "there is no token"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_an_upload_needs_is_checked_before_the_work(
    hub: Hub, tmp_path: Path, environment: dict[str, str], problem: str
) -> None:
    code, _, err = push(hub, tmp_path, **environment)
    assert (code, problem in err) == (2, True), err
    assert not (tmp_path / "release").exists()
    assert hub.repositories == {}


@pytest.mark.usefixtures("run")
def test_a_failed_gate_uploads_nothing(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        for n in range(4):\n            setattr(self, f'layer{n}', torch.nn.Linear(40, 30, bias=False))\n\n\n"
        "def score(model):\n    return {'loss': 1.0}\n"
    )
    arguments = ("--model", "user:Net", "--eval", "user:score", "--require", "loss<0.5")
    code, _, err = push(hub, tmp_path, *arguments)
    assert code == 9, err
    assert hub.repositories == {}
