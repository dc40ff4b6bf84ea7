"""Laws of quantizers, over every row of the table."""

import dataclasses
import fnmatch
from typing import Any, ClassVar

import pytest
import torch
from covering import cover

from bitpress.calibration import Stats
from bitpress.errors import BitpressError, FormatError
from bitpress.formats import GRIDS, SHORT, CompressedWeight, Format, Packed, parse_format
from bitpress.quantizers.awq import AWQ
from bitpress.quantizers.quantizer import LOOSE, Outcome, output_error
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.table import QUANTIZERS

FORMATS = ("int4-g16-zero", "int3-g32", "int2-row-zero", "int4-2x16-zero", "int8-tensor", "int5-g64-bf16")


def narrow(name: str) -> bool:
    """Whether rows of 64 inputs are whole blocks, and whole runs of blocks that share the float16 of their scales."""
    try:
        parse_format(name).expected((24, 64))
    except FormatError:
        return False
    return True


# Every grid of the table, at its most usual in a small weight, and the formats that have a name of their own.
EVERY = (
    *FORMATS,
    *(row.in_block("g16") for row in GRIDS.values()),
    *filter(narrow, SHORT),
    "int4-g16-zero-s6",
    "nf4-g16-dq",
    "int4-8x1",
    "binary-row",
    "binary-tensor",
)


def case(seed: int = 0, out: int = 24, inner: int = 64) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.rand(inner, generator=generator)
    x = torch.randn(400, inner, generator=generator) @ mix
    w, gram = torch.randn(out, inner, generator=generator), x.T @ x / 400
    felt = torch.rand(out, generator=generator) + 0.5
    return w, Stats(400, gram, x.abs().mean(0), sensitivity=torch.outer(felt, gram.diagonal()))


def serves(name: str, fmt: str) -> bool:
    """A method may say which formats it serves; one that says nothing serves all."""
    found = [pattern for pattern in QUANTIZERS[name].serves if fnmatch.fnmatchcase(parse_format(fmt).name, pattern.lstrip("!"))]
    return bool(found) and not any(pattern.startswith("!") for pattern in found)


def served(name: str, fmt: str) -> str:
    """The format, or where the method does not serve it the first one that it does."""
    return next(f for f in (fmt, *EVERY) if serves(name, f))


def kind(fmt: str) -> tuple[str, ...]:
    """Formats of one kind have the same sort of grid, of block, of stored scale and of zero point; their levels differ."""
    parsed = parse_format(fmt)
    block = parsed.block.name if parsed.block.cols == "all" else "group" if parsed.block.rows == 1 else "tile"
    return (type(parsed.grid).__name__, block, parsed.scale, str([p.name for p in parsed.grid.params]))


# Pairs of many seconds, each weight left out in turn on a grid that searches: the method and the grid are tried with others every day.
LONG = {("spqr", "dual2-g16"), ("spqr", "olive4a-g16")}
PAIRS = [
    pytest.param(*p.values, marks=pytest.mark.release) if p.values in LONG else p
    for p in cover(list(QUANTIZERS), EVERY, kind, always=FORMATS)
]


@pytest.mark.parametrize(("name", "fmt"), PAIRS)
def test_no_worse_than_rounding_on_what_it_measures(name: str, fmt: str) -> None:
    if not serves(name, fmt):
        w, stats = case()
        with pytest.raises(FormatError, match="serves"):
            QUANTIZERS[name]().quantize(w, stats, parse_format(fmt))
        return
    check_error(QUANTIZERS[name](), fmt)


@pytest.mark.parametrize("name", ["rtn", "gptq", "ldlq", "awq"])
@pytest.mark.parametrize("fmt", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_types_of_llama_cpp_are_no_worse_than_rounding(name: str, fmt: str) -> None:
    """Their rows are whole runs of 256 weights."""
    w, stats = case(out=8, inner=256)
    parsed, method = parse_format(fmt), QUANTIZERS[name]()
    ours, plain = (q.quantize(w, stats, parsed).weight.dequantize() for q in (method, RTN()))
    measured = stats if method.needs else None
    if name == "awq":
        measured = dataclasses.replace(stats, gram=own_parts(stats.need_gram("test"), parsed.block.resolve((8, 256), 1)[1]))
    assert output_error(w, ours, measured) <= output_error(w, plain, measured) * (1 + 4 * SUMS)


# Errors are sums over 64 inputs and 24 outputs in float32: each of the two that are compared is off by at most so many roundings.
SUMS = 2 * (64 + 24) * 2.0**-24


# A relative squared error at which books of this small case hold nearly every weight: what is left is how finely values are stored (half
# precision, salient weights in 8 bits), and says nothing of a method.
EXACT = 2e-6


def own_parts(gram: torch.Tensor, cols: int) -> torch.Tensor:
    """Return the gram with zeros outside the squares of `cols` inputs along its diagonal."""
    number = torch.arange(gram.shape[0]) // cols
    return gram * (number[:, None] == number)


def check_error(quantizer: Any, fmt: str) -> None:
    """Hold a method to its declaration: no worse than rounding, or, without least squares, at most so many times as far away."""
    w, stats = case()
    parsed = parse_format(fmt)
    # Without statistics a method can only mean the weight itself.
    measured = stats if quantizer.needs else None
    weight = quantizer.quantize(w, stats, parsed).weight
    ours = weight.dequantize()
    plain = RTN().quantize(w, None, parsed).weight.dequantize()
    if isinstance(quantizer, AWQ):
        # It weighs every block by its own part of the gram and leaves out what blocks have in common: that is held to its word.
        measured = dataclasses.replace(stats, gram=own_parts(stats.need_gram("test"), parsed.block.resolve((24, 64), 1)[1]))
    limit = 1 + SUMS if quantizer.least_squares else LOOSE
    assert output_error(w, ours, measured) <= max(output_error(w, plain, measured) * limit, EXACT)
    # What is stored is what a reader of the specification looks for, so that its bytes are those that the format has.
    assert torch.equal(CompressedWeight.build(weight.spec(), weight.tensors()).dequantize(), ours)


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Rounds up or down by chance, right on average: what is no least squares."""

    seed: int = 0
    least_squares: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()

    def quantize(self, w: torch.Tensor, stats: Stats | None, fmt: Format) -> Outcome:
        params = fmt.fit(w)
        scale = params["scale"].repeat_interleave(w.shape[1] // params["scale"].shape[1], 1)
        scale = scale.repeat_interleave(w.shape[0] // scale.shape[0], 0)
        chance = torch.rand(w.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5
        codes = fmt.encode(w + chance * scale, params)
        return Outcome(CompressedWeight((Packed.pack(fmt, codes, params),)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_method_may_say_that_it_is_no_least_squares(fmt: str) -> None:
    for seed in range(3):
        check_error(Stochastic(seed), fmt)
        with pytest.raises(AssertionError):
            check_error(Stochastic(seed, least_squares=True), fmt)


def test_no_declaration_frees_a_method_of_all_bounds() -> None:
    class Zeros(Stochastic):
        def quantize(self, w: torch.Tensor, stats: Stats | None, fmt: Format) -> Outcome:
            return super().quantize(w * 0, stats, fmt)

    with pytest.raises(AssertionError):
        check_error(Zeros(), "int4-g16-zero")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_same_input_gives_the_same_bytes(name: str) -> None:
    w, stats = case(1)
    parsed = parse_format(served(name, "int3-g16-zero"))
    first, second = (QUANTIZERS[name]().quantize(w, stats, parsed).weight for _ in range(2))
    for leaf, value in first.tensors().items():
        assert torch.equal(value, second.tensors()[leaf])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_whether_it_keeps_a_map_is_known_before(name: str) -> None:
    made = QUANTIZERS[name]()
    w, stats = case()
    weight = made.quantize(w, stats, parse_format(served(name, "int3-g16-zero"))).weight
    assert ((weight.input_map, weight.output_map) != (None, None)) == made.keeps_map


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_weight_is_left_alone(name: str) -> None:
    w, stats = case(2)
    before, gram = w.clone(), stats.need_gram("test").clone()
    QUANTIZERS[name]().quantize(w, stats, parse_format(served(name, "int4-g16")))
    assert torch.equal(w, before)
    assert torch.equal(stats.need_gram("test"), gram)


SICK: dict[str, Any] = {
    "zero columns": lambda g: g * (torch.arange(64) % 3 != 0).float()[:, None] * (torch.arange(64) % 3 != 0).float(),
    "rank one": lambda g: torch.outer(g[0], g[0]) / g[0, 0],
    "huge": lambda g: g * 1e30,
    "tiny": lambda g: g * 1e-30,
}


# The first step of every method's ladder of damping: what it adds to the gram's diagonal, in parts of the diagonal's mean.
DAMP = 0.01


@pytest.mark.parametrize("sickness", SICK)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_sick_statistics_end_no_further_away_than_rounding(name: str, sickness: str) -> None:
    """A gram that says nothing of some directions must not let the weight run away along them.

    Methods solve with the damped gram G + DAMP m I, m the mean of its diagonal. With e the error of a method and r that of rounding,
    no worse than rounding there means  e G e' + DAMP m |e|^2 <= r G r' + DAMP m |r|^2,  hence  |e|^2 <= |r|^2 + r G r' / (DAMP m).
    Rounding errors point anywhere, so r G r' is about m |r|^2: the weight ends within some 10 rounding errors, whatever G is. The sums
    here are in float64; SUMS is for those of the method itself. A method that needs no statistics is not touched by sick ones.
    """
    w, stats = case(3)
    sick = dataclasses.replace(stats, gram=SICK[sickness](stats.need_gram("test")))
    fmt = parse_format(served(name, "int4-g16-zero"))
    quantizer = QUANTIZERS[name]()
    gram = sick.need_gram("test").double()
    mean = gram.diagonal().mean()
    gram = (gram / mean + DAMP * torch.eye(len(gram))) if quantizer.needs else torch.eye(len(gram), dtype=torch.float64)
    errors = []
    for w_hat in (quantizer.quantize(w, sick, fmt).weight.dequantize(), RTN().quantize(w, None, fmt).weight.dequantize()):
        assert torch.isfinite(w_hat).all()
        error = (w_hat - w).double()
        errors.append(float((error @ gram * error).sum()))
    assert errors[0] <= errors[1] * (1 + SUMS if quantizer.least_squares else LOOSE)


# Methods whose rows are not apart, where the rows of the result depend on the order of all.
ROWS_TOGETHER = {
    "aqlm": "one codebook for all rows, begun with some of them by number",
    "bitstack": "singular vectors of the whole weight: their sums over rows are in another order",
    "one_bit": "one matrix of rank one for the whole weight: its sums over rows are in another order",
    "ptq161": "scales of columns over all rows: their sums are in another order",
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_permuted_rows_give_the_permuted_result(name: str) -> None:
    w, stats = case(7)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(8))
    moved = dataclasses.replace(stats, sensitivity=stats.need("sensitivity", "test")[order])
    fmt = parse_format(served(name, "int4-g16-zero"))
    first = QUANTIZERS[name]().quantize(w, stats, fmt).weight.dequantize()[order]
    second = QUANTIZERS[name]().quantize(w[order], moved, fmt).weight.dequantize()
    assert name in ROWS_TOGETHER or torch.equal(first, second)


@pytest.mark.parametrize("name", [n for n, q in QUANTIZERS.items() if q.needs])
def test_missing_statistics_are_an_error(name: str) -> None:
    with pytest.raises(BitpressError, match="no calibration statistics"):
        QUANTIZERS[name]().quantize(case()[0], None, parse_format(served(name, "int4-g16")))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_dead_channels_are_no_fallback(name: str) -> None:
    """A norm's weight of 0 makes them by design; the pipeline notes how many there are."""
    w, stats = case(4)
    alive = (torch.arange(64) % 4 != 0).float()
    dead = dataclasses.replace(
        stats,
        gram=stats.need_gram("test") * alive[:, None] * alive,
        mean_abs=stats.need("mean_abs", "test") * alive,
        sensitivity=stats.need("sensitivity", "test") * alive,
    )
    outcome = QUANTIZERS[name]().quantize(w, dead, parse_format(served(name, "int4-g16")))
    assert not [text for text in outcome.fallbacks if "zero" in text or "damping" in text]
    assert torch.isfinite(outcome.weight.dequantize()).all()


def test_a_gram_that_is_not_positive_climbs_the_damping_ladder() -> None:
    w, stats = case(5)
    bad = stats.need_gram("test").clone()
    bad -= torch.eye(64) * torch.linalg.eigvalsh(bad)[0] * 1.0 + torch.eye(64) * bad.diagonal().mean() * 0.05
    bad.diagonal().clamp_(min=1e-3)
    outcome = QUANTIZERS["gptq"]().quantize(w, dataclasses.replace(stats, gram=bad), parse_format("int4-g16"))
    assert outcome.figures["damp"] > 0.01
    assert "needed damping" in outcome.fallbacks[0]
    hopeless = dataclasses.replace(stats, gram=-torch.ones(64, 64) * 1e3 + 1001 * torch.eye(64))
    outcome = QUANTIZERS["gptq"](damp_limit=1.0).quantize(w, hopeless, parse_format("int4-g16"))
    assert "rounded without error feedback" in outcome.fallbacks[0]
