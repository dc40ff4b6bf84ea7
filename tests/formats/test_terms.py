"""Terms beside packed codes: laws over every row of TERMS, what each one is for, and what a hostile file may put into them."""

import doctest
import heapq
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.checkpoints.directory import INDEX_NAME, SINGLE_NAME
from bitpress.checkpoints.safetensors_file import read_header, read_tensor, serialize
from bitpress.errors import BitpressError, FormatError, NumericsError
from bitpress.formats import LOSSLESS, TERMS, CompressedLayer, CompressedWeight, Packed, Term, parse_format
from bitpress.formats.terms import dfloat11 as dfloat11_file
from bitpress.formats.terms.dfloat11 import BLOCK, LONGEST, DFloat11, dfloat11
from bitpress.formats.terms.kept import Kept, keep_columns, keep_rows
from bitpress.formats.terms.low_rank import LowRank, low_rank
from bitpress.formats.terms.sign_low_rank import sign_low_rank
from bitpress.formats.terms.sparse import Sparse, sparse
from bitpress.runtime.hf.layers import PackedLinear


def gaussian(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def packed(w: torch.Tensor, name: str) -> Packed:
    fmt = parse_format(name)
    params = fmt.fit(w)
    return Packed.pack(fmt, fmt.encode(w, params), params)


def some(count: int) -> torch.Tensor:
    """Half of the indices, the last one among them."""
    return torch.arange(count - 1, -1, -2)


MAKERS: dict[str, Callable[[torch.Tensor], Term]] = {
    "packed": lambda w: packed(w, "int4-row"),
    "packed of one tensor": lambda w: packed(w, "int4-tensor"),
    "low_rank fp16": lambda w: low_rank(w, min(2, *w.shape)),
    "low_rank bf16": lambda w: low_rank(w, 1, "bf16"),
    "low_rank 8 bits": lambda w: low_rank(w, min(3, *w.shape), "int8-row"),
    "low_rank of one scale": lambda w: low_rank(w, 1, "int8-tensor"),
    "sign_low_rank": lambda w: sign_low_rank(w, min(2, *w.shape)),
    "sign_low_rank 8 bits": lambda w: sign_low_rank(w, 1, "int8-row"),
    "sparse": lambda w: sparse(w, w.abs() > 1),
    "sparse of none": lambda w: sparse(w, torch.zeros_like(w, dtype=torch.bool)),
    "sparse of all": lambda w: sparse(w, torch.ones_like(w, dtype=torch.bool)),
    "kept columns": lambda w: keep_columns(w, some(w.shape[1]), parse_format("int4-row"))[0],
    "kept columns of one scale": lambda w: keep_columns(w, some(w.shape[1]), parse_format("int8-tensor"))[0],
    "kept rows": lambda w: keep_rows(w, some(w.shape[0]), parse_format("int4-row-zero"))[0],
    "kept none": lambda w: keep_columns(w, some(0), parse_format("int4-row"))[0],
    "dfloat11": lambda w: dfloat11(w.to(torch.bfloat16)),
}
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (16, 64), (33, 130)]


def rebuilt(weight: CompressedWeight) -> CompressedWeight:
    """The weight as a reader would put it together: from text, and from copies."""
    return CompressedWeight.build(json.loads(json.dumps(weight.spec())), {n: t.clone() for n, t in weight.tensors().items()})


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_row_of_the_table_is_made_here() -> None:
    assert {make(gaussian(4, 4)).kind for make in MAKERS.values()} == set(TERMS)
    assert all(term.kind == kind for kind, term in TERMS.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_a_term_is_read_back_and_bytes_are_what_is_stored(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    weight = CompressedWeight((MAKERS[name](gaussian(*shape)),))
    assert weight.shape == shape
    assert weight.dequantize().dtype == torch.float32
    assert same(rebuilt(weight).dequantize(), weight.dequantize())
    expected = CompressedWeight.expected(weight.spec())
    assert weight.nbytes == sum(dtype.itemsize * math.prod(dims) for dtype, dims in expected.values())
    # Through a file, whose rules are stricter than those of a dictionary: no empty tensor, only types that it knows.
    path = tmp_path / SINGLE_NAME
    path.write_bytes(b"".join(serialize(weight.tensors()))) if weight.tensors() else None
    stored = {n: read_tensor(path, entry) for n, entry in read_header(path)[0].items()} if weight.tensors() else {}
    assert same(CompressedWeight.build(weight.spec(), stored).dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", MAKERS)
def test_terms_are_stacked_and_cut_without_change(name: str) -> None:
    if name.startswith(("sparse", "kept rows")):
        experts = [gaussian(4, 24, seed) for seed in (1, 2, 3)]
    else:
        experts = [gaussian(4, 24, seed) * 10.0**seed for seed in (1, 2, 3)]  # nothing in common
    singles = [CompressedWeight((MAKERS[name](w),)) for w in experts]
    whole = rebuilt(CompressedWeight.stack_rows(singles))
    assert same(whole.dequantize(), torch.cat([s.dequantize() for s in singles]))
    for i, single in enumerate(singles):
        assert same(rebuilt(whole.row_slice(4 * i, 4 * i + 4)).dequantize(), single.dequantize())
    assert same(rebuilt(whole.row_slice(4, 12)).dequantize(), whole.dequantize()[4:])
    # Stacks of stacks, and an expert out of what was cut from one.
    twice = rebuilt(CompressedWeight.stack_rows([whole, whole]))
    assert same(twice.row_slice(8, 20).row_slice(4, 8).dequantize(), singles[0].dequantize())


@pytest.mark.parametrize("name", [n for n in MAKERS if not n.endswith(("tensor", "one scale"))])
def test_single_rows_are_cut_or_refused(name: str) -> None:
    stack = CompressedWeight.stack_rows([CompressedWeight((MAKERS[name](gaussian(6, 24, seed)),)) for seed in (4, 5)])
    for start, stop in ((0, 1), (2, 5), (7, 8), (9, 12)):
        if name == "dfloat11":
            with pytest.raises(FormatError, match="coded as one"):
                stack.row_slice(start, stop)
        else:
            cut = rebuilt(stack.row_slice(start, stop)).dequantize()
            # A product of other shapes may add up in another order: two terms of rounding error.
            torch.testing.assert_close(cut, stack.dequantize()[start:stop], rtol=0, atol=1e-6 if "low_rank" in name else 0)
    if "packed" not in name:
        for start, stop in ((-1, 3), (3, 3), (5, 2), (6, 13)):
            with pytest.raises(FormatError, match="rows"):
                stack.row_slice(start, stop)


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "kept none"])
def test_a_layer_of_a_model_holds_any_term(name: str) -> None:
    weight = CompressedWeight((MAKERS[name](gaussian(6, 20)),))
    layer = PackedLinear(CompressedLayer(weight), None, torch.float32)
    assert {key: t.dtype for key, t in layer.state_dict().items()} == {key: t.dtype for key, t in weight.tensors().items()}
    x, y = gaussian(3, 20, 1), gaussian(3, 20, 1) @ weight.dequantize().T
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-5)
    layer.to(torch.float64)  # the codes' types are their format
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-5)


def test_what_is_too_different_is_not_stacked() -> None:
    def stack(*terms: Term) -> CompressedWeight:
        return CompressedWeight.stack_rows([CompressedWeight((term,)) for term in terms])

    w, other = gaussian(4, 8), gaussian(4, 6)
    for name in ("low_rank fp16", "sparse", "kept columns", "dfloat11"):
        with pytest.raises(FormatError, match="can be stacked"):
            stack(MAKERS[name](w), MAKERS[name](other))
        with pytest.raises(FormatError, match="same kinds"):
            stack(MAKERS[name](w), MAKERS["packed"](w))
    with pytest.raises(FormatError, match="one rank"):
        stack(low_rank(w, 1), low_rank(w, 2))
    with pytest.raises(FormatError, match="one type"):
        stack(low_rank(w, 1), low_rank(w, 1, "bf16"))
    with pytest.raises(FormatError, match="one count"):
        stack(MAKERS["kept columns"](w), keep_columns(w, torch.tensor([0]), parse_format("int4-row"))[0])
    with pytest.raises(FormatError, match="ties rows together"):
        stack(*[keep_rows(w, some(4), parse_format("int4-tensor"))[0]] * 2)
    with pytest.raises(FormatError, match="inside a part"):
        stack(low_rank(w, 1), low_rank(w, 1)).row_slice(2, 6)


def test_a_sum_of_several_terms_is_cut_and_stacked() -> None:
    def press(seed: int) -> tuple[torch.Tensor, CompressedWeight]:
        w = gaussian(8, 32, seed)
        outliers = sparse(w, w.abs() > 2)
        kept, rest = keep_columns(w - outliers.dequantize(), torch.tensor([5, 1]), parse_format("int8-row"))
        codes = packed(rest, "int3-g16")
        pair = low_rank(rest - codes.dequantize(), 2, "int8-row")
        return w, CompressedWeight((codes, pair, outliers, kept))

    (w, one), (_, two) = press(6), press(7)
    errors = [float((w - sum(t.dequantize() for t in one.terms[:n])).norm()) for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]
    whole = rebuilt(CompressedWeight.stack_rows([one, two]))
    assert same(whole.dequantize(), torch.cat([one.dequantize(), two.dequantize()]))
    assert same(whole.row_slice(8, 16).dequantize(), two.dequantize())


# Low rank


@pytest.mark.parametrize(("dtype", "slack"), [("fp16", 1e-3), ("bf16", 8e-3), ("int8-row", 2e-2)])
def test_a_low_rank_term_is_the_nearest_of_its_rank(dtype: str, slack: float) -> None:
    residual = gaussian(48, 80) @ torch.diag(torch.logspace(0, -2, 80))
    s = torch.linalg.svdvals(residual)
    for rank in (1, 8, 48):
        term = low_rank(residual, rank, dtype)
        # Eckart and Young: what is left is the tail of the spectrum. Rounding adds 2^-11 (fp16), 2^-8 (bf16) or, in 8 bits,
        # largest / 127 / sqrt(12) with a largest of three or four standard deviations, per factor and relative to the product.
        left = float((residual - term.dequantize()).square().sum())
        tail, product = float(s[rank:].square().sum()), float(s[:rank].square().sum())
        assert tail * (1 - 1e-4) - 1e-6 <= left <= tail + slack**2 * product + 1e-6
        assert CompressedWeight((term,)).nbytes == (
            2 * rank * (48 + 80) if dtype != "int8-row" else rank * 128 + 2 * (48 + rank)
        )


def test_singular_values_in_one_factor_spare_the_weak_components() -> None:
    residual = gaussian(64, 64) @ torch.diag(torch.logspace(0, -3, 64))
    u, s, v = torch.linalg.svd(residual)
    exact = (u[:, :16] * s[:16]) @ v[:16]
    ours = low_rank(residual, 16, "int8-row").dequantize()
    split = LowRank.store(u[:, :16] * s[:16].sqrt(), s[:16, None].sqrt() * v[:16], "int8-row").dequantize()

    def weak(w: torch.Tensor) -> float:
        """How wrong the last component is, relative to its size."""
        return float(abs(u[:, 15] @ (w - exact) @ v[15]) / s[15])

    assert weak(ours) < 0.01
    assert weak(ours) < weak(split)


def test_a_factor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(NumericsError, match="fp16"):
        low_rank(torch.full((4, 4), 1e5), 1)
    assert torch.isfinite(low_rank(torch.full((4, 4), 1e5), 1, "bf16").dequantize()).all()
    with pytest.raises(NumericsError, match="NaN"):
        low_rank(torch.full((4, 4), math.nan), 1)
    for rank in (0, 5):
        with pytest.raises(FormatError, match="rank is"):
            low_rank(torch.ones(4, 6), rank)


# Sparse


def test_the_worked_example_of_compressed_rows() -> None:
    w = torch.tensor([[0.0, 2, 0], [0, 0, 0], [1, 0, 3]])
    term = sparse(w, w != 0)
    assert term.tensors["row_start"].tolist() == [0, 1, 1, 3]
    assert term.tensors["column"].to(torch.int32).tolist() == [1, 0, 2]
    assert term.tensors["value"].tolist() == [2, 1, 3]
    assert same(term.dequantize(), w)


def test_an_outlier_costs_32_bits_and_a_row_32_more() -> None:
    w = gaussian(64, 512)
    term = sparse(w, w.abs() > 2)
    count = int((w.abs() > 2).sum())
    assert CompressedWeight((term,)).nbytes == 4 * count + 4 * (64 + 1)
    assert same(term.dequantize(), torch.where(w.abs() > 2, w.half().float(), 0.0))


@pytest.mark.parametrize(("cols", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_columns_are_as_narrow_as_the_weight_allows(cols: int, dtype: torch.dtype) -> None:
    w = torch.zeros(2, cols)
    w[0, -1] = w[1, 0] = 1.0
    term = sparse(w, w != 0)
    assert term.tensors["column"].dtype == dtype
    stacked = rebuilt(CompressedWeight.stack_rows([CompressedWeight((term,))] * 2))
    assert same(stacked.dequantize(), torch.cat([w, w]))


def test_an_outlier_beyond_half_precision_is_refused() -> None:
    with pytest.raises(NumericsError, match="fp16"):
        sparse(torch.full((1, 2), 1e5), torch.tensor([[True, False]]))
    with pytest.raises(FormatError, match="the mask is"):
        sparse(torch.zeros(2, 2), torch.ones(2, 2))


# Kept


@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_kept_and_the_others_add_up_to_the_weight(axis: str) -> None:
    w = gaussian(24, 40)
    keep = keep_columns if axis == "columns" else keep_rows
    chosen = torch.tensor([17, 3, 9, 3])  # in any order, and twice is once
    kept, rest = keep(w, chosen, parse_format("int8-row"))
    index = (slice(None), [3, 9, 17]) if axis == "columns" else ([3, 9, 17],)
    assert kept.count == 3
    zeroed = torch.zeros(24, 40, dtype=torch.bool)
    zeroed[index] = True
    assert same(rest, torch.where(zeroed, 0.0, w))
    assert same(kept.dequantize(), torch.where(zeroed, kept.dequantize(), 0.0))
    assert same(kept.dequantize()[index], packed(w[index], "int8-row").dequantize())
    assert (kept.dequantize() + rest - w).abs().max() < w.abs().max() / 200
    with pytest.raises(FormatError, match="are not among"):
        keep(w, torch.tensor([40]), parse_format("int8-row"))


def test_two_complementary_terms_cost_1_61_bits() -> None:
    """PTQ1.61: one column in five in 4 bits, the others binary: the published 1.61 bits, masks and scales included."""

    def spec(count: int, name: str) -> dict[str, Any]:
        return {"kind": "kept", "axis": "columns", "count": count, "format": name}

    whole = {"shape": [4096, 4096], "input_map": None, "output_map": None}
    whole["terms"] = [spec(819, "int4-row"), spec(4096 - 819, "binary-row")]
    stored = sum(dtype.itemsize * math.prod(dims) for dtype, dims in CompressedWeight.expected(whole).values())
    assert abs(stored * 8 / 4096**2 - 1.61) < 0.005

    w = gaussian(16, 40)
    salient, others = torch.arange(0, 40, 5), torch.tensor([i for i in range(40) if i % 5])
    terms = (keep_columns(w, salient, parse_format("int4-row"))[0], keep_columns(w, others, parse_format("binary-row"))[0])
    decoded = rebuilt(CompressedWeight(terms)).dequantize()
    assert same(decoded[:, salient], packed(w[:, salient], "int4-row").dequantize())
    assert same(decoded[:, others], packed(w[:, others], "binary-row").dequantize())


# DFloat11


def test_every_pattern_of_16_bits_comes_back() -> None:
    patterns = torch.arange(1 << 16).to(torch.int16)  # -0, denormals, infinities and all NaNs among them
    shuffled = patterns[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    for bits in (patterns.view(256, 256), shuffled.view(64, 1024)):
        term = rebuilt(CompressedWeight((dfloat11(bits.view(torch.bfloat16)),))).terms[0]
        assert isinstance(term, DFloat11)
        assert torch.equal(term.decode().view(torch.int16), bits)
        assert torch.equal(term.dequantize().view(torch.int32), bits.to(torch.int32) << 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_lossless_format_takes_every_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16).to(torch.int16).view(64, 1024)
    w = patterns.view(torch.bfloat16).to(dtype)
    assert torch.equal(LOSSLESS["dfloat11"].encode(w).decode().view(torch.int16), patterns)


@pytest.mark.parametrize("w", [torch.tensor([[1 + 2.0**-9]]), torch.tensor([[1 + 2.0**-40]], dtype=torch.float64)])
def test_the_lossless_format_refuses_more_digits(w: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="more digits"):
        LOSSLESS["dfloat11"].encode(w)


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 700),
    used=st.integers(1, 256),
    skew=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_distribution_of_exponents_comes_back(rows: int, cols: int, used: int, skew: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.exp(-skew * torch.arange(used))[torch.randperm(used, generator=generator)].double() + 1e-9
    symbols = torch.randperm(256, generator=generator)[:used]
    exponents = symbols[torch.multinomial(chance, rows * cols, replacement=True, generator=generator)].view(rows, cols)
    raw = torch.randint(0, 256, (rows, cols), generator=generator)
    bits = ((raw & 0x80) << 8 | exponents << 7 | raw & 0x7F).to(torch.int16)
    whole = rebuilt(CompressedWeight((dfloat11(bits.view(torch.bfloat16)),)))
    assert torch.equal(whole.dequantize().view(torch.int32), bits.to(torch.int32) << 16)


@pytest.mark.parametrize("weights", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 3 * BLOCK])
def test_blocks_end_anywhere(weights: int) -> None:
    experts = [gaussian(1, weights, seed).to(torch.bfloat16) for seed in range(3)]
    stack = CompressedWeight.stack_rows([CompressedWeight((dfloat11(w),)) for w in experts])
    assert torch.equal(rebuilt(stack).dequantize(), torch.cat(experts).float())


def test_more_blocks_than_are_worked_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(7, 1500).to(torch.bfloat16)
    at_once = dfloat11(w)
    monkeypatch.setattr(dfloat11_file, "_ENCODED_TOGETHER", 3)
    monkeypatch.setattr(dfloat11_file, "_DECODED_TOGETHER", 4)
    by_three = dfloat11(w)
    assert all(
        torch.equal(at_once.tensors[n].view(torch.uint8), by_three.tensors[n].view(torch.uint8)) for n in at_once.tensors
    )
    assert torch.equal(by_three.dequantize(), w.float())


def entropy(w: torch.Tensor) -> float:
    counts = torch.bincount(((w.view(torch.int16).int() >> 7) & 0xFF).reshape(-1)).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum())


def test_gaussian_weights_take_about_11_bits() -> None:
    w = (gaussian(512, 1024) * 0.02).to(torch.bfloat16)
    bits = CompressedWeight((dfloat11(w),)).bits_per_weight
    # Above the entropy: at most what whole bits a symbol cost here, 0.06, and 20 bits a block of 1,024.
    assert 8 + entropy(w) < bits < 8 + entropy(w) + 0.08
    assert 10.5 < bits < 11


def huffman(counts: list[int]) -> tuple[int, int]:
    """Bits of an unlimited Huffman code, the sum of all merges, and its longest code."""
    heap = [(c, 0) for c in counts if c]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        (a, deep), (b, deeper) = heapq.heappop(heap), heapq.heappop(heap)
        cost += a + b
        heapq.heappush(heap, (a + b, max(deep, deeper) + 1))
    return cost, heap[0][1]


@given(counts=st.lists(st.integers(0, 300), min_size=2, max_size=256).filter(lambda counts: sum(map(bool, counts)) > 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_code_lengths_are_a_complete_code_and_the_best_one(counts: list[int]) -> None:
    lengths = dfloat11_file._code_lengths(torch.tensor(counts)).tolist()
    assert max(lengths) <= LONGEST
    assert sum(2.0**-n for n in lengths if n) == 1
    assert [n > 0 for n in lengths] == [c > 0 for c in counts]
    best, longest = huffman(counts)
    cost = sum(n * count for n, count in zip(lengths, counts, strict=True))
    assert cost == best if longest <= LONGEST else cost >= best


@pytest.mark.parametrize("exponent", [0, 100, 255])
def test_a_part_of_one_exponent_takes_a_bit_a_weight(exponent: int) -> None:
    w = torch.full((3, 8), exponent << 7, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    term = dfloat11(w)
    assert term.tensors["lengths"].sum() == 2
    assert term.tensors["codes"].numel() == 3
    assert torch.equal(term.decode().view(torch.int16), w.view(torch.int16))


def test_a_code_that_would_be_longer_is_cut_to_12_bits() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = dfloat11_file._code_lengths(torch.tensor(counts)).tolist()
    best, longest = huffman(counts)
    assert longest == 29
    assert max(lengths) == LONGEST
    assert sum(2.0**-n for n in lengths) == 1
    assert best < sum(n * count for n, count in zip(lengths, counts, strict=True)) < 1.01 * best


def test_a_weight_of_another_type_is_refused() -> None:
    with pytest.raises(FormatError, match="bfloat16"):
        dfloat11(torch.zeros(2, 2))


def test_the_worked_example_of_dfloat11() -> None:
    result = doctest.testmod(dfloat11_file)
    assert result.attempted == 3
    assert result.failed == 0


SMOLLM2 = Path("~/.cache/bitpress/models/smollm2-135m").expanduser()


@pytest.mark.skipif(not (SMOLLM2 / SINGLE_NAME).exists(), reason="SmolLM2-135M is not in the cache")
def test_real_weights_shrink_to_70_per_cent_and_come_back() -> None:
    assert not (SMOLLM2 / INDEX_NAME).exists()
    entries = read_header(SMOLLM2 / SINGLE_NAME)[0]
    for leaf in ("self_attn.q_proj", "mlp.down_proj"):
        w = read_tensor(SMOLLM2 / SINGLE_NAME, entries[f"model.layers.3.{leaf}.weight"])
        weight = CompressedWeight((dfloat11(w),))
        assert 0.65 < weight.bits_per_weight / 16 < 0.71
        assert torch.equal(rebuilt(weight).terms[0].decode().view(torch.int16), w.view(torch.int16))


# Hostile content. Whatever a file holds, building and decoding end with a weight of the right shape or with a FormatError.


def attempt(spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return CompressedWeight.build(spec, tensors).dequantize()


@pytest.mark.parametrize("name", MAKERS)
def test_a_wrong_length_type_or_set_of_tensors_is_refused(name: str) -> None:
    weight = CompressedWeight((MAKERS[name](gaussian(6, 20)),))
    spec, tensors = weight.spec(), weight.tensors()
    with pytest.raises(FormatError):
        attempt(spec, {**tensors, "term0.more": torch.zeros(1)})
    for leaf, t in tensors.items():
        wrong = [t[:-1], torch.cat([t.view(torch.uint8), t.view(torch.uint8)]).view(t.dtype), t[None], t.view(torch.int8)]
        for changed in wrong:
            with pytest.raises(FormatError):
                attempt(spec, {**tensors, leaf: changed})
        with pytest.raises(FormatError):
            attempt(spec, {n: v for n, v in tensors.items() if n != leaf})


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "kept none"])  # which has no tensors to disagree with
def test_a_wrong_specification_is_refused(name: str) -> None:
    weight = CompressedWeight((MAKERS[name](gaussian(6, 20)),))
    tensors, (term,) = weight.tensors(), weight.spec()["terms"]
    values = (
        -1,
        10**6,
        2**31,
        2**63,
        10**40,
        2.5,
        math.nan,
        True,
        None,
        "",
        "x",
        "int4",
        "int4-g7",
        "-",
        [],
        {},
        [1],
        "ab" * 999,
    )
    for key in {*term, "parts", "more"}:
        for value in values:
            with pytest.raises(BitpressError):
                attempt({**weight.spec(), "terms": [{**term, key: value}]}, tensors)
    for key in set(term):
        with pytest.raises(BitpressError):
            attempt({**weight.spec(), "terms": [{k: v for k, v in term.items() if k != key}]}, tensors)
    if name != "packed":  # rows that share nothing are any number of parts
        with pytest.raises(FormatError):
            attempt({**weight.spec(), "terms": [{**term, "parts": 2}]}, tensors)
    for shape in ([20, 6], [2**31 - 1, 2**31 - 1], [2**31 - 1, 20]):
        with pytest.raises(FormatError):
            attempt({**weight.spec(), "shape": shape}, tensors)


@pytest.mark.parametrize("name", MAKERS)
def test_random_bytes_give_a_weight_or_an_error(name: str) -> None:
    weight = CompressedWeight((MAKERS[name](gaussian(6, 260)),))
    generator = torch.Generator().manual_seed(1)
    for i in range(30):
        tensors = {n: t.clone() for n, t in weight.tensors().items()}
        for leaf in sorted(tensors):
            if torch.rand((), generator=generator) < 0.6:
                as_bytes = tensors[leaf].view(torch.uint8).reshape(-1)
                count = as_bytes.numel() if i % 2 else 1  # everything, or one byte
                at = torch.randperm(as_bytes.numel(), generator=generator)[:count]
                as_bytes[at] = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
        try:
            assert attempt(weight.spec(), tensors).shape == weight.shape
        except FormatError:
            continue


@pytest.mark.parametrize(
    "term",
    [
        {"kind": "low_rank", "rank": 1, "dtype": "fp16"},
        {"kind": "low_rank", "rank": 1, "dtype": "int8-row"},
        {"kind": "sparse", "count": 0},
        {"kind": "kept", "axis": "columns", "count": 0, "format": "int4-row"},
        {"kind": "kept", "axis": "rows", "count": 1, "format": "int4-row"},
    ],
)
def test_a_small_file_does_not_ask_for_much_memory(term: dict[str, Any]) -> None:
    for shape in ([2**20, 2**20], [2**24, 8192], [8192, 2**24]):
        with pytest.raises(FormatError, match="too few"):
            CompressedWeight.expected({"shape": shape, "terms": [term], "input_map": None, "output_map": None})


def changed(weight: CompressedWeight, leaf: str, value: Any, at: Any = None) -> dict[str, torch.Tensor]:
    """The tensors with one replaced, or with some elements of it replaced."""
    tensors = {n: t.clone() for n, t in weight.tensors().items()}
    target = tensors[f"term0.{leaf}"]
    new = target.to(torch.int64) if not target.is_floating_point() else target.clone()
    if at is None:
        new = torch.as_tensor(value)
    else:
        new[at] = value
    return {**tensors, f"term0.{leaf}": new.to(target.dtype)}


SPARSE = torch.tensor([[0.0, 2, 4], [0, 0, 0], [1, 0, 3]])


@pytest.mark.parametrize(
    ("leaf", "value", "text"),
    [
        ("row_start", [1, 2, 2, 4], "rise from 0"),
        ("row_start", [0, 2, 2, 3], "rise from 0"),
        ("row_start", [0, 2, 2, 5], "rise from 0"),
        ("row_start", [0, 3, 2, 4], "rise from 0"),
        ("row_start", [0, -1, 2, 4], "rise from 0"),
        ("row_start", [0, 2**31 - 1, -(2**31), 4], "rise from 0"),
        ("row_start", [-(2**31), 2, 2, 4], "rise from 0"),
        ("row_start", [0, 4, 4, 4], "do not rise within"),
        ("column", [2, 1, 0, 2], "do not rise within"),
        ("column", [1, 1, 0, 2], "do not rise within"),
        ("column", [1, 2, 0, 3], "is not one of the 3"),
        ("column", [1, 65535, 0, 2], "is not one of the 3"),
        ("value", [1, 2, math.nan, 4], "NaN"),
        ("value", [1, 2, math.inf, 4], "NaN"),
    ],
)
def test_rows_and_columns_that_lead_nowhere_are_refused(leaf: str, value: list[float], text: str) -> None:
    weight = CompressedWeight((sparse(SPARSE, SPARSE != 0),))
    assert isinstance(weight.terms[0], Sparse)
    with pytest.raises(FormatError, match=text):
        CompressedWeight.build(weight.spec(), changed(weight, leaf, value))


def test_columns_of_32_bits_are_checked_below_zero_too() -> None:
    w = torch.zeros(1, 70000)
    w[0, [3, 69999]] = 1.0
    weight = CompressedWeight((sparse(w, w != 0),))
    for column in ([-1, 3], [-70000, 3], [3, 70000], [3, -(2**31)], [3, 2**31 - 1]):
        with pytest.raises(FormatError, match="is not one of"):
            CompressedWeight.build(weight.spec(), changed(weight, "column", column))


@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("value", [0b0011, 0b0001_0011, 0b1000_0011, 0b1000_0111, 0b1110_0111, 255, 0])
def test_a_mask_of_another_count_or_beyond_the_end_is_refused(axis: str, value: int) -> None:
    keep = keep_columns if axis == "columns" else keep_rows
    kept, _ = keep(gaussian(5, 5), torch.tensor([0, 1, 2]), parse_format("int4-row"))
    weight = CompressedWeight((kept,))
    assert isinstance(kept, Kept)
    legal = changed(weight, "mask", [[0b1_1001]])
    assert CompressedWeight.build(weight.spec(), legal).dequantize().ne(0).any(0 if axis == "columns" else 1).tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]
    if value != 0b0001_0011:  # three of five: another legal mask
        with pytest.raises(FormatError, match="mask"):
            CompressedWeight.build(weight.spec(), changed(weight, "mask", [[value]]))


def test_a_mask_of_one_part_does_not_stand_for_another() -> None:
    """Six columns over two parts of three each are not four and two."""
    experts = [keep_columns(gaussian(2, 8, s), torch.tensor([0, 1, 2]), parse_format("int4-row"))[0] for s in (1, 2)]
    stack = CompressedWeight.stack_rows([CompressedWeight((e,)) for e in experts])
    with pytest.raises(FormatError, match="mask"):
        CompressedWeight.build(stack.spec(), changed(stack, "mask", [[0b1111], [0b11]]))


def test_a_sick_factor_or_scale_inside_is_refused() -> None:
    for name in ("low_rank fp16", "low_rank bf16", "low_rank 8 bits", "kept columns", "kept rows"):
        weight = CompressedWeight((MAKERS[name](gaussian(6, 20)),))
        floats = [n for n, t in weight.tensors().items() if t.is_floating_point()]
        assert floats
        for leaf in floats:
            with pytest.raises(FormatError, match="NaN or an infinity"):
                CompressedWeight.build(weight.spec(), changed(weight, leaf.removeprefix("term0."), math.inf, at=(0, 0)))


def coded() -> CompressedWeight:
    return CompressedWeight((dfloat11(gaussian(4, 700, 3).to(torch.bfloat16)),))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        ((0, 0), 1, "complete prefix code"),  # one more: Kraft's sum above 1
        ((0, slice(None)), 0, "complete prefix code"),
        ((0, slice(None)), 1, "complete prefix code"),
        ((0, slice(None)), 12, "complete prefix code"),  # 256 of 4,096: below 1
        ((0, 0), 13, "longer than 12"),
        ((0, 0), 255, "longer than 12"),
    ],
)
def test_lengths_that_are_no_complete_code_are_refused(at: Any, value: int, text: str) -> None:
    weight = coded()
    with pytest.raises(FormatError, match=text):
        CompressedWeight.build(weight.spec(), changed(weight, "lengths", value, at))


def test_blocks_that_end_elsewhere_are_refused() -> None:
    weight = coded()
    sizes = weight.tensors()["term0.sizes"].to(torch.int64)
    assert sizes.shape == (1, 3)
    assert sizes.sum() == weight.tensors()["term0.codes"].numel()
    for text, moved in (
        ("do not cover its codes exactly", [[1, 0, 0]]),
        ("do not cover its codes exactly", [[0, 0, -1]]),
        ("fewer or more bytes", [[-int(sizes[0, 0]), int(sizes[0, 0]), 0]]),
        ("fewer or more bytes", [[65535, 0, 0]]),
    ):
        with pytest.raises(FormatError, match=text):
            CompressedWeight.build(weight.spec(), changed(weight, "sizes", (sizes + torch.tensor(moved)).clamp(0, 65535)))
    # The bytes add up, but no block's codes fill it: only decoding can tell.
    with pytest.raises(FormatError, match="does not end at its stated length"):
        attempt(weight.spec(), changed(weight, "sizes", sizes + torch.tensor([[1, -1, 0]])))
    with pytest.raises(FormatError, match="does not end at its stated length"):
        attempt(weight.spec(), changed(weight, "sizes", sizes + torch.tensor([[0, -1, 1]])))


def test_codes_that_run_over_their_block_are_refused() -> None:
    weight = coded()
    for value in (255, 0):  # the longest and the shortest code again and again
        with pytest.raises(FormatError, match="does not end at its stated length"):
            attempt(weight.spec(), changed(weight, "codes", value, slice(None)))


def test_bits_behind_the_end_of_a_block_must_be_zeros() -> None:
    w = torch.tensor([[1.0, 2, 1]], dtype=torch.bfloat16)  # two exponents, a bit each: 3 of 8 bits
    weight = CompressedWeight((dfloat11(w),))
    assert weight.tensors()["term0.codes"].tolist() == [0b01000000]
    for value in (0b01000001, 0b01010000):
        with pytest.raises(FormatError, match="does not end at its stated length"):
            attempt(weight.spec(), changed(weight, "codes", [value]))
    assert attempt(weight.spec(), changed(weight, "codes", [0b10100000])).tolist() == [[2, 1, 2]]
