"""Laws of terms and maps: what is stored means what a plain formula in torch over the stored tensors says, for every row of the tables.

That terms are read back, cut and stacked without change is held by tests/formats/test_terms.py over the same rows.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import MAPS, TERMS, Affine, Chain, CompressedWeight, Map, Packed, Permutation, Scale, Term, parse_format
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.formats.maps.rotations import Hadamard, Kronecker, hadamard_matrix
from bitpress.formats.terms.dfloat11 import dfloat11
from bitpress.formats.terms.kept import keep_columns
from bitpress.formats.terms.low_rank import low_rank
from bitpress.formats.terms.sign_low_rank import sign_low_rank
from bitpress.formats.terms.sparse import sparse

Tensors = Mapping[str, torch.Tensor]
OUT, IN = 6, 24
EPS = torch.finfo(torch.float32).eps


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(w: torch.Tensor, name: str = "int4-row") -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def bits(stored: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Read `count` codes of `width` bits a row, the lowest bit first."""
    ones = (stored[..., None].to(torch.int64) >> torch.arange(8)) & 1
    each = ones.reshape(stored.shape[0], -1)[:, : width * count].reshape(stored.shape[0], count, width)
    return (each << torch.arange(width)).sum(-1)


# ------------------------------------------------------------------------------------------------------------------- terms


def scattered(t: Tensors) -> torch.Tensor:
    w = torch.zeros(OUT, IN)
    for row in range(OUT):
        at = slice(int(t["row_start"][row]), int(t["row_start"][row + 1]))
        w[row, t["column"][at].long()] = t["value"][at].float()
    return w


def four_bits(t: Tensors) -> torch.Tensor:
    return (bits(t["codes"], 4, t["codes"].shape[1] * 2).float() - 8) * t["scale"].float()


def in_place(t: Tensors) -> torch.Tensor:
    w = torch.zeros(OUT, IN)
    there = bits(t["mask"], 1, IN)[0].bool()
    inner = {"codes": t["kept.codes"], "scale": t["kept.scale"]}
    w[:, there] = four_bits(inner)[:, : int(there.sum())]
    return w


W = draw(OUT, IN)
MADE: dict[str, tuple[Term, Callable[[Tensors], torch.Tensor]]] = {
    "packed": (packed(W), four_bits),
    "low_rank": (low_rank(W, 2), lambda t: t["a"].float() @ t["b"].float()),
    "sign_low_rank": (
        sign_low_rank(W, 2),
        lambda t: (2 * bits(t["signs"], 1, IN) - 1) * (t["a"].float() @ t["b"].float()),
    ),
    "sparse": (sparse(W, W.abs() > 1), scattered),
    "kept": (keep_columns(W, torch.arange(1, IN, 3), parse_format("int4-row"))[0], in_place),
    "dfloat11": (dfloat11(W.bfloat16()), lambda t: W.bfloat16().float()),  # its code is read back bit for bit or not at all
}


@pytest.mark.parametrize("kind", TERMS)
def test_a_term_means_what_its_formula_says(kind: str) -> None:
    term, formula = MADE[kind]
    assert term.kind == kind
    # A product of rank 2, or of a code and its scale: two roundings, each of a part of the largest value.
    torch.testing.assert_close(term.dequantize(), formula(term.tensors), rtol=0, atol=2 * EPS * float(W.abs().max()))


# -------------------------------------------------------------------------------------------------------------------- maps


def hadamard(change: Hadamard) -> torch.Tensor:
    """Return the matrix: signs first, then in every block the core beside Sylvester's doubling, divided by the root of the block."""
    whole = hadamard_matrix(change.core)
    while len(whole) < change.block:
        whole = torch.kron(whole, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    signs = 1 - 2 * bits(change.signs[None], 1, change.size)[0].float()
    return torch.block_diag(*[whole / math.sqrt(change.block)] * (change.size // change.block)) * signs


def matrix(change: Map) -> torch.Tensor:
    """Return T of `apply`, T x, in float32."""
    if isinstance(change, Chain):
        return functools.reduce(lambda whole, step: matrix(step) @ whole, change.maps[1:], matrix(change.maps[0]))
    if isinstance(change, Scale):
        return torch.diag(change.scale)
    if isinstance(change, Permutation):
        return torch.eye(len(change.order))[change.order.long()]
    if isinstance(change, (Kronecker, Affine)):
        return torch.kron(change.left, change.right)
    if isinstance(change, Reassembly):
        return reassembly(change)
    assert isinstance(change, Hadamard)
    return hadamard(change)


def reassembly(change: Reassembly) -> torch.Tensor:
    """Return the matrix position by position, as the map's head says it."""
    n, rows = len(change.into), torch.zeros(len(change.into), len(change.into))
    into, copied = change.into.tolist(), change.copied.tolist()
    for i in range(n):
        if into[i] == i:
            group = [c for c in range(n) if into[c] == i]
            parts = 1 + sum(into[k] != k and copied[k] == i for k in range(n))
            rows[i, group] = 1.0 if change.sums else 1 / len(group) / parts
        else:
            parts = 1 + sum(into[k] != k and copied[k] == copied[i] for k in range(n))
            rows[i, copied[i]] = 1.0 if change.sums else 1 / parts
    return rows


def reassembled(size: int) -> Reassembly:
    """Average three channels, and two others; split the first channel into three, and the last into two."""
    into, copied = torch.arange(size, dtype=torch.int32), torch.arange(size, dtype=torch.int32)
    into[[2, 4, 8]] = torch.tensor([5, 5, 7], dtype=torch.int32)
    copied[[2, 4, 8]] = torch.tensor([0, 0, size - 1], dtype=torch.int32)
    return Reassembly(into, copied)


def make(kind: str, size: int) -> Map:
    generator = torch.Generator().manual_seed(size)
    order = Permutation.of(torch.randperm(size, generator=generator))
    scale = Scale(torch.rand(size, generator=generator) + 0.5)
    whole: dict[str, Callable[[], Map]] = {
        "scale": lambda: scale,
        "permutation": lambda: order,
        "hadamard": lambda: Hadamard.random(size, size, generator),
        "kronecker": lambda: Kronecker.random(size, generator),
        "reassembly": lambda: reassembled(size),
        "affine": lambda: Affine(*(torch.eye(n) + 0.1 * torch.randn(n, n, generator=generator) for n in (4, size // 4))),
        "chain": lambda: Chain((scale, order, Hadamard.random(size, size // 2, generator))),
    }
    return whole[kind]()


# 24 has a Hadamard matrix of order 12 doubled, 20 one of order 20; sums of `size` values of at most 1.5 times the vector's.
@pytest.mark.parametrize("size", [24, 40])
@pytest.mark.parametrize("kind", MAPS)
def test_a_map_is_its_matrix(kind: str, size: int) -> None:
    change = make(kind, size)
    assert change.kind == kind
    x, y, whole = draw(3, size, seed=1), draw(3, size, seed=2), matrix(change)
    bound = 1.5 * size * EPS * float(x.norm(dim=1).max() + y.norm(dim=1).max())
    torch.testing.assert_close(change.apply(x), x @ whole.T, rtol=0, atol=bound)
    torch.testing.assert_close(change.apply_transposed(x), x @ whole, rtol=0, atol=bound)
    if isinstance(change, Reassembly):  # no change of basis: it keeps products where channels that are averaged are alike
        x = x[:, change.into.long()]
    # <T x, T^-T y> = <x, y>: a weight whose rows change by the dual keeps its products.
    torch.testing.assert_close(
        (change.apply(x) * change.dual().apply(y)).sum(1), (x * y).sum(1), rtol=0, atol=bound * float(x.norm(dim=1).max())
    )


@pytest.mark.parametrize("after", [None, *MAPS])
@pytest.mark.parametrize("before", [None, *MAPS])
def test_a_weight_between_maps_is_read_back_and_is_the_product(before: str | None, after: str | None) -> None:
    size = 40
    w = draw(size, IN, seed=3)
    weight = CompressedWeight(
        (packed(w), low_rank(w, 2)), None if before is None else make(before, IN), None if after is None else make(after, size)
    )
    inner = torch.eye(IN) if weight.input_map is None else matrix(weight.input_map)
    outer = torch.eye(size) if weight.output_map is None else matrix(weight.output_map)
    plain = weight.terms[0].dequantize() + weight.terms[1].dequantize()
    bound = 1.5 * (size + IN) * EPS * float(torch.linalg.matrix_norm(plain, 2))
    torch.testing.assert_close(weight.dequantize(), outer @ plain @ inner, rtol=0, atol=bound)
    read = CompressedWeight.build(
        json.loads(json.dumps(weight.spec())), {name: t.clone() for name, t in weight.tensors().items()}
    )
    assert torch.equal(read.dequantize(), weight.dequantize())


def test_a_permutation_has_16_bits_a_channel_up_to_their_range_and_old_ones_are_read() -> None:
    w = draw(16, IN, seed=4)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    narrow, wide = (CompressedWeight((packed(w),), m) for m in (Permutation.of(order), Permutation(order.to(torch.int32))))
    assert narrow.nbytes == wide.nbytes - 2 * IN
    assert wide.spec()["input_map"] == {"kind": "permutation"}
    for weight in (narrow, wide):
        read = CompressedWeight.build(json.loads(json.dumps(weight.spec())), weight.tensors())
        assert torch.equal(read.dequantize(), narrow.dequantize())
    assert Permutation.of(torch.arange(65536)).order.dtype == torch.uint16
    assert Permutation.of(torch.arange(65537)).order.dtype == torch.int32
    Permutation.of(torch.arange(65536).flip(0)).check()
    for bad in ({"bits": 32}, {"bits": True}, {"bits": 16, "more": 1}):
        with pytest.raises(FormatError, match="bits: 16"):
            Permutation.expected(bad, 8)
    with pytest.raises(FormatError, match="bits: 16"):
        Permutation.expected({"bits": 16}, 65537)
    with pytest.raises(FormatError, match="exactly once"):
        Permutation(torch.tensor([0, 2, 2], dtype=torch.uint16)).check()
