"""Rotations are orthogonal, what their formula says, small to store, and refused when a file holds something else."""

import json

import pytest
import torch

from bitpress.errors import FormatError
from bitpress.formats import MAPS, Affine, Chain, CompressedWeight, Hadamard, Kronecker, Map, Permutation, Scale, parse_format
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.formats.maps.rotations import LARGEST, core_of, hadamard_matrix
from bitpress.formats.terms.packed import Packed


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Widths of models: 576 and 1536 of SmolLM2, 11008 of Llama 2 (43 * 256), 4864 of Qwen 2, and the smallest.
CORES = {1: 1, 2: 1, 4096: 1, 576: 36, 1536: 12, 14336: 28, 5120: 20, 4864: 76, 18944: 148, 11008: 43, 3: 3, 40: 20, 24: 12}


@pytest.mark.parametrize("size", CORES)
def test_the_core_is_the_smallest_known_matrix(size: int) -> None:
    assert core_of(size) == CORES[size]


@pytest.mark.parametrize("order", [1, 2, 16, 12, 20, 28, 36, 44, 60, 68, 76, 108, 140, 148])
def test_matrices_of_hadamard_orders_are_of_ones_with_orthogonal_rows(order: int) -> None:
    h = hadamard_matrix(order)
    assert torch.equal(h.abs(), torch.ones(order, order))
    assert torch.equal(h @ h.T, order * torch.eye(order))  # whole numbers: exact


@pytest.mark.parametrize("order", [3, 9, 43])
def test_other_orders_are_nearly_flat(order: int) -> None:
    h = hadamard_matrix(order)
    # An entry is a sum of two cosines, right to 2^-24; a product of rows adds up `order` such squares.
    torch.testing.assert_close(h @ h.T, order * torch.eye(order), rtol=0, atol=order * order * 2.0**-22)
    assert h.abs().max() <= 2**0.5 + 1e-6


@pytest.mark.parametrize(("size", "block"), [(576, 576), (48, 12), (64, 16), (43, 43), (10, 2), (7, 1)])
def test_a_hadamard_map_is_its_formula(size: int, block: int) -> None:
    change = Hadamard.random(size, block, seeded())
    one = torch.kron(hadamard_matrix(change.core), hadamard_matrix(block // change.core)) / block**0.5
    signs = torch.tensor([1.0 - 2 * (int(change.signs[i // 8]) >> i % 8 & 1) for i in range(size)])
    dense = torch.block_diag(*[one] * (size // block)) @ torch.diag(signs)
    x = torch.randn(3, 2, size, generator=seeded(1))
    torch.testing.assert_close(change.apply(x), x @ dense.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(change.apply_transposed(x), x @ dense, rtol=0, atol=1e-5)
    assert change.tensors()["signs"].numel() == (size + 7) // 8
    assert 0 < int((signs < 0).sum()) < size or size < 8


@pytest.mark.parametrize("size", [576, 43, 1, 24])
def test_a_kronecker_map_is_its_formula(size: int) -> None:
    change = Kronecker.random(size, seeded())
    dense = torch.kron(change.left, change.right)
    x = torch.randn(5, size, generator=seeded(1))
    torch.testing.assert_close(change.apply(x), x @ dense.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(change.apply_transposed(x), x @ dense, rtol=0, atol=1e-5)
    assert abs(change.left.shape[0] - change.right.shape[0]) <= size - 1
    change.check()


MAKERS = {
    "hadamard": lambda n, s: Hadamard.random(n, n, seeded(s)),
    "hadamard blocks": lambda n, s: Hadamard.random(n, 8, seeded(s)),
    "kronecker": lambda n, s: Kronecker.random(n, seeded(s)),
    "affine": lambda n, s: Affine(*(torch.eye(m) + 0.1 * torch.randn(m, m, generator=seeded(s)) for m in (4, n // 4))),
    "scale": lambda n, s: Scale(torch.rand(n, generator=seeded(s)) + 0.5),
    "permutation": lambda n, s: Permutation(torch.randperm(n, generator=seeded(s)).to(torch.int32)),
    "reassembly": lambda n, s: Reassembly(torch.arange(n, dtype=torch.int32), torch.arange(n, dtype=torch.int32)),
    "chain": lambda n, s: Chain((MAKERS["scale"](n, s), MAKERS["permutation"](n, s), MAKERS["kronecker"](n, s))),
}


def test_every_map_is_made_here() -> None:
    assert {name.split()[0] for name in MAKERS} == set(MAPS)


@pytest.mark.parametrize("name", MAKERS)
def test_the_dual_undoes_the_transpose(name: str) -> None:
    change: Map = MAKERS[name](48, 0)
    x = torch.randn(4, 48, generator=seeded(1))
    torch.testing.assert_close(change.dual().apply_transposed(change.apply(x)), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(change.apply_transposed(change.dual().apply(x)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_a_weight_between_maps_is_read_back(name: str) -> None:
    fmt = parse_format("int4-g16")
    w = torch.randn(24, 48, generator=seeded(2))
    params = fmt.fit(w)
    term = Packed.pack(fmt, fmt.encode(w, params), params)
    weight = CompressedWeight((term,), MAKERS[name](48, 0), MAKERS[name](24, 1))
    assert weight.input_map is not None
    assert weight.output_map is not None
    spec = json.loads(json.dumps(weight.spec()))
    again = CompressedWeight.build(spec, {n: t.clone() for n, t in weight.tensors().items()})
    assert torch.equal(again.dequantize(), weight.dequantize())
    x = torch.randn(5, 48, generator=seeded(3))
    y = weight.output_map.apply(weight.input_map.apply(x) @ term.dequantize().T)
    torch.testing.assert_close(x @ weight.dequantize().T, y, rtol=0, atol=1e-4)


BAD = {
    "no keys": {},
    "a key too many": {"size": 16, "block": 16, "core": 1, "seed": 0},
    "another width": {"size": 32, "block": 16, "core": 1},
    "a block that does not divide": {"size": 16, "block": 12, "core": 12},
    "no power of two": {"size": 16, "block": 16, "core": 5},
    "no core": {"size": 16, "block": 16, "core": 0},
    "not a number": {"size": 16, "block": 16, "core": True},
    "a list": {"size": 16, "block": [16], "core": 1},
}


@pytest.mark.parametrize("spec", BAD.values(), ids=BAD)
def test_a_bad_hadamard_specification_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="hadamard map"):
        Hadamard.expected(spec, 16)


def test_factors_are_bounded() -> None:
    with pytest.raises(FormatError, match="at most 1024"):
        Hadamard.expected({"size": 2 * LARGEST, "block": 2 * LARGEST, "core": 2 * LARGEST}, 2 * LARGEST)
    with pytest.raises(FormatError, match="has a factor above"):
        Kronecker.expected({"left": 1}, 1031)
    with pytest.raises(FormatError, match="does not fit"):
        Hadamard.random(1031 * 8, 1031 * 8, seeded())


@pytest.mark.parametrize("spec", [{}, {"left": 5}, {"left": 0}, {"left": "4"}, {"left": True}, {"left": 4, "right": 4}])
def test_a_bad_kronecker_specification_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="kronecker map"):
        Kronecker.expected(spec, 16)


def test_content_that_is_no_rotation_is_refused() -> None:
    change = Kronecker.random(16, seeded())
    bad = change.left.clone()
    bad[0, 0] += 1e-3
    for left in (bad, change.left * 2, change.left * torch.nan):
        with pytest.raises(FormatError, match="left of a kronecker map is not orthogonal"):
            Kronecker(left, change.right).check()
    signs = Hadamard.random(12, 12, seeded()).signs
    Hadamard(12, 12, 12, signs).check()
    with pytest.raises(FormatError, match="beyond its width"):
        Hadamard(12, 12, 12, signs | torch.tensor([0, 16], dtype=torch.uint8)).check()


def test_an_affine_map_that_cannot_be_undone_is_refused() -> None:
    eye, half = torch.eye(4), torch.eye(4)
    half[3, 3] = 1e-5
    Affine(eye, half * 0 + 2 * eye).check()
    for bad, why in ((half, "cannot be inverted"), (eye * torch.nan, "NaN"), (eye * 0, "cannot be inverted")):
        with pytest.raises(FormatError, match=f"right of an affine map .*{why}"):
            Affine(eye, bad).check()
    with pytest.raises(FormatError, match="without an inverse"):
        Affine(eye, eye * 0).dual()
    for spec, size in (({}, 16), ({"left": 5}, 16), ({"left": True}, 16), ({"left": 1}, 1031)):
        with pytest.raises(FormatError, match="affine map"):
            Affine.expected(spec, size)
