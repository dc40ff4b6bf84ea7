"""The memory of a GPU that a run takes: the arithmetic of streaming, where a device holds one block at a time.

    outer        embeddings, head, last norm, in the type that the model computes in
    block        the largest block: as stored, and as computed with; once more in float32 where searches rescale it
    statistics   the squares of every input of a block, and the copies while the largest of them is completed
    batch        the activations of one batch in a block
    work         one weight's working set: copies in float32, the factors of its gram in float64; that of the output head if it is larger
    learning     of the largest span that is learned by gradients: what is learned, copies of its weights, activations of a batch
    backward     the whole model, its gradients' sums and one sample on the way back, where a method needs the loss's gradients
    proof        both models' outer parts and a block in float32, and the outputs of a sample

Of `backward`, `proof` and the rest together the largest counts: they follow one another. All are estimates on the safe side.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

from bitpress.calibration.stats import of_origin
from bitpress.devices import device_name, usable_bytes
from bitpress.errors import MemoryLimitError
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.host_memory import squares_of
from bitpress.pipeline.plan import Plan
from bitpress.recipes import Method

__all__ = ["DeviceMemory", "Sizes", "check_device", "estimate_device", "refuse_beyond"]

# Taken by CUDA and its libraries beside tensors, and the share that an allocator loses between tensors.
LIBRARIES, LOST = 700 * 2**20, 1.1


@dataclass(frozen=True)
class Sizes:
    """The sizes that the arithmetic takes.

    outer, block    values outside the blocks, and of the largest block; `blocks` is how many there are
    weights         shapes of the block's matrices, of experts each
    inputs          widths of the different inputs of a block's products
    itemsize        bytes of a value as computed with; `stored` of one in the source
    positions       of a sample; `batch` samples go through a block together
    outputs         values that the model says of a sample
    squares         statistics of the size of a gram, for each input; 0 where the method needs none
    backward        whether the loss's gradients are needed; `searches` whether a block is rescaled
    head            shape of the matrix outside the blocks that is compressed on the device, if there is one
    learning        bytes of what is learned by gradients, copies and activations of a batch too
    """

    outer: int
    block: int
    blocks: int
    weights: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    itemsize: int
    stored: int
    positions: int
    batch: int
    outputs: int
    squares: int
    backward: bool = False
    searches: bool = False
    head: tuple[int, int] | None = None
    learning: int = 0

    @classmethod
    def of(cls, model: StreamedModel, method: Method, plan: Plan) -> Self:
        config, calibration = model.model.config, method.recipe.calibration
        values = {name: p.numel() for name, p in model.model.named_parameters()}
        by_block = [
            sum(n for name, n in values.items() if name.startswith(f"{model.block_name(i)}.")) for i in range(plan.blocks)
        ]
        first = [w for w in plan.weights if w.block == plan.weights[0].block]
        groups = {(w.parameter.stem.rpartition(".")[0], w.parameter.shape[1]) for w in first}
        # Products under one name may have two inputs of one width: an attention's own, and that of its output.
        widths = (*(width for _, width in groups), next(w.parameter.shape[1] for w in first))
        experts = max(max(w.parameter.experts, 1) for w in first)
        total = sum(values.values())
        learning = plan.learning
        return cls(
            outer=total - sum(by_block),
            block=max(by_block),
            blocks=plan.blocks,
            weights=tuple(w.parameter.shape for w in first),
            inputs=widths * experts,
            itemsize=model.dtype.itemsize,
            stored=-(-plan.source_bytes // max(total, 1)),
            positions=model.task.positions(config, calibration.length),
            batch=method.recipe.batch,
            outputs=model.task.output_values(config, calibration.length),
            squares=squares_of(model, method) if method.needs else 0,
            backward=bool(of_origin(method.needs, "loss") or method.options),
            searches=bool(method.searches),
            head=next((found.planned.parameter.shape for found in plan.outer if found.last), None),
            learning=0 if learning is None else learning.beside + learning.batch * learning.window,
        )


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU by what they are for; `total` is what a run takes at most."""

    outer: int
    block: int
    statistics: int
    batch: int
    work: int
    backward: int
    proof: int
    learning: int = 0

    @classmethod
    def of(cls, sizes: Sizes) -> Self:
        """Do the arithmetic."""
        s, largest = sizes, max(rows * columns for rows, columns in sizes.weights)
        widest, through = max(s.inputs), max(max(shape) for shape in s.weights)
        copies = s.stored + s.itemsize + (4 if s.searches else 0)
        outputs = 4 * s.outputs
        grams = s.squares * 4 * sum(n * n for n in s.inputs) + (3 * 4 * widest**2 if s.squares else 0)
        whole = (s.blocks * s.block + s.outer) * s.itemsize
        head, head_in = (0, 0) if s.head is None else (s.head[0] * s.head[1], s.head[1])
        of_head = 5 * 4 * head + (4 + 3 * 8) * head_in**2 * bool(s.squares) + outputs * bool(s.squares)
        back = s.block * (s.itemsize + 4) + 16 * s.positions * sum(sum(shape) for shape in s.weights) + 4 * outputs
        return cls(
            outer=s.outer * s.itemsize,
            block=s.block * copies,
            statistics=grams,
            batch=s.batch * s.positions * through * 4 * 4 if s.squares else 0,
            work=max(5 * 4 * largest + (3 * 8 * widest**2 if s.squares else 0), of_head),
            backward=whole + back if s.backward else 0,
            proof=2 * s.outer * 4 + s.block * (4 + s.stored) + 3 * outputs,
            learning=s.learning,
        )

    @property
    def total(self) -> int:
        streaming = self.outer + self.block + self.statistics + max(self.batch, self.work, self.learning)
        return LIBRARIES + int(LOST * max(streaming, self.backward, self.proof))

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def estimate_device(model: StreamedModel, method: Method, plan: Plan) -> DeviceMemory | None:
    """Estimate what a run takes of its GPU; None where the processor computes."""
    return None if model.device.type == "cpu" else DeviceMemory.of(Sizes.of(model, method, plan))


def check_device(model: StreamedModel, method: Method, plan: Plan) -> None:
    """Raise MemoryLimitError where a run would take more memory of its GPU than it may; of the processor nothing is asked."""
    if model.device.type == "cuda":
        refuse_beyond(Sizes.of(model, method, plan), usable_bytes(model.device), device_name(model.device))


def refuse_beyond(sizes: Sizes, usable: int, device: str) -> None:
    """Raise MemoryLimitError where the arithmetic asks for more than is usable; say what would fit."""
    needed = DeviceMemory.of(sizes)
    if needed.total <= usable:
        return
    smaller: Sequence[int] = [
        b for b in range(sizes.batch - 1, 0, -1) if DeviceMemory.of(replace(sizes, batch=b)).total <= usable
    ]
    plain = replace(sizes, squares=0, backward=False)
    advice = "use --device cpu"
    if smaller:
        advice = f"--set batch={smaller[0]} fits"
    elif DeviceMemory.of(plain).total <= usable:
        advice = f"a method without statistics such as rtn fits ({DeviceMemory.of(plain).total:,}); or use --device cpu"
    parts = ", ".join(f"{name} {size:,}" for name, size in asdict(needed).items() if size)
    raise MemoryLimitError(
        f"{device}: about {needed.total:,} bytes of its memory are needed ({parts}) and {usable:,} may be used; {advice}."
    )
