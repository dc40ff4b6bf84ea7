"""What number formats cost and lose on a model's own weights, and on data of known distributions beside them.

The weights are those that `quantize` would compress: the linear products of the blocks, read one at a time. Where a directory is no model
of a known task that can be walked (an encoder), every matrix in it but the embeddings is read, and a note says so.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from bitpress.checkpoints.parameter import WeightParameter
from bitpress.checkpoints.source import SourceCheckpoint
from bitpress.errors import CheckpointError, FormatError, NumericsError, UsageError
from bitpress.evaluation.rate import SOURCES, draw_source, measure_rates
from bitpress.formats import Block, Format, parse_format
from bitpress.formats.listing import usual_formats
from bitpress.formats.table import spell_format
from bitpress.models.linears import list_weights
from bitpress.models.opening import OriginalLoader, open_original
from bitpress.progress import Progress, Silent
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["SAMPLED", "measure_formats", "sample"]

# Weights read of a model unless all are asked for: enough for a hundredth of a dB, and some minutes for a hundred formats.
SAMPLED = 1 << 20
# A quarter of a million numbers: the error of a mean square is 0.3 % for a Gaussian, 0.01 dB.
DRAWN = (256, 1024)
# Half the ratios that rtn tries by default: 0.02 to 0.05 dB less on a Gaussian at 3 and 4 bits, for half the time.
CLIPS: Mapping[str, tuple[float, ...]] = {clip: shrink_ratios(clip, 10, 0.5) for clip in ("minmax", "mse")}


@dataclass(frozen=True)
class Matrix:
    """A weight that can be read when its turn comes; `rows` of it are wanted."""

    name: str
    shape: tuple[int, int]
    read: Callable[[], Float[torch.Tensor, "out in"]]
    rows: int = 0

    @property
    def kind(self) -> str:
        """What a matrix is called in any block."""
        return re.sub(r"\d+", "*", self.name)


def measure_formats(
    path: Path, names: Sequence[str] = (), *, whole: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure formats, the usual ones unless named, on the weights of a model and on drawn numbers of a fixed seed.

    At most `SAMPLED` weights spread over the layers are read, all of them with `whole`. Raises CheckpointError for what is no model,
    FormatError when a format that was asked for fits no matrix, NumericsError for weights that are not finite.
    """
    progress = Silent() if progress is None else progress
    asked = [parse_format(spell_format(name)) for name in dict.fromkeys(names)]
    found = list_matrices(path, progress)
    chosen = found if whole else sample(found, SAMPLED)
    formats = asked or list(dict.fromkeys(_fitting(fmt, chosen) for fmt in usual_formats()))
    progress.begin("formats on weights", len(chosen) * len(formats))
    rows, refused = measure_rates(_read(path, chosen), formats, CLIPS, lambda matrix, fmt: progress.advance(f"{matrix} {fmt}"))
    lost = [fmt.name for fmt in formats if fmt.name not in {row.format for row in rows}]
    if names and lost:
        raise FormatError(f"{lost[0]} fits no matrix of {path}: {refused[lost[0]]}")
    kept = [fmt for fmt in formats if fmt.name not in lost]
    table = [{"source": "model", **row.as_dict()} for row in rows]
    progress.begin("formats on drawn numbers", len(SOURCES) * len(kept))
    for source in SOURCES:
        drawn, reasons = measure_rates(
            [(source, draw_source(source, DRAWN))], kept, CLIPS, lambda matrix, fmt: progress.advance(f"{matrix} {fmt}")
        )
        refused = reasons | refused
        table += [{"source": source, **row.as_dict()} for row in drawn]
    return {
        "model": str(path),
        "matrices": len(chosen),
        "matrices_of_model": len(found),
        "weights": sum((m.rows or m.shape[0]) * m.shape[1] for m in chosen),
        "weights_of_model": sum(m.shape[0] * m.shape[1] for m in found),
        "refused": refused,
        "rows": table,
    }


def list_matrices(path: Path, progress: Progress) -> list[Matrix]:
    """List the weights of a model in the order of its blocks. Raises CheckpointError when there are none."""
    source = SourceCheckpoint.open(path)
    try:
        found = _of_blocks(path)
    except (CheckpointError, UsageError) as error:
        progress.note(f"not walked block by block ({error}) Every matrix but the embeddings is read.")
        found = [
            Matrix(name, (entry.shape[0], entry.shape[1]), partial(source.read, name))
            for name, (_, entry) in source.tensors.items()
            if len(entry.shape) == 2 and entry.torch_dtype.is_floating_point and "embed" not in name
        ]
    if not found:
        raise CheckpointError(f"{path}: holds no matrix to measure formats on.")
    return found


def sample(found: Sequence[Matrix], budget: int) -> list[Matrix]:
    """Choose matrices of every kind from layers far apart until `budget` weights are reached.

    They are whole where that many fit. Where not, rows far apart are taken, and what a format stores once for a weight (a codebook)
    weighs more than it would.
    """
    if sum(m.shape[0] * m.shape[1] for m in found) <= budget:
        return list(found)
    kinds: dict[str, list[Matrix]] = {}
    for matrix in found:
        kinds.setdefault(matrix.kind, []).append(matrix)
    # One whole matrix of every kind, or where that is too much already an equal share of rows of each.
    share = budget if sum(m[0].shape[0] * m[0].shape[1] for m in kinds.values()) <= budget else budget // len(kinds)
    chosen: dict[str, Matrix] = {}
    left = budget
    for turn in range(max(len(members) for members in kinds.values())):
        for j, members in enumerate(kinds.values()):
            # The golden ratio's multiples are spread evenly however many are taken.
            matrix = members[int(len(members) * ((j + 0.5) / len(kinds) + turn * 0.6180339887) % len(members))]
            rows = matrix.shape[0]
            if rows * matrix.shape[1] > share and turn == 0:
                rows = max(share // matrix.shape[1] // 64 * 64, 1)
            if matrix.name in chosen or rows * matrix.shape[1] > left:
                continue
            chosen[matrix.name] = replace(matrix, rows=rows)
            left -= rows * matrix.shape[1]
    return [chosen[m.name] for m in found if m.name in chosen]


def _fitting(fmt: Format, chosen: Sequence[Matrix]) -> Format:
    """Return the format, in another block where its own does not divide every matrix: all are compared on the same weights."""
    for block in (fmt.block, Block(1, 64), Block(1, 32)):
        if isinstance(block.cols, int) and block.cols % fmt.grid.span:
            continue
        if block.cols == "all" or all(matrix.shape[1] % block.cols == 0 for matrix in chosen):
            return replace(fmt, block=block)
    return replace(fmt, block=Block(1, "all"))


def _of_blocks(path: Path) -> list[Matrix]:
    model, loader = open_original(path, torch.float32)
    found: list[Matrix] = []
    for i in range(len(model.blocks)):
        for parameter in list_weights(model, i, ())[0]:
            read = partial(_read_part, loader, model.block_name(i), parameter)
            found += [Matrix(part, parameter.shape, partial(read, e)) for e, part in enumerate(parameter.parts())]
    return found


def _read_part(loader: OriginalLoader, block: str, parameter: WeightParameter, part: int) -> Float[torch.Tensor, "out in"]:
    made = loader.load(parameter.name)
    if parameter.name not in made:  # made of a tensor that becomes several parameters, and is found under the first one's name
        made = loader.load(f"{block}.")
    view = parameter.views(made[parameter.name])[part]
    return (view.T if parameter.transposed else view).float()


def _read(path: Path, chosen: Sequence[Matrix]) -> Iterator[tuple[str, Float[torch.Tensor, "out in"]]]:
    for matrix in chosen:
        w = matrix.read().float()
        if not bool(torch.isfinite(w).all()):
            raise NumericsError(f"{path}: tensor {matrix.name!r} holds a NaN or an infinity; repair the checkpoint.")
        if 0 < matrix.rows < w.shape[0]:
            w = w[torch.arange(matrix.rows) * w.shape[0] // matrix.rows]
        yield matrix.name, w.contiguous()
