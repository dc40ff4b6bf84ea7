"""What becomes of every compressed weight in an export: carried over with its codes, decoded, or rounded again. Nothing in silence."""

from bitpress.checkpoints.compressed import HEAD_NAME, CompressedCheckpoint
from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import UsageError
from bitpress.exchange.source import Exporter, Fate, Fates, Target

__all__ = ["is_table", "plan_fates"]


def plan_fates(checkpoint: CompressedCheckpoint, name: str, exporter: Exporter, requantize: bool) -> Fates:
    """Say what becomes of every compressed weight by an exporter, which has this name.

    Embeddings and output head that the target cannot hold are decoded, or rounded again where it has compressed tables of its own. Raises UsageError for weights of blocks that it cannot hold, unless
    they may be rounded again.
    """
    target = exporter.target
    if target is None:
        return dict.fromkeys(checkpoint.manifest.weights, Fate("decoded", why="every weight is decoded"))
    fates: dict[str, Fate] = {}
    outside = set(checkpoint.outer)
    for parameter, record in checkpoint.manifest.weights.items():
        why = _refusal(checkpoint, parameter, record, target)
        if why is None:
            fates[parameter] = Fate("exact")
        elif parameter in outside and not target.tables:
            fates[parameter] = Fate("decoded", why=why)
        else:
            fates[parameter] = _other(checkpoint, parameter, record, target, why)
    blocked = {parameter: fate for parameter, fate in fates.items() if fate.how != "exact" and parameter not in outside}
    if blocked and not requantize:
        first, fate = next(iter(blocked.items()))
        raise UsageError(
            f"{checkpoint.root}: {len(blocked)} of {len(fates)} weights cannot be carried over to {name}, first {first}: {fate.why}. "
            "--requantize rounds them again and tells the error that this adds; a recipe for this target avoids it (--for)."
        )
    return fates


def _refusal(checkpoint: CompressedCheckpoint, parameter: str, record: WeightRecord, target: type[Target]) -> str | None:
    if record.experts:
        return "it is a stack of experts"
    if parameter in checkpoint.outer and not target.tables and is_table(checkpoint, parameter):
        return "its rows are looked up"
    return target.refuses(record.spec, record.input)


def is_table(checkpoint: CompressedCheckpoint, parameter: str) -> bool:
    """Whether rows of a matrix outside the blocks are looked up: it is not, or not only, the output head."""
    file = checkpoint.tensors[checkpoint.stored[parameter][0]][0].name
    return file != HEAD_NAME or parameter in checkpoint.manifest.aliases.values()


def _other(checkpoint: CompressedCheckpoint, parameter: str, record: WeightRecord, target: type[Target], why: str) -> Fate:
    """Return the fate of a weight that cannot be carried over."""
    rows, columns = record.spec["shape"]
    format = (
        None if record.experts or record.input is not None else target.nearest(checkpoint.bits_of([parameter]), (rows, columns))
    )
    return Fate("decoded", why=why) if format is None else Fate("rounded", format, why)
