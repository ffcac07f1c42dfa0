"""torch.distributed.checkpoint (DCP): .metadata and __0_0.distcp, or shard-00001-model-00001-of-00001.safetensors."""

import itertools
import re
from collections.abc import Collection

from ckpt_avg.formats.trainers.name_patterns import SUFFIXES
from ckpt_avg.formats.trainers.trainer import Folder, Stored, Trainer, WeightFiles

METADATA = ".metadata"
SHARD = r"shard-(\d{1,9})-model-(\d{1,9})-of-(\d{1,6})\.safetensors"


def _weights(folder: Folder) -> WeightFiles | None:
    parts = folder.matching(r".*\.distcp")
    # Next to checkpoint files .metadata is something else, unless the parts that it describes are there.
    if METADATA in folder.names and (parts or not any(name.endswith(SUFFIXES) for name in folder.names)):
        return WeightFiles(folder.path, Stored.DCP)
    if shards := folder.matching(SHARD):
        return WeightFiles(folder.path, Stored.DCP_SAFETENSORS, problem=_missing_shards(shards))
    if parts:
        problem = (
            f"incomplete: there is no {METADATA} next to the *.distcp files, which is saved last. Copy it again or "
            "exclude it."
        )
        return WeightFiles(folder.path, problem=problem, incomplete=True)
    return None


def _missing_shards(shards: Collection[str]) -> str:
    found = [tuple(map(int, match.groups())) for name in shards if (match := re.fullmatch(SHARD, name))]
    ranks, numbers = {rank for rank, _, _ in found}, {number for _, number, _ in found}
    for what, there, count in (("ranks", ranks, max(ranks)), ("files", numbers, max(of for _, _, of in found))):
        # The count comes from a name, so it may be huge: only the first that are missing are looked for.
        missing = (str(each) for each in range(1, count + 1) if each not in there)
        if first := list(itertools.islice(missing, 20)):
            return f"shards are missing: {what} {', '.join(first)} of {count:,}. Copy all shards."
    return ""


TRAINER = Trainer(name="torch DCP", weights=_weights)
