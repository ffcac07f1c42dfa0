"""`Run`: pieces of one kind that lie side by side in the output, computed as if they were one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_avg.checkpoint.spec import Checkpoint, DType, TensorSpec
from ckpt_avg.checkpoint.tensor_reads import Stretch
from ckpt_avg.mean.plan import OutputTensor, Piece


class Run:
    """Pieces that lie side by side in the output and are treated alike.

    Attributes:
        source_dtype, dtype: of the inputs, and of the output.
        is_mean: whether they are averaged, or copied.
        offset: where they begin in the data section, in bytes.
        numel: elements of all of them.
    """

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        first = pieces[0].tensor
        self.source_dtype, self.dtype, self.is_mean = first.source_dtype, first.dtype, first.rule == "mean"
        self.offset = first.offset + pieces[0].start * first.dtype.itemsize
        self.numel = sum(piece.stop - piece.start for piece in pieces)
        self._pieces = pieces
        # Checkpoints whose headers are the same share their table, and what follows from it.
        self._stretches: dict[int, tuple[Mapping[str, TensorSpec], Stretch]] = {}

    @staticmethod
    def kind(piece: Piece) -> tuple[DType, DType, bool]:
        """Returns what the pieces of one run have in common."""
        return piece.tensor.source_dtype, piece.tensor.dtype, piece.tensor.rule == "mean"

    def stretch(self, checkpoint: Checkpoint) -> Stretch:
        """Returns where a checkpoint has the elements."""
        tensors = checkpoint.spec.tensors
        if id(tensors) not in self._stretches:
            ranges = [(tensors[piece.tensor.name], piece.start, piece.stop) for piece in self._pieces]
            self._stretches[id(tensors)] = tensors, Stretch.of(ranges)
        return self._stretches[id(tensors)][1]

    def split(self, elements: int) -> list[Run]:
        """Returns runs of no more than so many elements, but for a piece that is larger by itself."""
        groups: list[list[Piece]] = []
        room = 0
        for piece in self._pieces:
            numel = piece.stop - piece.start
            if numel > room:
                groups.append([])
                room = elements
            groups[-1].append(piece)
            room -= numel
        return [Run(tuple(group)) for group in groups]

    def locate(self, index: int) -> tuple[OutputTensor, int]:
        """Returns the tensor that an element of the run belongs to, and its index there."""
        for piece in self._pieces:
            if index < piece.stop - piece.start:
                return piece.tensor, piece.start + index
            index -= piece.stop - piece.start
        raise IndexError(index)
