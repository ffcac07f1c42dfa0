"""How long `check` and `inspect` take on 100 checkpoints of a 7-billion-parameter model: headers alone are read.

    python tests/benchmarks/headers.py [FOLDER]

The files have the names, shapes and dtype of a Llama 2 7B: one safetensors file, three shards, and what `torch.save`
writes with the two float32 moments of Adam beside the weights. They are sparse: 9 TB that take a few hundred MB. As a
yardstick the same headers are read by `safetensors.safe_open`, tensor by tensor, in the same run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from inputs import write_sparse
from measure import run

CHECKPOINTS = 100
HIDDEN, FEED_FORWARD, LAYERS, VOCABULARY = 4096, 11008, 32, 32000
_YARDSTICK = """
import sys
from safetensors import safe_open
for path in sys.argv[1:]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            part = file.get_slice(name)
            part.get_shape(), part.get_dtype()
"""


def llama_7b() -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the 291 tensors, 6.7 billion elements together."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (FEED_FORWARD, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, FEED_FORWARD)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_runs(folder: Path) -> None:
    """Writes ``whole/step_<n>.safetensors``, ``sharded/checkpoint-<n>/`` and ``zips/step_<n>.pt``."""
    shapes = llama_7b()
    shards = [dict(list(shapes.items())[start::3]) for start in range(3)]
    names = [f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (folder / "whole").mkdir()
    for step in range(1, CHECKPOINTS + 1):
        write_sparse(folder / "whole" / f"step_{step}.safetensors", shapes, "BF16", 2)
        checkpoint = folder / "sharded" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name, shard in zip(names, shards, strict=True):
            write_sparse(checkpoint / name, shard, "BF16", 2)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_zips(folder / "zips", shapes)


def write_zips(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes torch files without the bytes of their tensors, which are never touched."""
    import torch

    folder.mkdir()
    model = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    moments = {
        index: {"step": torch.tensor(0.0), "exp_avg": torch.empty(shape), "exp_avg_sq": torch.empty(shape)}
        for index, shape in enumerate(shapes.values())
    }
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    with torch.serialization.skip_data():
        for step in range(1, CHECKPOINTS + 1):
            torch.save({"model": model, "optimizer": optimizer, "step": step}, folder / f"step_{step}.pt")


def main() -> None:
    """Prints a table of wall seconds and peak resident sets."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        write_runs(folder)
        yardstick = [sys.executable, "-c", _YARDSTICK, *map(str, sorted((folder / "whole").iterdir()))]
        command = [sys.executable, "-m", "ckpt_avg"]
        for title, arguments in (
            ("safe_open, one file each", yardstick),
            ("check, one file each", [*command, "check", str(folder / "whole")]),
            ("check, three shards each", [*command, "check", str(folder / "sharded")]),
            ("check, torch.save with Adam", [*command, "check", str(folder / "zips")]),
            ("inspect, one file each", [*command, "inspect", str(folder / "whole")]),
        ):
            done = run(arguments)
            print(f"{title:28} {done.wall:6.2f} s  {done.peak:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
