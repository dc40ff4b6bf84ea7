"""What becomes of every compressed weight in an export: carried over with its codes, decoded, or rounded again. Nothing in silence."""

from collections.abc import Collection

from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.hub_names import HubNames
from bitpress.checkpoints.records import WeightRecord
from bitpress.errors import UsageError
from bitpress.exchange.pieces import pieces_of, refuse_pieces
from bitpress.exchange.source import Exporter, Fate, Fates, Target

__all__ = ["plan_fates"]


def plan_fates(
    checkpoint: CompressedCheckpoint, name: str, exporter: Exporter, requantize: bool, tables: Collection[str], names: HubNames
) -> Fates:
    """Say what becomes of every compressed weight by an exporter, which has this name.

    Embeddings and output head that the target cannot hold are decoded, or rounded again where it has compressed tables of its own;
    `tables` are those whose rows are looked up,
    `names` the tensors of parameters. Raises UsageError for weights of blocks that it cannot hold, unless they may be rounded again.
    """
    target = exporter.target
    fates: dict[str, Fate] = {}
    outside = set(checkpoint.outer)
    for parameter, record in checkpoint.manifest.weights.items():
        why = "every weight is decoded" if target is None else _refusal(parameter, record, target, tables, names)
        if why is not None and record.input is not None:
            more = "" if why.startswith("the input of its product is rounded (") else f" ({why})"
            raise UsageError(
                f"{checkpoint.root}: {parameter}: the input of its product is rounded ({record.input['format']}), which {name} cannot say "
                f"of such a layer{more}; without it the model would compute something else. Quantize the original model without `inputs`, or "
                "with those that the target has."
            )
        if why is None:
            fates[parameter] = Fate("exact")
        elif target is None or (parameter in outside and not target.tables):
            fates[parameter] = Fate("decoded", why=why)
        else:
            fates[parameter] = _other(checkpoint, parameter, record, target, why, names)
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


def _refusal(
    parameter: str, record: WeightRecord, target: type[Target], tables: Collection[str], names: HubNames
) -> str | None:
    if record.experts and not target.experts:
        return "it is a stack of experts, which this tool does not read compressed"
    if record.experts:
        shape = record.parameter(parameter).parameter_shape
        pieces = () if record.transposed else pieces_of(names, parameter, shape)
        return refuse_pieces(record.spec, pieces, target, record.input)
    if record.transposed and not target.transposed:
        return "its module (Conv1D) holds the weight transposed, which this tool does not read compressed"
    if parameter in tables and not target.tables:
        return "its rows are looked up"
    return target.refuses(record.spec, record.input)


def _other(
    checkpoint: CompressedCheckpoint, parameter: str, record: WeightRecord, target: type[Target], why: str, names: HubNames
) -> Fate:
    """Return the fate of a weight that cannot be carried over."""
    shapes = set() if record.experts else {(record.spec["shape"][0], record.spec["shape"][1])}
    if record.experts and target.experts and not record.transposed:
        pieces = pieces_of(names, parameter, record.parameter(parameter).parameter_shape)
        shapes = {(piece.shape[0], piece.shape[1]) for piece in pieces if len(piece.shape) == 2 and len(pieces) > 1}
    bits = checkpoint.bits_of([parameter])
    formats = {target.nearest(bits, shape) for shape in shapes}
    format = formats.pop() if len(formats) == 1 else None
    return Fate("decoded", why=why) if format is None else Fate("rounded", format, why)
