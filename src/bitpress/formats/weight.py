"""CompressedWeight: a sum of terms between an input map and an output map.

    w_hat = T_out (sum of dequantized terms) T_in

Weights stacked along the rows (experts) may have maps of their own (`PartMaps`); each of them is such a product then. A term is anything with the verbs of `Term` and a row of the table `TERMS`: packed codes, low-rank pairs, sparse outliers.
The specification (JSON) and the tensors together are the whole weight. `expected` derives the tensors from the specification alone,
so that a reader can check a file before it reads any data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.devices import CPU
from bitpress.errors import FormatError
from bitpress.formats.format import Expected
from bitpress.formats.maps.map import MAPS, Map, split_kind
from bitpress.formats.maps.parts import PartMaps
from bitpress.formats.terms.dfloat11 import DFloat11
from bitpress.formats.terms.kept import Kept
from bitpress.formats.terms.low_rank import LowRank
from bitpress.formats.terms.packed import Packed
from bitpress.formats.terms.sign_low_rank import SignLowRank
from bitpress.formats.terms.sparse import Sparse
from bitpress.formats.terms.specs import covered

__all__ = ["TERMS", "CompressedWeight", "Term"]

# The decoded size is bounded by the stored size: beyond a million weights, at least 1/64 bit each. Otherwise a thin product or an
# empty term of a small file could ask for any amount of memory.
SMALL = 1 << 20
WEIGHTS_A_BIT = 64
ANY_MAPS: dict[str, Any] = {**MAPS, PartMaps.kind: PartMaps}


class Term(Protocol):
    """One summand of a weight `[out, in]`."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weights in float32."""
        ...

    def spec(self) -> dict[str, Any]:
        """Return the JSON fields that, with shape and tensors, define the term."""
        ...

    @staticmethod
    def expected(spec: Mapping[str, Any], shape: tuple[int, int]) -> Expected:
        """Return dtype and shape of every tensor of a specification. Raises FormatError or UsageError for a bad specification."""
        ...

    @classmethod
    def build(cls, spec: Mapping[str, Any], shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return a term of tensors whose names, dtypes and shapes were checked; `check` must still check their content."""
        ...

    def check(self) -> None:
        """Raise FormatError if the content is invalid for this term, above all content used as an address."""
        ...

    def row_slice(self, start: int, stop: int) -> Self:
        """Return some rows as a separate term. Raises FormatError if the rows cannot be separated."""
        ...

    @classmethod
    def stack_rows(cls, terms: Sequence[Self]) -> Self:
        """Stack terms along the rows. Raises FormatError if they are too different."""
        ...


TERMS: dict[str, type[Term]] = {
    "packed": Packed,
    "low_rank": LowRank,
    "sign_low_rank": SignLowRank,
    "sparse": Sparse,
    "kept": Kept,
    "dfloat11": DFloat11,
}


@dataclass(frozen=True)
class CompressedWeight:
    terms: tuple[Term, ...]
    input_map: Map | None = None
    output_map: Map | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self.tensors().values()), CPU)  # terms that are empty have no tensors

    @property
    def nbytes(self) -> int:
        """The bytes of all stored tensors: codes, parameters, maps."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / (self.shape[0] * self.shape[1])

    @property
    def parts(self) -> int:
        """The number of weights stacked along the rows that have maps of their own, 1 where none has."""
        return max(len(change.maps) if isinstance(change, PartMaps) else 1 for change in (self.input_map, self.output_map))

    def apart(self) -> list["CompressedWeight"]:
        """Return the parts of a stack, sharing memory; the weight itself where it has no maps of parts."""
        height = self.shape[0] // self.parts
        return [self] if self.parts == 1 else [self.row_slice(a, a + height) for a in range(0, self.shape[0], height)]

    def dequantize(self) -> Float[torch.Tensor, "out in"]:
        """Return the weight in float32, maps included."""
        if self.parts > 1:
            return torch.cat([part.dequantize() for part in self.apart()])
        w = self.terms[0].dequantize().to(self.device)  # a term without tensors is on no device
        for term in self.terms[1:]:
            w = w + term.dequantize().to(self.device)
        if self.input_map is not None:
            w = self.input_map.apply_transposed(w)
        if self.output_map is not None:
            w = self.output_map.apply(w.T).T
        return w

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all stored tensors by name: `term0.codes`, `term0.scale`, `in.scale`, `out.order`."""
        stored = {f"term{i}.{name}": t for i, term in enumerate(self.terms) for name, t in term.tensors.items()}
        for side, change in (("in", self.input_map), ("out", self.output_map)):
            if change is not None:
                stored |= {f"{side}.{name}": t for name, t in change.tensors().items()}
        return stored

    def spec(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "terms": [{"kind": term.kind, **term.spec()} for term in self.terms],
            "input_map": _map_spec(self.input_map),
            "output_map": _map_spec(self.output_map),
        }

    @staticmethod
    def expected(spec: Mapping[str, Any]) -> Expected:
        """Return dtype and shape of every tensor of a specification. Raises FormatError or UsageError."""
        shape = _shape(spec)
        tensors: Expected = {}
        for i, entry in enumerate(spec["terms"]):
            kind, rest = split_kind(entry, "term", TERMS)
            tensors |= {f"term{i}.{name}": t for name, t in TERMS[kind].expected(rest, shape).items()}
        parts = _parts(spec, shape[0])
        for side, key, size in (("in", "input_map", shape[1]), ("out", "output_map", shape[0] // parts)):
            if spec[key] is not None:
                kind, rest = split_kind(spec[key], "map", ANY_MAPS)
                tensors |= {f"{side}.{name}": t for name, t in ANY_MAPS[kind].expected(rest, size).items()}
        stored, weights = sum(dtype.itemsize * math.prod(dims) for dtype, dims in tensors.values()), shape[0] * shape[1]
        if weights > SMALL and stored * 8 * WEIGHTS_A_BIT < weights:
            raise FormatError(
                f"{stored} bytes are too few for a weight of shape {list(shape)}: less than 1/{WEIGHTS_A_BIT} bit per weight."
            )
        return tensors

    @classmethod
    def build(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "CompressedWeight":
        """Return a weight after checks: the exact set of names, dtypes, shapes, and content used as an address."""
        expected = cls.expected(spec)
        if set(expected) != set(tensors):
            raise FormatError(f"tensors {sorted(tensors)} where {sorted(expected)} are needed.")
        for name, (dtype, dims) in expected.items():
            if tensors[name].dtype != dtype or tuple(tensors[name].shape) != dims:
                got = f"{tensors[name].dtype} {list(tensors[name].shape)}"
                raise FormatError(f"{name} is {got} where {dtype} {list(dims)} is needed.")
        weight = cls._joined(spec, tensors)
        for part in (*weight.terms, weight.input_map, weight.output_map):
            if part is not None:
                part.check()
        return weight

    @classmethod
    def _joined(cls, spec: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "CompressedWeight":
        """Put a weight together from tensors that are the right ones."""
        shape = _shape(spec)
        terms: list[Term] = []
        for i, entry in enumerate(spec["terms"]):
            kind, rest = split_kind(entry, "term", TERMS)
            terms.append(TERMS[kind].build(rest, shape, _below(tensors, f"term{i}.")))
        changes: list[Map | None] = []
        for side, key in (("in", "input_map"), ("out", "output_map")):
            entry = spec[key]
            if entry is None:
                changes.append(None)
            else:
                kind, rest = split_kind(entry, "map", ANY_MAPS)
                changes.append(ANY_MAPS[kind].build(rest, _below(tensors, f"{side}.")))
        return cls(tuple(terms), changes[0], changes[1])

    def to(self, device: torch.device) -> "CompressedWeight":
        """Return the weight on another device, terms and maps; itself where it is there."""
        stored = self.tensors()
        if all(t.device == device for t in stored.values()):
            return self
        return self._joined(self.spec(), {name: t.to(device) for name, t in stored.items()})

    def row_slice(self, start: int, stop: int) -> "CompressedWeight":
        """Return some rows as a separate weight (one expert of a stack), sharing memory."""
        first, last = covered(self.shape[0], self.parts, start, stop)
        height = self.shape[0] // self.parts
        if self.output_map is not None and (self.parts == 1 or start % height or stop % height):
            raise FormatError("rows of a weight with an output map cannot be separated.")
        input_map, output_map = (
            PartMaps.of(change.maps[first:last]) if isinstance(change, PartMaps) else change
            for change in (self.input_map, self.output_map)
        )
        return CompressedWeight(tuple(t.row_slice(start, stop) for t in self.terms), input_map, output_map)

    def rows(self, index: Int[torch.Tensor, " count"]) -> Float[torch.Tensor, "count in"]:
        """Return some rows in float32, in any order. Of a weight in a single term of codes without maps, no others are decoded."""
        only = self.terms[0]
        if len(self.terms) > 1 or not isinstance(only, Packed) or self.input_map is not None or self.output_map is not None:
            return self.dequantize()[index]
        return only.rows(index)

    @staticmethod
    def stack_rows(weights: Sequence["CompressedWeight"]) -> "CompressedWeight":
        """Stack weights along the rows (experts); they must have the same kinds of terms and of maps.

        One without single weights apart may stand among others that have some.
        """
        kinds = [type(term) for term in max((w.terms for w in weights), key=len)]
        rows = [_with_kinds(w.terms, kinds) for w in weights]
        terms = tuple(kind.stack_rows([row[i] for row in rows]) for i, kind in enumerate(kinds))
        return CompressedWeight(
            terms, PartMaps.of([w.input_map for w in weights]), PartMaps.of([w.output_map for w in weights])
        )


def _with_kinds(terms: Sequence[Term], kinds: Sequence[type[Term]]) -> list[Term]:
    """Return terms of these kinds, an empty one where a sparse one is missing. Raises FormatError for other terms."""
    left, filled = list(terms), list[Term]()
    for kind in kinds:
        if left and type(left[0]) is kind:
            filled.append(left.pop(0))
        elif kind is Sparse:
            filled.append(Sparse.empty(terms[0].shape, _device_of(terms)))
        else:
            break
    if left or len(filled) < len(kinds):
        raise FormatError("only weights with the same kinds of terms, in the same order, can be stacked.")
    return filled


def _device_of(terms: Sequence[Term]) -> torch.device:
    return next((t.device for term in terms for t in term.tensors.values()), CPU)


def _map_spec(change: Map | None) -> dict[str, Any] | None:
    return None if change is None else {"kind": change.kind, **change.spec()}


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _parts(spec: Mapping[str, Any], rows: int) -> int:
    """Return the parts that have maps of their own, 1 where none has. Raises FormatError unless both maps agree and divide the rows."""
    maps = [spec[key] for key in ("input_map", "output_map") if isinstance(spec[key], Mapping)]
    counts = [change.get("parts") if change.get("kind") == PartMaps.kind else 1 for change in maps] or [1]
    parts = counts[0]
    if any(count != parts for count in counts) or type(parts) is not int or parts < 1 or rows % parts:
        raise FormatError(f"the maps of a weight of {rows} rows are of {counts} parts; one number must divide the rows.")
    return parts


def _shape(spec: Mapping[str, Any]) -> tuple[int, int]:
    if not isinstance(spec, Mapping) or set(spec) != {"shape", "terms", "input_map", "output_map"}:
        raise FormatError("a weight is specified by shape, terms, input_map and output_map, no more and no less.")
    shape = spec["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or any(type(d) is not int or not 0 < d < 2**31 for d in shape):
        raise FormatError(f"shape {shape!r} is not two whole numbers from 1 to 2^31 - 1.")
    if not isinstance(spec["terms"], list) or not spec["terms"]:
        raise FormatError("a weight needs a list of at least one term.")
    return shape[0], shape[1]
