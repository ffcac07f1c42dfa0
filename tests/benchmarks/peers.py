"""Other tools over the same checkpoints, which have the layout of a Llama, since some tools know only such models."""

from __future__ import annotations

from checking import Difference, difference
from inputs import llama, write_random
from programs import FLOOR, OURS, comparable
from rounds import Setup, importing, in_turn, median, output_of, ratio, remove, row, table, walls

_OUTPUTS = 8  # at most, one of each program


def measure_peers(setup: Setup) -> None:
    """Wall seconds, memory and error of every tool that is installed."""
    if not setup.has_room("peers", (setup.checkpoints + _OUTPUTS) * setup.nbytes):
        return
    folder, outputs = setup.scratch(), setup.scratch()
    shapes, config = llama(setup.nbytes)
    inputs = write_random(folder, setup.checkpoints, setup.nbytes, shapes=shapes, config=config)
    peers = comparable(inputs, setup.peers, folder)
    programs = {name: peer.program for name, peer in peers.items()}
    starts = {f"import {peer.imports}": importing(peer.imports, peer.python) for peer in peers.values()}
    runs = in_turn({**programs, **starts}, setup.rounds, outputs)
    errors: dict[str, Difference] = {}
    for name, peer in peers.items():
        if name == FLOOR:
            continue
        errors[name] = difference(output_of(name, programs, outputs), inputs)
        if errors[name].wrong if peer.exact else errors[name].relative > peer.tolerance:
            raise AssertionError(f"{name}: {errors[name]}")
    print(
        f"{setup.checkpoints} float32 safetensors checkpoints of {setup.nbytes / 1e9:.2f} GB with the layout of a "
        f"Llama ({len(shapes)} tensors), page cache warm, medians of {setup.rounds} rounds\n"
    )
    table(
        *("program", "wall, s", "ratio to ckpt-avg", "of it imports, s", "CPU, s"),
        *("peak RSS, MiB", "anonymous, MiB", "output"),
    )
    for name, peer in peers.items():
        of_program = runs[name]
        times = median(walls(of_program)), ratio(walls(of_program), walls(runs[OURS]))
        start, cpu = median(walls(runs[f"import {peer.imports}"])), median(one.cpu for one in of_program)
        peaks = max(one.peak for one in of_program), max(one.anonymous for one in of_program)
        row(name, *times, start, cpu, *(f"{peak:.0f}" for peak in peaks), errors.get(name, "not computed"))
    print(
        "\nExact is the float64 mean, rounded to float32, which alone makes relative errors to 6.0e-08. All that sum "
        "in float64 and divide once must be exact. sd-mecha's running average rounds in each step, so that it may miss "
        "in the last bit where the mean lies halfway between two float32 numbers; float32 sums miss in the last few. "
        "The floor and ckpt-avg fsync their output, the others do not."
    )
    remove(folder)
    remove(outputs)
