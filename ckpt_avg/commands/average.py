"""`average`, the whole path: discover → open → check → plan → mean → refresh → evaluate → publish."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_avg.commands.agreement import agree_on_code, agree_on_files, agree_on_request
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.draft import AverageResult, Draft
from ckpt_avg.commands.prepare import prepare
from ckpt_avg.commands.publish import publish
from ckpt_avg.commands.release import plan_release
from ckpt_avg.commands.requests import AverageRequest, SoupRequest, takes
from ckpt_avg.errors import UsageError
from ckpt_avg.output.folder_paths import check_folder, names_folder
from ckpt_avg.output.hub import refuse_unusable, upload
from ckpt_avg.output.paths import check_checksum, check_output
from ckpt_avg.output.shards import SAFETENSORS
from ckpt_avg.progress import Phase
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.text import decimal_size, plural
from ckpt_avg.user_code.comparison import Evaluation
from ckpt_avg.wording import setting


@takes(AverageRequest)
def average(request: AverageRequest) -> AverageResult:
    """Writes the mean of checkpoints, BatchNorm refreshed, to one safetensors file.

    Each element is the float64 sum over the checkpoints in their order, divided once by their number, and rounded once
    to the output dtype. With unequal weights it is the sum of rounded products, which is not divided. Until everything
    is done the output path is untouched.

    Args:
        The fields of `AverageRequest`.

    Returns:
        What was done.

    Raises:
        UsageError: an option is wrong, or the model or data for a refresh is missing.
        CheckpointFormatError: a checkpoint is corrupt, unsafe or of an unknown kind.
        IncompatibleError: the checkpoints don't fit together, or not the model, or contain NaN or Inf.
        OutputError: the output exists, or could not be written.
        ResourceError, MemoryError, torch.OutOfMemoryError: a resource ran out.
        UserCodeError: the model, the data or the metric failed.
        RequirementError: a requirement was not met; ``error.result`` has what was measured.
        RankError: another rank failed, or was started with other arguments.

    Example:
        >>> result = average(["fixtures/mnist_cnn"], "release.safetensors", every=3, bn="keep", dry_run=True)
        >>> [path.name for path in result.checkpoints]
        ['epoch_11.pt', 'epoch_14.pt', 'epoch_17.pt', 'epoch_20.pt']
    """
    with Context(request.ranks, request.callbacks) as context:
        agree_on_request(context.ranks, request)
        return write_average(request, context)


def write_average(
    request: AverageRequest,
    context: Context,
    measured: Sequence[Evaluation] = (),
    directions: Mapping[str, bool] | None = None,
) -> AverageResult:
    """Does what `average` does, in a context. What was measured before is not measured again (see `Evaluations`)."""
    context.phase(Phase("opening checkpoints"))
    discovery = request.discover()
    target, checksum = check_paths(request, discovery, context)
    request, prepared = prepare(discovery, request, context)  # open → check → plan
    agree_on_code(context.ranks, request)
    agree_on_files(context.ranks, prepared.checkpoints)
    release = None
    if writes_folder(request):
        release = plan_release(prepared, context, sha256=request.sha256, max_shard_size=request.largest_shard)
    draft = Draft(request, prepared, context, target, checksum, measured, directions, release)
    context.phases_left = draft.phases + (request.push_to_hub is not None)
    if request.dry_run:
        return draft.result()
    result = publish(draft)  # mean → refresh → evaluate → publish
    return result if request.push_to_hub is None else _push(result, request, target, context)


def _push(result: AverageResult, request: AverageRequest, folder: Path, context: Context) -> AverageResult:
    """Uploads the output folder, on rank 0."""
    if not context.ranks.is_first or request.push_to_hub is None:
        return result
    context.phase(Phase(f"uploading {plural(len(result.files), 'file')}, {decimal_size(result.nbytes)}"))
    return replace(result, uploaded=upload(folder, str(request.output), request.push_to_hub, private=request.private))


def writes_folder(request: AverageRequest | SoupRequest) -> bool:
    """Whether the output is a folder. Raises UsageError if it is a file, but an option needs a folder."""
    needs = {"--max-shard-size": request.max_shard_size, "--push-to-hub": request.push_to_hub}
    option = next((flag for flag, value in needs.items() if value is not None), None)
    if option is None or names_folder(request.output):
        return names_folder(request.output)
    path = Path(request.output)
    if path.suffix.lower() == SAFETENSORS or path.is_file():
        stem = path.with_suffix("")
        folder = os.path.join(stem.with_name(f"{stem.name}-folder") if stem.is_file() else stem, "")
        raise UsageError(f"{path}: is one file, and {option} needs a folder. Use {setting('-o', folder)}.")
    return True


def check_paths(
    request: AverageRequest | SoupRequest, discovery: Discovery, context: Context
) -> tuple[Path, Path | None]:
    """Returns where the output goes, and where its checksum goes, if it is a file that is to have one."""
    output, overwrite = request.output, request.overwrite
    if request.push_to_hub is not None and context.ranks.is_first:
        refuse_unusable(request.push_to_hub, context.notice)
    if writes_folder(request):
        return check_folder(output, discovery, overwrite=overwrite), None
    target = check_output(output, discovery, overwrite=overwrite)
    if target.suffix != ".safetensors":
        folder = setting("-o", os.path.join(output, ""))
        context.notice(f"{output}: will be a safetensors file. For a folder that from_pretrained loads, use {folder}")
    checksum = check_checksum(output, discovery, wanted=request.sha256, overwrite=overwrite, notice=context.notice)
    return target, checksum
