"""What becomes of every compressed weight in an export: carried over with its codes, decoded, or rounded again. Nothing in silence."""

from collections.abc import Collection

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import UsageError
from bitpress.exchange.source import Exporter, Fate, Fates, Target

__all__ = ["plan_fates"]


def plan_fates(
    checkpoint: CompressedCheckpoint, name: str, exporter: Exporter, requantize: bool, tables: Collection[str]
) -> Fates:
    """Say what becomes of every compressed weight by an exporter, which has this name.

    Embeddings and output head that the target cannot hold are decoded, or rounded again where it has compressed tables of its own;
    `tables` are those whose rows are looked up. Raises UsageError for weights of blocks that it cannot hold, unless they may be rounded again.
    """
    target = exporter.target
    fates: dict[str, Fate] = {}
    outside = set(checkpoint.outer)
    for parameter, record in checkpoint.manifest.weights.items():
        why = "every weight is decoded" if target is None else _refusal(parameter, record, target, tables)
        if why is not None and record.input is not None:
            raise UsageError(
                f"{checkpoint.root}: {parameter}: the input of its product is rounded ({record.input['format']}), which {name} cannot say "
                f"of such a layer ({why}); without it the model would compute something else."
            )
        if why is None:
            fates[parameter] = Fate("exact")
        elif target is None or (parameter in outside and not target.tables):
            fates[parameter] = Fate("decoded", why=why)
        else:
            fates[parameter] = _other(checkpoint, parameter, record, target, why)
    if target is None:
        return fates
    blocked = {parameter: fate for parameter, fate in fates.items() if fate.how != "exact" and parameter not in outside}
    if blocked and not requantize:
        first, fate = next(iter(blocked.items()))
        raise UsageError(
            f"{checkpoint.root}: {len(blocked)} of {len(fates)} weights cannot be carried over to {name}, first {first}: {fate.why}. "
            "--requantize rounds them again and tells the error that this adds."
        )
    return fates


def _refusal(parameter: str, record: WeightRecord, target: type[Target], tables: Collection[str]) -> str | None:
    if record.experts:
        return "it is a stack of experts"
    if record.transposed and not target.transposed:
        return "its module (Conv1D) holds the weight transposed, which this tool does not read compressed"
    if parameter in tables and not target.tables:
        return "its rows are looked up"
    return target.refuses(record.spec, record.input)


def _other(checkpoint: CompressedCheckpoint, parameter: str, record: WeightRecord, target: type[Target], why: str) -> Fate:
    """Return the fate of a weight that cannot be carried over."""
    rows, columns = record.spec["shape"]
    format = None if record.experts else target.nearest(checkpoint.bits_of([parameter]), (rows, columns))
    return Fate("decoded", why=why) if format is None else Fate("rounded", format, why)
