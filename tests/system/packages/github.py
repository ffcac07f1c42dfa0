"""Runs the steps of a GitHub job as its runner does, as far as the recipe in docs/ci needs it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Runner:
    """A machine on which a job runs."""

    workspace: Path
    temporary: Path
    environment: Mapping[str, str]
    is_prepared: bool = False  # what the steps called Install… install is there
    log: str = ""
    codes: list[int] = field(default_factory=list)  # the exit codes of the steps
    uploads: list[tuple[str, str]] = field(default_factory=list)  # the name and the paths of each artifact

    @property
    def summary(self) -> str:
        """What the job's page shows."""
        path = self.temporary / "summary"
        return path.read_text() if path.exists() else ""

    def job(self, steps: list[dict[str, Any]], values: Mapping[str, str], actions: Mapping[str, Path]) -> bool:
        """Runs the steps of a workflow; returns whether all succeeded. `values` are what expressions stand for."""
        known, succeeded = dict(values), True
        for step in steps:
            if not _is_due(str(step.get("if", "")), known, succeeded):
                continue
            uses = step.get("uses", "")
            given = {key: _evaluated(str(value), known) for key, value in step.get("with", {}).items()}
            if uses in actions:
                outputs, passed = self.action(actions[uses], given)
            elif uses:
                outputs, passed = {}, True
                if uses.startswith("actions/upload-artifact@"):
                    self.uploads.append((given["name"], given["path"]))
            else:
                outputs, passed = self._shell(step, known, {})
            known |= {f"steps.{step.get('id')}.outputs.{key}": value for key, value in outputs.items()}
            succeeded = succeeded and passed
        return succeeded

    def action(self, folder: Path, given: Mapping[str, str]) -> tuple[dict[str, str], bool]:
        """Runs a composite action; returns its outputs, and whether all its steps succeeded."""
        definition = _load(folder / "action.yml")
        known = {
            f"inputs.{name}": given.get(name, each.get("default", "")) for name, each in definition["inputs"].items()
        }
        passed = True
        for step in definition["runs"]["steps"]:
            assert step["shell"] == "bash"
            if self.is_prepared and step["name"].startswith("Install"):
                continue
            if passed and _is_due(str(step.get("if", "")), known, passed):
                outputs, passed = self._shell(step, known, {"GITHUB_ACTION_PATH": str(folder)})
                known |= {f"steps.{step.get('id')}.outputs.{key}": value for key, value in outputs.items()}
        return {name: _evaluated(each["value"], known) for name, each in definition["outputs"].items()}, passed

    def _shell(
        self, step: Mapping[str, Any], known: Mapping[str, str], more: Mapping[str, str]
    ) -> tuple[dict[str, str], bool]:
        """Runs one `run`, as GitHub runs it; an expression in it would be code that an input can write."""
        assert "${{" not in step["run"]
        script, outputs = self.temporary / "step.sh", self.temporary / "outputs"
        script.write_text(step["run"])
        outputs.write_text("")
        own = {key: _evaluated(str(value), known) for key, value in step.get("env", {}).items()}
        files = {"GITHUB_OUTPUT": str(outputs), "GITHUB_STEP_SUMMARY": str(self.temporary / "summary")}
        environment = {**self.environment, "RUNNER_TEMP": str(self.temporary), **files, **more, **own}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", script]
        done = subprocess.run(
            command, cwd=self.workspace, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        self.log += done.stdout + done.stderr
        self.codes.append(done.returncode)
        return dict(line.split("=", 1) for line in outputs.read_text().splitlines()), done.returncode == 0


def _load(path: Path) -> dict[str, Any]:
    import yaml  # of the extra "packages"

    loaded = yaml.safe_load(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def steps_of(workflow: Path, job: str) -> list[dict[str, Any]]:
    """Returns the steps of a job."""
    steps = _load(workflow)["jobs"][job]["steps"]
    assert isinstance(steps, list)
    return steps


def script_of(pipeline: Path, job: str) -> tuple[dict[str, str], list[str], dict[str, Any]]:
    """Returns the variables, the script and the artifacts of a GitLab job."""
    found = _load(pipeline)[job]
    return found["variables"], found["script"], found["artifacts"]


def clean_environment(python: Path) -> dict[str, str]:
    """Returns the environment of a runner on which this Python is set up."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("CKPT_AVG_", "PYTHON", "GITHUB_"))
    }
    return kept | {"PATH": f"{python.parent}:{os.environ['PATH']}"}


def _is_due(condition: str, known: Mapping[str, str], succeeded: bool) -> bool:
    if condition == "always()":
        return True
    if not condition:
        return succeeded
    match = re.fullmatch(r"([\w.-]+) (==|!=) '(.*)'", condition)
    assert match, condition
    return succeeded and (known.get(match[1], "") == match[3]) == (match[2] == "==")


def _evaluated(text: str, known: Mapping[str, str]) -> str:
    """Returns a text with its expressions replaced; what is not known is empty, as on GitHub."""
    return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda match: known.get(match[1], ""), text)
