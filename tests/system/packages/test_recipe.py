"""docs/releasing-from-ci.md: the action, the jobs and the page's lines run, sign with a key, and refuse changes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from system.packages import uv
from system.packages.conftest import Archives, empty_environment
from system.packages.github import Runner, clean_environment, script_of, steps_of

pytestmark = pytest.mark.packages

CI = uv.ROOT / "docs" / "ci"
PAGE = (uv.ROOT / "docs" / "releasing-from-ci.md").read_text()
PREDICATE_PAGE = (uv.ROOT / "docs" / "predicate-v1.md").read_text()
RUN = uv.ROOT / "fixtures" / "mnist_cnn"
ACTION = "./ckpt-avg/docs/ci"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, archives: Archives) -> Path:
    """An environment with all that the recipe installs, so that its own calls of pip find it there."""
    python = empty_environment(tmp_path_factory.mktemp("ci"), "--seed")
    signing = next(line for line in PAGE.splitlines() if "pip install model-signing" in line).split()[3:]
    uv.run("pip", "install", "--python", python, archives.wheel, *signing, "jsonschema", "securesystemslib[crypto]")
    return python


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private and a public key, made as the page says."""
    folder = tmp_path_factory.mktemp("keys")
    for line in re.findall(r"^\$ (openssl .*)$", PAGE, re.MULTILINE):
        subprocess.run(["bash", "-ec", line], cwd=folder, capture_output=True, check=True)
    return folder / "signing-key.pem", folder / "public-key.pem"


@pytest.fixture
def runner(tmp_path: Path, python: Path) -> Runner:
    """A runner with a checkout of a project: its training code, its checkpoints, and ckpt-avg."""
    workspace, temporary = tmp_path / "work", tmp_path / "runner"
    shutil.copytree(RUN, workspace)
    temporary.mkdir()
    (workspace / "ckpt-avg").symlink_to(uv.ROOT)
    return Runner(workspace, temporary, clean_environment(python), is_prepared=True)


def release(runner: Runner, keys: tuple[Path, Path], **changes: str) -> bool:
    """Runs the job of release.yml on the fixture run; returns whether it succeeded."""
    steps = steps_of(CI / "release.yml", "release")
    for step in steps:
        step["with"] = step.get("with", {}) | (changes if step.get("uses") == ACTION else {})
    values = {"inputs.run": ".", "secrets.WEIGHTS_SIGNING_KEY": keys[0].read_text()}
    return runner.job(steps, values, {ACTION: CI})


def attest(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python, CI / "attest.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, python: Path, keys: tuple[Path, Path]) -> tuple[Path, Runner]:
    """The folder in which the job of release.yml ran."""
    folder = tmp_path_factory.mktemp("released")
    shutil.copytree(RUN, folder / "work")
    (folder / "work" / "ckpt-avg").symlink_to(uv.ROOT)
    (folder / "runner").mkdir()
    runner = Runner(folder / "work", folder / "runner", clean_environment(python))
    assert release(runner, keys), runner.log
    return runner.workspace, runner


def test_the_job_publishes_signs_and_uploads(released: tuple[Path, Runner]) -> None:
    workspace, runner = released
    digest = hashlib.sha256((workspace / "release" / "SHA256SUMS").read_bytes()).hexdigest()
    assert f"release/ sha256:{digest}" in runner.summary
    assert "    averaged 8 checkpoints" in runner.summary
    assert [name for name, _ in runner.uploads] == ["report", "weights"]
    for _, patterns in runner.uploads:
        for pattern in patterns.split():
            assert list(workspace.glob(pattern)), pattern
    assert not list(runner.temporary.glob("*.pem"))
    assert "PRIVATE KEY" not in runner.log


def test_whoever_gets_the_weights_can_verify_them(
    released: tuple[Path, Runner], tmp_path: Path, python: Path, keys: tuple[Path, Path]
) -> None:
    """By the lines of the page; each of the changes below must be seen by each of them."""
    lines = re.findall(r"^\$ (.*)$", _block("verify"), re.MULTILINE)
    assert len(lines) == 3

    def verified(change: Callable[[Path], object]) -> list[bool]:
        folder = tmp_path / "received"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(released[0], folder, symlinks=True)
        shutil.copy(keys[1], folder / "public-key.pem")
        change(folder)
        environment = clean_environment(python)
        done = [subprocess.run(["bash", "-ec", line], cwd=folder, env=environment, check=False) for line in lines]
        return [each.returncode == 0 for each in done]

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    assert verified(lambda _: None) == [True, True, True]
    assert verified(lambda folder: damage(folder / "release" / "model.safetensors")) == [False, False, False]
    assert verified(lambda folder: (folder / "release" / "more.txt").write_text(""))[:2] == [False, False]
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", other], check=True)
    public = ["openssl", "pkey", "-in", other, "-pubout", "-out"]
    assert verified(lambda folder: subprocess.run([*public, folder / "public-key.pem"], check=True))[:2] == [
        False,
        False,
    ]


def test_a_changed_attestation_is_refused(
    released: tuple[Path, Runner], tmp_path: Path, python: Path, keys: tuple[Path, Path]
) -> None:
    workspace, _ = released
    envelope = json.loads((workspace / "release.intoto.dsse.json").read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["inputs"][0]["weight"] = 0.9
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (tmp_path / "changed.json").write_text(json.dumps(envelope))
    done = attest(python, "verify", workspace / "release", tmp_path / "changed.json", keys[1])
    assert (done.returncode, done.stdout) == (1, "")
    assert "the attestation is not signed with" in done.stderr


def test_the_attestation_says_what_was_averaged_and_fits_the_schema(
    released: tuple[Path, Runner], python: Path, keys: tuple[Path, Path]
) -> None:
    workspace, _ = released
    done = attest(python, "verify", workspace / "release", workspace / "release.intoto.dsse.json", keys[1])
    predicate = json.loads(done.stdout)
    assert predicate["method"] == "mean"
    assert [(each["name"], each["epoch"], each["weight"]) for each in predicate["inputs"]] == [
        (f"epoch_{epoch}.pt", epoch, 1 / 8) for epoch in range(13, 21)
    ]
    for each in predicate["inputs"]:
        digest = hashlib.sha256((RUN / each["name"]).read_bytes()).hexdigest()
        assert each["files"] == [{"name": each["name"], "digest": {"sha256": digest}}]
    assert predicate["recomputed"] is True
    assert predicate["batchNorm"]["statistics"] == "refreshed"
    assert predicate["evaluations"][-1]["refreshed"] is True
    assert predicate["requirements"][0]["met"] is True
    check = "import json, sys, jsonschema; jsonschema.validate(json.load(sys.stdin), json.load(open(sys.argv[1])))"
    schema = str(CI / "predicate-v1.schema.json")
    validated = subprocess.run(
        [python, "-c", check, schema], input=done.stdout, text=True, capture_output=True, check=False
    )
    assert validated.returncode == 0, validated.stderr


def test_another_implementation_of_dsse_accepts_the_envelope(
    released: tuple[Path, Runner], python: Path, keys: tuple[Path, Path]
) -> None:
    code = """
import json, sys
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
envelope = Envelope.from_dict(json.load(open(sys.argv[1])))
key = SSlibKey.from_crypto(load_pem_public_key(open(sys.argv[2], "rb").read()), keyid=next(iter(envelope.signatures)))
envelope.verify([key], 1)
"""
    envelope = released[0] / "release.intoto.dsse.json"
    done = subprocess.run([python, "-c", code, envelope, keys[1]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_requirement_that_is_not_met_leaves_the_report_and_no_weights(
    runner: Runner, keys: tuple[Path, Path]
) -> None:
    options = "--last=3\n--bn=keep\n--model=train:make_model\n--eval=train:evaluate\n--require=loss<0.0001"
    assert not release(runner, keys, options=options)
    assert runner.codes == [9]
    assert [name for name, _ in runner.uploads] == ["report"]
    assert list(runner.workspace.glob("release.report.html"))
    assert not list(runner.workspace.glob("release"))
    assert not list(runner.workspace.glob("release.sig"))
    assert "loss<0.0001" in runner.summary


def test_inputs_are_no_code_and_no_options(runner: Runner) -> None:
    """The names of checkpoints and the output may come from outside; spaces and quotes are part of a name."""
    folder = runner.workspace / "a $(touch injected) run"
    folder.mkdir()
    for epoch in (19, 20):
        shutil.copy(RUN / f"epoch_{epoch}.pt", folder / f"epoch_{epoch}.pt")
    given = {"sources": f"{folder.name}\n\n", "output": "`touch injected` it's.safetensors", "options": "--bn=keep\n"}
    outputs, passed = runner.action(CI, given)
    assert passed, runner.log
    assert outputs["path"] == given["output"]
    assert outputs["digest"] == hashlib.sha256((runner.workspace / given["output"]).read_bytes()).hexdigest()
    assert (outputs["attestation"], outputs["signature"]) == ("", "")
    assert not list(runner.workspace.glob("**/injected"))
    outputs, passed = runner.action(CI, given | {"sources": "--help"})
    assert not passed
    assert "--help: no such file" in runner.log
    assert "Usage:" not in runner.log
    _, passed = runner.action(CI, given | {"output": "a.safetensors\npath=b.safetensors"})
    assert not passed


def test_weights_that_fail_the_verification_are_set_aside(runner: Runner, python: Path) -> None:
    tools = runner.temporary / "tools"
    tools.mkdir()
    command = f'#!/bin/sh\n[ "$1" != verify ] || exit 9\nexec "{python.parent}/ckpt-avg" "$@"\n'
    (tools / "ckpt-avg").write_text(command)
    (tools / "ckpt-avg").chmod(0o755)
    runner.environment = {**runner.environment, "PATH": f"{tools}:{runner.environment['PATH']}"}
    outputs, passed = runner.action(CI, {"sources": ".", "output": "release/", "options": "--last=2\n--bn=keep"})
    assert (passed, outputs["path"]) == (False, "")
    assert not (runner.workspace / "release").exists()
    assert (runner.workspace / "release.unreleased").exists()


def test_the_gitlab_job_does_the_same(runner: Runner, keys: tuple[Path, Path]) -> None:
    variables, script, artifacts = script_of(CI / "gitlab.yml", "release-weights")
    environment = {**runner.environment, **variables, "RUN": ".", "WEIGHTS_SIGNING_KEY": str(keys[0])}
    command = ["bash", "-ec", "\n".join(script)]
    done = subprocess.run(command, cwd=runner.workspace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert artifacts["when"] == "always"
    for pattern in artifacts["paths"]:
        assert list(runner.workspace.glob(pattern)), pattern


def test_the_shell_lines_of_the_page_do_the_same(runner: Runner, keys: tuple[Path, Path]) -> None:
    shutil.copy(keys[0], runner.workspace / "signing-key.pem")
    done = subprocess.run(
        ["bash", "-ec", _block("shell")],
        cwd=runner.workspace,
        env=runner.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (runner.workspace / "release.sig").exists()


@pytest.mark.parametrize(
    ("schema", "file"),
    [("github-actions", "action.yml"), ("github-workflows", "release.yml"), ("gitlab-ci", "gitlab.yml")],
)
def test_the_files_fit_the_schemas_of_their_services(schema: str, file: str) -> None:
    uv.tool("check-jsonschema", "--builtin-schema", f"vendor.{schema}", CI / file)


def test_an_auditor_finds_no_injection() -> None:
    """What is left: actions named by a version in place of a hash, which the page tells, and a local path."""
    found = uv.tool("zizmor", "--offline", "--no-exit-codes", CI / "action.yml", CI / "release.yml")
    assert set(re.findall(r"^(?:error|warning|help|info)\[([\w-]+)\]", found, re.MULTILINE)) <= {
        "unpinned-uses",
        "self-repository",
    }


def test_the_page_shows_the_files_themselves() -> None:
    """The whole of the workflow and of the GitLab job, and an example that fits the schema's required names."""
    for name in ("release.yml", "gitlab.yml"):
        assert (CI / name).read_text() in PAGE, name
    schema = json.loads((CI / "predicate-v1.schema.json").read_text())
    assert set(schema["properties"]) == set(re.findall(r"^\| `(\w+)` \|", PREDICATE_PAGE, re.MULTILINE))
    identifiers: set[Any] = {schema["$id"], *re.findall(r"urn:uuid:[0-9a-f-]+", PREDICATE_PAGE)}
    identifiers |= set(re.findall(r"urn:uuid:[0-9a-f-]+", (CI / "attest.py").read_text()))
    assert len(identifiers) == 1


def _block(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found, marker
    return found[1]
