"""What is known of a checkpoint survives a copy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

from ckpt_avg import open_checkpoint


def test_a_spec_is_equal_to_its_copies(run_folder: Path) -> None:
    """Dtypes are compared by identity, also in what another process sends."""
    with open_checkpoint(run_folder / "epoch_20.pt") as checkpoint:
        spec = checkpoint.spec
    for other in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert other == spec
        assert other.tensors is not spec.tensors
