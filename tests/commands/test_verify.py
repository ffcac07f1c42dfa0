"""`verify`: damage is found wherever it is, and another mean is no match."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from formats.test_sharded import write
from safetensors.torch import load_file, save_file

import ckpt_avg
from ckpt_avg.errors import UsageError, VerificationError
from ckpt_avg.output import provenance, written_file

Run = Callable[..., tuple[int, str, str]]


def state(seed: int) -> dict[str, torch.Tensor]:
    values = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 3, generator=values),
        "b.weight": torch.randn(11, generator=values).bfloat16(),
        "count": torch.tensor(5),
    }


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "run" / f"step_{step}.pt" for step in (1, 2, 3)]
    paths[0].parent.mkdir()
    for seed, path in enumerate(paths):
        torch.save(state(seed), path)
    return paths


@pytest.fixture
def output(tmp_path: Path, inputs: list[Path]) -> Path:
    ckpt_avg.average(inputs, tmp_path / "out.safetensors")
    return tmp_path / "out.safetensors"


def seal(output: Path, metadata: dict[str, str], data: bytes | None = None, **entries: object) -> None:
    """Puts other metadata, entries and data into an output, and a digest of the header that fits."""
    content = output.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = {**json.loads(content[8 : 8 + length]), **entries}
    header["__metadata__"] = {**metadata, provenance.HEADER_DIGEST: "sha256:" + "0" * 64}
    text = json.dumps(header, separators=(",", ":")).encode()
    sealed = provenance.seal(struct.pack("<Q", len(text)) + text)
    output.write_bytes(sealed + (content[8 + length :] if data is None else data))


# -- complete and undamaged -------------------------------------------------------------------------------------------


def test_an_output_verifies(output: Path) -> None:
    report = ckpt_avg.verify(output)
    assert (report.path, report.tensors, report.nbytes) == (output, 3, output.stat().st_size)
    assert report.checkpoints is None
    assert report.metadata["ckpt_avg.method"] == "mean"
    assert report.metadata["ckpt_avg.data_digest"].endswith(report.data_digest)


def test_the_data_digest_is_that_of_the_data_alone(tmp_path: Path, inputs: list[Path], output: Path) -> None:
    """The same mean has the same digest, whatever its sources are called."""
    for path in inputs:
        path.rename(path.with_name(f"renamed_{path.name}"))
    other = ckpt_avg.average(tmp_path / "run", tmp_path / "other.safetensors")
    assert other.data_digest == ckpt_avg.verify(output).data_digest
    assert (tmp_path / "other.safetensors").read_bytes() != output.read_bytes()


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def is_found(path: Path) -> bool:
    try:
        ckpt_avg.verify(path)
    except VerificationError as error:
        assert str(path) in str(error)
        return True
    return False


def bit_flips(path: Path, count: int) -> Iterator[int]:
    """Flips one bit after the other, every one of the first eight bytes among them; yields those that are not found."""
    content = path.read_bytes()
    order = random.Random(0)
    bits = [*range(64), *(order.randrange(8 * len(content)) for _ in range(count - 64))]
    for bit in bits:
        path.write_bytes(flipped(content, bit))
        if not is_found(path):
            yield bit
    path.write_bytes(content)


def test_flipped_bits_are_found(output: Path) -> None:
    assert list(bit_flips(output, 200)) == []
    assert ckpt_avg.verify(output)


@pytest.mark.guarantee("verify-damage")
@pytest.mark.campaign
def test_ten_thousand_flipped_bits_are_found(tmp_path: Path, run_folder: Path) -> None:
    ckpt_avg.average(run_folder, tmp_path / "swa.safetensors", bn="keep")
    assert list(bit_flips(tmp_path / "swa.safetensors", 10_000)) == []


@pytest.mark.guarantee("verify-damage")
def test_flipped_bits_catch_a_check_that_skips_the_header(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same harness finds out that a part of the file is not checked."""
    monkeypatch.setattr(written_file, "header_digest", lambda header: ckpt_avg.open_checkpoint(output).spec.digest)
    compare = written_file.refuse_other
    monkeypatch.setattr(
        written_file, "refuse_other", lambda file, what, *digests: what == "header" or compare(file, what, *digests)
    )
    assert list(bit_flips(output, 150))


def truncations(path: Path, lengths: Iterator[int] | range) -> Iterator[int]:
    content = path.read_bytes()
    for length in lengths:
        path.write_bytes(content[:length])
        if not is_found(path):
            yield length


def test_truncations_are_found(output: Path) -> None:
    assert list(truncations(output, range(0, output.stat().st_size, 7))) == []


@pytest.mark.guarantee("verify-damage")
@pytest.mark.campaign
def test_every_truncation_of_the_header_is_found(output: Path) -> None:
    (length,) = struct.unpack("<Q", output.read_bytes()[:8])
    assert list(truncations(output, range(8 + length + 1))) == []


@pytest.mark.parametrize("tail", [b"\0", b"x" * 5000])
def test_bytes_after_the_data_are_found(output: Path, tail: bytes) -> None:
    output.write_bytes(output.read_bytes() + tail)
    assert is_found(output)


def test_swapped_leaves_are_found(tmp_path: Path) -> None:
    """Two leaves of the tree that changed places, each undamaged."""
    save_file({"w": torch.arange(2**19, dtype=torch.float32)}, tmp_path / "a.safetensors")
    ckpt_avg.average(tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    content = (tmp_path / "out.safetensors").read_bytes()
    begin = len(content) - 2**21
    swapped = content[:begin] + content[begin + 2**20 :] + content[begin : begin + 2**20]
    (tmp_path / "out.safetensors").write_bytes(swapped)
    with pytest.raises(VerificationError, match="the data was changed or is damaged: expected the digest"):
        ckpt_avg.verify(tmp_path / "out.safetensors")


def test_changed_metadata_is_found(output: Path) -> None:
    content = output.read_bytes()
    output.write_bytes(content.replace(b"step_1.pt", b"step_9.pt"))
    with pytest.raises(VerificationError, match="the header was changed or is damaged") as error:
        ckpt_avg.verify(output)
    assert error.value.exit_code == 9


@pytest.mark.parametrize("kind", ["safetensors", "without one digest", "torch", "text", "empty"])
def test_files_that_were_not_written_here_are_refused(tmp_path: Path, output: Path, kind: str, in_process: Run) -> None:
    path = tmp_path / "other.safetensors"
    metadata = ckpt_avg.verify(output).metadata
    if kind == "safetensors":
        save_file(state(1), path, {"format": "pt"})
    elif kind == "without one digest":
        save_file(state(1), path, {k: v for k, v in metadata.items() if k != provenance.HEADER_DIGEST})
    elif kind == "torch":
        torch.save(state(1), path)
    else:
        path.write_text("hello, this is no checkpoint" if kind == "text" else "")
    code, out, err = in_process("verify", path)
    assert (code, out) == (9, "")
    assert err.startswith(f"Error: {path}: ")


def test_a_copy_by_another_program_is_no_longer_what_was_written(tmp_path: Path, output: Path) -> None:
    save_file(load_file(output), tmp_path / "copy.safetensors", ckpt_avg.verify(output).metadata)
    with pytest.raises(VerificationError, match="the header was changed"):
        ckpt_avg.verify(tmp_path / "copy.safetensors")


# -- the mean of its checkpoints --------------------------------------------------------------------------------------


def test_it_is_the_mean_of_its_checkpoints(output: Path, inputs: list[Path]) -> None:
    for sources in (inputs, [inputs[0].parent], list(reversed(inputs))):
        report = ckpt_avg.verify(output, sources=sources, threads=2, memory=2**20, io="pread")
        assert report.checkpoints == tuple(inputs)
        assert report.measured == ()


@pytest.mark.parametrize("tensor", ["a.weight", "b.weight", "count"])
def test_a_checkpoint_that_changed_is_found(output: Path, inputs: list[Path], tensor: str) -> None:
    """The size and the header stay, one element of one checkpoint is another."""
    changed = state(1)
    changed[tensor].view(-1)[-1] += 1
    torch.save(changed, inputs[1])
    with pytest.raises(VerificationError, match=f"'{tensor}'"):
        ckpt_avg.verify(output, sources=inputs)


def test_another_header_is_found(output: Path, inputs: list[Path]) -> None:
    torch.save({**state(1), "more": torch.ones(1)}, inputs[1])
    with pytest.raises(VerificationError, match=r"expected 'step_2\.pt' \(.* got another file of that name"):
        ckpt_avg.verify(output, sources=inputs)


def test_a_checkpoint_too_few_or_too_many_is_found(output: Path, inputs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"expected 'step_3\.pt' .* got none of that name"):
        ckpt_avg.verify(output, sources=inputs[:2])
    torch.save(state(9), tmp_path / "step_4.pt")
    with pytest.raises(VerificationError, match=r"mean of 3 checkpoints, and these are not among them: .*step_4\.pt"):
        ckpt_avg.verify(output, sources=[*inputs, tmp_path / "step_4.pt"])
    torch.save(state(9), inputs[0].parent / "step_4.pt")
    assert ckpt_avg.verify(output, sources=inputs[0].parent).checkpoints == tuple(inputs)


def test_a_forged_mean_is_found(tmp_path: Path, inputs: list[Path], output: Path) -> None:
    """Anyone can compute new digests, but not a new mean."""
    tensors = load_file(output)
    tensors["a.weight"].view(-1)[4] += 1e-6
    torch.save(tensors, tmp_path / "forged.pt")
    ckpt_avg.average(tmp_path / "forged.pt", tmp_path / "copy.safetensors")
    copy = tmp_path / "copy.safetensors"
    data_digest = ckpt_avg.verify(copy).metadata[provenance.DATA_DIGEST]
    seal(copy, {**ckpt_avg.verify(output).metadata, provenance.DATA_DIGEST: data_digest})
    assert ckpt_avg.verify(copy)
    with pytest.raises(VerificationError, match=r"tensor 'a\.weight': not the mean .* differs at index 4\."):
        ckpt_avg.verify(copy, sources=inputs)


def test_refreshed_statistics_are_not_compared(
    tmp_path: Path, run_folder: Path, train: ModuleType, in_process: Run
) -> None:
    output = tmp_path / "swa.safetensors"
    ckpt_avg.average(run_folder, output, last=3, model=train.make_model, data=train.train_loader, bn_batches=2)
    report = ckpt_avg.verify(output, sources=run_folder)
    assert len(report.measured) == 12
    assert all("running_" in name or name.endswith("num_batches_tracked") for name in report.measured)
    code, out, _ = in_process("verify", output, "--sources", run_folder)
    assert code == 0
    assert "the mean of 3 checkpoints, bit for bit: epoch_18.pt, epoch_19.pt, epoch_20.pt" in out
    assert "not compared: 12 BatchNorm tensors that were refreshed" in out


def test_kept_statistics_are_compared(tmp_path: Path, run_folder: Path) -> None:
    output = tmp_path / "swa.safetensors"
    ckpt_avg.average(run_folder, output, last=3, bn="keep")
    assert ckpt_avg.verify(output, sources=run_folder).measured == ()


def test_a_refreshed_average_still_is_the_mean_of_its_first_sources(
    tmp_path: Path, run_folder: Path, train: ModuleType
) -> None:
    ckpt_avg.average(run_folder, tmp_path / "kept.safetensors", last=3, bn="keep")
    refreshed = tmp_path / "refreshed.safetensors"
    ckpt_avg.refresh_weights(
        tmp_path / "kept.safetensors", refreshed, model=train.make_model, data=train.train_loader, bn_batches=2
    )
    assert len(ckpt_avg.verify(refreshed, sources=run_folder).measured) == 12


def test_the_options_are_those_of_the_run(tmp_path: Path) -> None:
    """A state key, a prefix, a narrower dtype, other integers, NaN, shards: all of it is recorded, and used."""
    for step in (1, 2):
        values = {f"net.{name}": value for name, value in state(step).items()}
        values["net.count"] = torch.tensor(step)
        values["net.a.weight"][0, 0] = torch.nan
        torch.save({"mine": values, "step": step}, tmp_path / f"step_{step}.pt")
    sources = [tmp_path / "step_1.pt", tmp_path / "step_2.pt"]
    output = tmp_path / "out.safetensors"
    options = {"state_key": "mine", "strip_prefix": "net", "dtype": "float16", "non_float": "last"}
    ckpt_avg.average(sources, output, allow_nonfinite=True, **options)
    assert ckpt_avg.verify(output, sources=sources).tensors == 3
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for step, folder in enumerate(folders):
        write(folder, {"a": torch.full((2,), float(step))}, {"b": torch.full((3,), float(step))})
    ckpt_avg.average(folders, tmp_path / "sharded.safetensors")
    assert ckpt_avg.verify(tmp_path / "sharded.safetensors", sources=folders).checkpoints == tuple(folders)


def test_a_copy_of_one_checkpoint(tmp_path: Path, inputs: list[Path], in_process: Run) -> None:
    ckpt_avg.average(inputs[0], tmp_path / "copy.safetensors")
    code, out, _ = in_process("verify", tmp_path / "copy.safetensors", "--sources", inputs[0])
    assert code == 0
    assert "a copy of 1 checkpoint, bit for bit: step_1.pt" in out


# -- the command ------------------------------------------------------------------------------------------------------


def test_one_document_with_json(output: Path, inputs: list[Path], in_process: Run) -> None:
    code, out, err = in_process("verify", output, "--sources", *inputs, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["checkpoints"] == list(map(str, inputs))
    assert found["data_digest"] == ckpt_avg.verify(output).data_digest
    output.write_bytes(output.read_bytes()[:-1])
    code, out, _ = in_process("verify", output, "--json")
    assert code == 9
    assert json.loads(out)["error"]["exit_code"] == 9


@pytest.mark.parametrize("arguments", [("OUT", "a.pt"), ("OUT", "--sources"), (), ("OUT", "--threads", "0")])
def test_invalid_commands_are_usage_errors(output: Path, in_process: Run, arguments: tuple[str, ...]) -> None:
    given = [str(output) if argument == "OUT" else argument for argument in arguments]
    assert in_process("verify", *given)[0] == 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none", "no such file or folder. Check the path."),
        ("none/none", "no such file or folder. Check the path."),
        ("folder", "contains no weights. Name an output of ckpt-avg"),
        ("pipe", "is a device, pipe or socket. Name a file that ckpt-avg wrote"),
    ],
)
def test_a_path_that_is_no_file_is_a_usage_error(tmp_path: Path, in_process: Run, name: str, problem: str) -> None:
    """If it failed, a wrong path in a CI step would be reported as a damaged release."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    code, _, err = in_process("verify", str(tmp_path / name))
    assert (code, err.startswith(f"Error: {tmp_path / name}: {problem}")) == (2, True)


def test_a_bad_option_is_refused(output: Path) -> None:
    with pytest.raises(UsageError, match="--io"):
        ckpt_avg.verify(output, io="floppy")


def test_torch_is_imported_for_sources_only(output: Path) -> None:
    """If it failed, a look at a release file would take seconds."""
    code = f"import sys, ckpt_avg; ckpt_avg.verify({str(output)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HOSTILE = {
    "ckpt_avg.sources": ("", "[", "{}", "[]", "[1]", '[{"name":1}]', "[" * 990,
                         '[{"name":"x","bytes":1,"header_sha256":"y"}]'),
    "ckpt_avg.options": ("", "[]", '{"x":1}', '{"state_key":5}', '{"non_float":"x"}', '{"ema":true,"state_key":"a"}'),
    "ckpt_avg.dtype": ("int8",),
    "ckpt_avg.batch_norm": ("", "[]", "7", '{"statistics":[]}'),
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_metadata_is_an_error_of_ours(inputs: list[Path], output: Path, key: str) -> None:
    """Anyone who changes the metadata can compute new digests, and must get no further than an error."""
    honest = ckpt_avg.verify(output).metadata
    for value in HOSTILE[key]:
        seal(output, {**honest, key: value})
        assert ckpt_avg.verify(output)
        if key == "ckpt_avg.batch_norm":
            assert ckpt_avg.verify(output, sources=inputs)
            continue
        with pytest.raises(VerificationError, match=str(output)):
            ckpt_avg.verify(output, sources=inputs)


# -- found in review --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"strip_prefix": "a"}])
def test_a_copy_that_changes_something_is_verified_against_what_it_copies(
    tmp_path: Path, inputs: list[Path], options: dict[str, str]
) -> None:
    """Rounded twice, or renamed, it no longer is the mean of the first sources."""
    mean, copy = tmp_path / "mean.safetensors", tmp_path / "copy.safetensors"
    ckpt_avg.average(inputs, mean)
    ckpt_avg.average(mean, copy, **options)  # type: ignore[arg-type]
    report = ckpt_avg.verify(copy, sources=mean)
    assert (report.checkpoints, report.metadata["ckpt_avg.method"]) == ((mean,), "copy")
    assert [each["name"] for each in json.loads(report.metadata["ckpt_avg.origin"])] == [each.name for each in inputs]
    with ckpt_avg.open_checkpoint(copy) as opened:
        assert opened.spec.averaged == "ckpt-avg made it"
    ckpt_avg.average(mean, tmp_path / "plain.safetensors")
    assert ckpt_avg.verify(tmp_path / "plain.safetensors", sources=inputs).checkpoints == tuple(inputs)


def test_no_recorded_text_makes_a_line_of_ours(
    tmp_path: Path, output: Path, inputs: list[Path], in_process: Run
) -> None:
    honest = ckpt_avg.verify(output).metadata
    forged = "\nout.safetensors is complete and undamaged"
    seal(output, {**honest, provenance.DATA_DIGEST: f"sha256-tree-1MiB:x{forged}"})
    assert forged not in in_process("verify", output)[2]
    record = json.loads(honest[provenance.SOURCES])
    for key, value in (("header_sha256", forged), ("name", forged), ("bytes", 10**4000)):
        seal(output, {**honest, provenance.SOURCES: json.dumps([{**record[0], key: value}])})
        code, _, err = in_process("verify", output, "--sources", *inputs)
        assert (code, err.count("\n")) == (9, 1)
        assert len(err) < 1000
    odd = tmp_path / f"a{forged.replace('/', '')}"
    odd.write_bytes(b"x" * 100)
    code, _, err = in_process("verify", odd)
    assert (code, err.count("\n")) == (9, 1)


def test_of_files_of_one_name_the_recorded_digest_tells(tmp_path: Path, inputs: list[Path], output: Path) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for seed, path in enumerate(inputs):
        torch.save(state(seed + 7), others / path.name)
    exact = tmp_path / "exact.safetensors"
    ckpt_avg.average(inputs, exact, sha256=True)
    for order in ([others, inputs[0].parent], [inputs[0].parent, others]):
        assert ckpt_avg.verify(exact, sources=order).checkpoints == tuple(inputs)
        with pytest.raises(VerificationError, match="several sources could be the recorded 'step_1"):
            ckpt_avg.verify(output, sources=order)


def test_an_unreadable_file_does_no_harm(tmp_path: Path, inputs: list[Path], output: Path) -> None:
    junk = tmp_path / "junk"
    junk.mkdir()
    (junk / inputs[0].name).write_bytes(b"junk")
    torch.save(state(5), junk / "step_9.pt")
    assert ckpt_avg.verify(output, sources=[junk, inputs[0].parent]).checkpoints == tuple(inputs)


def test_a_checkpoint_may_be_named_by_its_folder_or_its_file(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    files = [folder / "model.safetensors" for folder in folders]
    for step, folder in enumerate(folders):
        folder.mkdir()
        save_file({"w": torch.full((3,), float(step))}, folder / "model.safetensors")
    for averaged, named in ((files, folders), (folders, files)):
        output = tmp_path / f"{averaged[0].name}.out"
        ckpt_avg.average(averaged, output)
        assert len(ckpt_avg.verify(output, sources=named).checkpoints or ()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "average"])
@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, and signals as Linux has them")
def test_a_signal_ends_the_reading_of_large_files(tmp_path: Path, command: str) -> None:
    """If it failed, the process would read on for minutes, and the sender of the signal would kill it."""
    large = tmp_path / "large.safetensors"
    header = json.dumps({"w": {"dtype": "U8", "shape": [2**37], "data_offsets": [0, 2**37]}}).encode()
    header += b" " * (-len(header) % 8)
    if command == "verify":
        save_file({"w": torch.ones(1)}, tmp_path / "small.safetensors")
        ckpt_avg.average(tmp_path / "small.safetensors", large)
        metadata = ckpt_avg.verify(large).metadata
        about = {"__metadata__": {**metadata, provenance.HEADER_DIGEST: "sha256:" + "0" * 64}}
        text = json.dumps({**about, **json.loads(header)}, separators=(",", ":")).encode()
        large.write_bytes(provenance.seal(struct.pack("<Q", len(text)) + text))
        os.truncate(large, 8 + len(text) + 2**37)
        arguments = ["verify", str(large)]
    else:
        large.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(large, 8 + len(header) + 2**37)
        arguments = ["average", str(large), "-o", str(tmp_path / "out.safetensors"), "--sha256"]
    process = subprocess.Popen([sys.executable, "-m", "ckpt_avg", *arguments, "-q"], stderr=subprocess.DEVNULL)
    descriptors = Path(f"/proc/{process.pid}/io")
    deadline = time.monotonic() + 60
    while int(descriptors.read_text().split()[1]) < 300 * 2**20:  # rchar: it has begun to read the data
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert not (tmp_path / "out.safetensors").exists()
