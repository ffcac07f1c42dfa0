"""An output folder opens with the loader of the library that wrote the checkpoints, and has their mean."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from system.faults.tracing import REQUIRE
from system.trainers.runs import PRODUCERS, TRAINERS

pytestmark = pytest.mark.trainers

KINDS = {
    "llama": ["transformers"],
    "llama_bfloat16": ["transformers"],
    "llama_shards": ["transformers"],
    "bert_of_a_run": ["transformers"],
    "custom_code": ["transformers"],
    "peft_adapter": ["peft", "transformers"],
    "unet": ["diffusers"],
    "variant": ["diffusers"],
    "pipeline": ["diffusers"],
    # Not in the extra `trainers`: with scipy and scikit-learn it takes 200 MB. Installed, it is used.
    "sentence": ["sentence_transformers"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_folder_opens_with_the_libraries_own_loader(kind: str, tmp_path: Path) -> None:
    missing = [name for name in KINDS[kind] if find_spec(name) is None]
    if missing and TRAINERS in os.environ.get(REQUIRE, "") and kind != "sentence":
        pytest.fail(f"{REQUIRE} asks for the trainers, and {', '.join(missing)} is not installed")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    command = [sys.executable, "-W", "ignore", str(PRODUCERS / "release_and_load.py"), kind, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
