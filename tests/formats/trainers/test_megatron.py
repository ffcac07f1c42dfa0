"""Megatron-LM: one rank is read, several are refused, nothing is read in part."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
from formats.reading import Command, assert_same, read, refusal

from ckpt_avg import open_checkpoint


@pytest.mark.parametrize(
    "ranks",
    [("mp_rank_00", "mp_rank_01"), ("mp_rank_00_000", "mp_rank_00_001"), ("mp_rank_00_000", "mp_rank_01_000")],
    ids=["tensor parallel", "pipeline parallel", "both names"],
)
def test_several_ranks_are_refused(tmp_path: Path, in_process: Command, ranks: tuple[str, ...]) -> None:
    """One rank's slices taken as the whole model."""
    message = refusal(layouts.megatron(tmp_path, ranks).checkpoints[0].path)
    assert "Megatron" in message
    assert "convert" in message
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "Megatron" in errors


def test_one_rank(tmp_path: Path) -> None:
    saved = layouts.megatron(tmp_path).checkpoints[-1]
    for path in (saved.path, saved.path / "mp_rank_00" / "model_optim_rng.pt"):
        assert_same(read(path), saved.raw)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec.kind == "Megatron-LM"
            assert checkpoint.spec.record.step == saved.step


def test_nested_parts_are_one_model(tmp_path: Path) -> None:
    """Not the encoder alone."""
    saved = layouts.megatron(tmp_path, nested=True).checkpoints[0]
    with open_checkpoint(saved.path) as checkpoint:
        names = list(checkpoint.spec.tensors)
    embedding = "language_model.embedding.word_embeddings.weight"
    assert sorted(names) == sorted([embedding, *(f"language_model.encoder.{name}" for name in saved.raw)])
