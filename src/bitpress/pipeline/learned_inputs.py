"""The inputs of a block whose maps are learned: which weights share one, and where its channel factors can be folded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float

from bitpress.calibration import Stats
from bitpress.formats import CompressedWeight, InputFormat, Map, Packed
from bitpress.models.linears import list_weights
from bitpress.pipeline.calibration_stream import CalibrationStream
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.recoding import find_recode
from bitpress.quantizers.quantizer import is_served
from bitpress.transforms.folding import Fold, find_folds
from bitpress.tuning.folded import Folded, FoldedVector
from bitpress.tuning.learned_maps import MappedCodes, MappedWeight, MapTuning, SharedInput

__all__ = ["LearnedInputs", "begin_inputs"]


@dataclass
class LearnedInputs:
    """What is learned of a block's weights and of the vectors that take folded factors, by the names of parameters; why others stay."""

    weights: dict[str, MappedWeight] = field(default_factory=dict)
    vectors: dict[str, FoldedVector] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def begin_inputs(
    tuning: MapTuning,
    stream: CalibrationStream,
    block: int,
    planned: Sequence[PlannedWeight],
    made: Mapping[str, CompressedWeight],
    inputs: Mapping[str, InputFormat],
    originals: Mapping[str, Float[torch.Tensor, "out in"]],
    vectors: Mapping[str, torch.Tensor],
    stats: Mapping[str, Stats],
) -> LearnedInputs:
    """Return what a tuning learns of a loaded block.

    made       the compressed weights, with the formats of their `inputs` where these are rounded; `originals` are what they stand for
    vectors    the block's other tensors, as stored
    stats      of the inputs that the weights have, by the names of weights
    """
    found = LearnedInputs()
    by_stem = {p.parameter.stem: p for p in planned}
    able = {}
    for stem, p in by_stem.items():
        why = _why_not(tuning, p, made[p.parameter.name])
        if why is None:
            able[stem] = p
        else:
            found.notes[p.parameter.name] = why
    observed = stream.observe(list_weights(stream.model, block, ())[0])
    groups = stream.shared_inputs(block, observed)
    folds = _find_folds(tuning, stream, block, groups, able, made)
    prefix = stream.model.block_name(block)
    shared: dict[str, SharedInput] = {}
    folded: list[_Producer] = []
    for g, group in enumerate(groups):
        for alike in _alike([able[stem] for stem in group if stem in able], made):
            first = alike[0].parameter.name
            weight, fold = made[first], folds.get(g)
            taken = None if fold is None else _taken(fold, f"{prefix}.{fold.producer}", able, vectors, weight.device)
            names = [p.parameter.name for p in alike]
            rounded = [inputs[name] for name in names if name in inputs]
            own = SharedInput(tuning, weight.shape[1], weight.input_map, weight.device, folded=taken, rounded=rounded)
            shared |= dict.fromkeys(names, own)
            if fold is not None and taken is not None:
                folded.append(_Producer(f"{prefix}.{fold.producer}", own, taken))
    leads: set[int] = set()
    for p in able.values():
        name = p.parameter.name
        if name not in shared:
            found.notes[name] = "learns no map of an input that no token reached; it stays as it was"
            continue
        own, weight = shared[name], made[name]
        rows = tuple(one.shared for one in folded if one.is_matrix and one.name == p.parameter.stem)
        codes, why = _codes(tuning, p, weight, originals[name], own, rows, stats.get(p.parameter.stem))
        given = inputs.get(name)
        found.weights[name] = MappedWeight(
            weight, codes, given, leads=id(own) not in leads, transposed=p.parameter.transposed, told=why
        )
        leads.add(id(own))
    for one in folded:
        found.vectors |= one.vectors(vectors)
    return found


def _codes(
    tuning: MapTuning,
    p: PlannedWeight,
    weight: CompressedWeight,
    original: Float[torch.Tensor, "out in"],
    shared: SharedInput,
    rows: tuple[SharedInput, ...],
    stats: Stats | None,
) -> tuple[MappedCodes, str | None]:
    """Return the codes of a weight in the basis of its input, and why the recipe's quantizer does not choose them, where it does not."""
    (term,) = weight.terms
    assert isinstance(term, Packed)
    recode, why = find_recode(tuning, p.method, term.format, stats)
    clip, output_map = tuning.clip_weights, weight.output_map
    codes = MappedCodes(original, term.format, shared, clip=clip, rows=rows, output_map=output_map, recode=recode)
    return codes, why


@dataclass(frozen=True)
class _Producer:
    """A module that takes the factors of an input."""

    name: str
    shared: SharedInput
    folded: Folded

    @property
    def is_matrix(self) -> bool:
        return self.folded.stored is None

    def vectors(self, stored: Mapping[str, torch.Tensor]) -> dict[str, FoldedVector]:
        """Return its vectors that are divided: the weight of a norm, and a bias."""
        leaves = {f"{self.name}.{leaf}": leaf == "bias" for leaf in ("weight", "bias")[self.is_matrix :]}
        factors = self.shared.own["scales"]
        return {
            name: FoldedVector(self.folded, factors, stored[name], bias=bias) for name, bias in leaves.items() if name in stored
        }


def _why_not(tuning: MapTuning, p: PlannedWeight, weight: CompressedWeight) -> str | None:
    if p.parameter.experts or weight.parts > 1:
        return "learns no maps of experts; they stay as they were"
    if len(weight.terms) > 1 or not isinstance(weight.terms[0], Packed):
        return "learns no map of a weight with other terms beside its codes; it stays as it was"
    fmt = weight.terms[0].format
    return None if is_served(tuning.serves, fmt) else f"cannot learn codes of {fmt.name}; they stay as they were"


def _alike(group: Sequence[PlannedWeight], made: Mapping[str, CompressedWeight]) -> list[list[PlannedWeight]]:
    """Part weights that share an input by the maps that they have of it."""
    parts: list[list[PlannedWeight]] = []
    for p in group:
        change = made[p.parameter.name].input_map
        for part in parts:
            if _same(made[part[0].parameter.name].input_map, change):
                part.append(p)
                break
        else:
            parts.append([p])
    return parts


def _same(a: Map | None, b: Map | None) -> bool:
    if a is None or b is None:
        return a is b
    if (a.kind, a.spec()) != (b.kind, b.spec()):
        return False
    others = b.tensors()
    return all(torch.equal(t, others[name]) for name, t in a.tensors().items())


def _find_folds(
    tuning: MapTuning,
    stream: CalibrationStream,
    block: int,
    groups: Sequence[Sequence[str]],
    able: Mapping[str, PlannedWeight],
    made: Mapping[str, CompressedWeight],
) -> dict[int, Fold]:
    """Return where factors go, by the numbers of groups whose weights all take them alike."""
    if not tuning.scales:
        return {}
    whole = [
        g
        for g, group in enumerate(groups)
        if all(stem in able for stem in group) and len(_alike([able[stem] for stem in group], made)) == 1
    ]
    observed = stream.observe([able[stem].parameter for g in whole for stem in groups[g]])
    model, probe = stream.model, stream.probe()
    with model.unrounded(block):
        found = find_folds(
            model.blocks[block],
            lambda: model.run_block(block, probe),
            [[observed[stem][1] for stem in groups[g]] for g in whole],
        )
    return {whole[at]: fold for at, fold in found.items()}


def _taken(
    fold: Fold,
    producer: str,
    able: Mapping[str, PlannedWeight],
    vectors: Mapping[str, torch.Tensor],
    device: torch.device,
) -> Folded | None:
    """Return the producer of a fold that can take learned factors, None for one that cannot: a matrix that is not learned here."""
    if fold.kind == "rows":
        return Folded(fold, None, device) if producer in able else None
    stored = vectors.get(f"{producer}.weight")
    return None if stored is None else Folded(fold, stored, device)
