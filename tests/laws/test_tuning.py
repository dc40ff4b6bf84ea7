"""Laws of what is learned by gradients, over every row of the table: with kinds of formats, and with kinds of starts."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import test_terms_and_maps as stored
import torch
from covering import cover

from bitpress.calibration import Stats
from bitpress.formats import MAPS, CompressedWeight, Packed, parse_format
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.quantizer import is_served
from bitpress.recipes import make_method
from bitpress.tuning.learned import LearnedVector, LearnedWeight
from bitpress.tuning.learned_maps import MapTuning
from bitpress.tuning.objectives import BlockObjective, LayerObjective
from bitpress.tuning.sides import MapsAround
from bitpress.tuning.table import TUNINGS
from bitpress.tuning.tuner import Curve, Objective, Tuning, _draw, begin_weight, tune_

OUT = 16
# Evenly spaced with and without zero point, with a minimum, scales in two levels, levels from tables, levels of a block's own, vectors of
# codebooks, a lattice, paths through a trellis, a book, powers, signs.
FORMATS = (
    "int3-g16-zero",
    "int2-row-zero",
    "int4-g32",
    "int4-2x16-zero",
    "int4-g16-zero-s6",
    "q2_k",
    "q3_k",
    "q4_k",
    "q4_1",
    "nf4-g16-dq",
    "iq3k-g16",
    "kmeans2-g16",
    "gauss4x2-row",
    "aq2x8x8-row",
    "e8p-row",
    "tcq2-row",
    "vq4x2-row",
    "pow3-g16",
    "binary-row",
)
EVEN = ("int", "q3_k")
MINIMA = ("q2_k", "q4_k", "q4_1")


def kind(fmt: str) -> str:
    """Formats of one kind are learned by the same code."""
    if fmt.startswith(EVEN):
        return "zero point" if "zero" in fmt else "even"
    if fmt in MINIMA:
        return "minimum"
    return "table" if fmt.startswith(("nf4", "iq3k", "pow3", "binary", "gauss")) else "book" if fmt[0] in "kave" else "stream"


STARTS: dict[str, dict[str, Any]] = {
    "rtn": {"quantizer": "rtn"},
    "gptq": {"quantizer": "gptq"},
    "ldlq behind hadamard": {"quantizer": "ldlq", "transforms": [{"name": "hadamard", "outputs": True}]},
    "lqer": {"quantizer": "rtn", "corrections": [{"name": "lqer", "rank": 2}]},
}
SOFT = {"adaround", "candidates", "cbq", "modcap"}  # those whose forward is not that of hard codes
# Those that learn no codes, and of many weights nothing; maps are learned with the inputs that weights share (tests/laws/test_learned_maps.py).
BESIDE = {"norm-tweaking", "low-rank", *(name for name, row in TUNINGS.items() if issubclass(row, MapTuning))}


def case(seed: int = 0, inner: int = 256) -> tuple[torch.Tensor, Stats, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.rand(inner, generator=generator) / inner**0.5
    x, held_out = torch.randn(512, inner, generator=generator) @ mix, torch.randn(64, inner, generator=generator) @ mix
    return torch.randn(OUT, inner, generator=generator), Stats(512, x.T @ x / 512, x.abs().mean(0)), held_out


def begun(fmt: str, start: str, w: torch.Tensor, stats: Stats) -> CompressedWeight:
    keys = {"transforms": [], **STARTS[start]}
    if fmt.startswith(("e8p", "aq", "tcq", "gauss")) and keys["quantizer"] == "gptq":
        keys["quantizer"] = "ldlq"
    method = make_method({"weights": fmt, **keys})
    return compress_matrix(w, stats, method.for_layer("a")).weight


def learn(
    tuning: Tuning, weight: CompressedWeight, w: torch.Tensor, stats: Stats, held_out: torch.Tensor
) -> tuple[LearnedWeight, Curve, Objective] | None:
    learned = begun_weight(tuning, weight, w)
    if learned is None:
        return None
    objective = LayerObjective("w", w, stats.need_gram("test"), held_out)
    return learned, tune_(objective, {"w": learned}, tuning), objective


def begun_weight(tuning: Tuning, weight: CompressedWeight, w: torch.Tensor) -> LearnedWeight | None:
    codes = next(term for term in weight.terms if isinstance(term, Packed))
    return begin_weight(tuning, weight, w) if is_served(tuning.serves, codes.format) else None


def shorter(name: str, **settings: Any) -> Tuning:
    """Few steps, and long ones, so that codes change."""
    tuning = TUNINGS[name](steps=4, checks=2)
    rate = 0.05 if tuning.optimizer == "sign" else 4 * tuning.learning_rate
    return dataclasses.replace(tuning, rate=rate, **settings)


def without_native_maps(learned: LearnedWeight) -> None:
    for side in ("input_map", "output_map"):
        if (mapped := getattr(learned.maps, side)) is not None:
            setattr(learned.maps, side, dataclasses.replace(mapped, native=None))


def check(name: str, fmt: str, start: str) -> None:
    w, stats, held_out = case()
    weight = begun(fmt, start, w, stats)
    kept = {leaf: t.clone() for leaf, t in weight.tensors().items()}
    before, gram = w.clone(), stats.need_gram("test").clone()
    result = learn(shorter(name), weight, w, stats, held_out)
    if result is None:
        at = next(term for term in weight.terms if isinstance(term, Packed))
        assert name in BESIDE or not is_served(TUNINGS[name].serves, at.format)
        return
    learned, curve, objective = result
    # The start is judged as it is stored, and never given up for something worse.
    assert curve.before == objective.held_out({"w": weight.dequantize()})
    assert curve.after <= curve.before
    assert curve.failed is None
    # A forward computes with the very values that are stored and read again, after a step of any length; maps in native code round otherwise.
    for leaf in learned.leaves():
        generator = torch.Generator().manual_seed(leaf.tensor.numel())
        leaf.tensor.data.add_(0.02 * torch.randn(leaf.tensor.shape, generator=generator))
    hard = learned.harden()
    read = CompressedWeight.build(hard.spec(), {leaf: t.clone() for leaf, t in hard.tensors().items()})
    assert torch.equal(read.dequantize(), learned.hard_value())
    if name not in SOFT:
        torch.testing.assert_close(learned.value(0.5).detach(), learned.hard_value(), rtol=1e-5, atol=1e-5)
        without_native_maps(learned)
        assert torch.equal(learned.value(0.5).detach(), learned.hard_value())
    assert TUNINGS[name].adds_maps or hard.spec() == weight.spec()
    # The start is as it was, and no term has moved but those that are learned.
    assert all(torch.equal(t, weight.tensors()[leaf]) for leaf, t in kept.items())
    assert torch.equal(w, before)
    assert torch.equal(stats.need_gram("test"), gram)
    for k, (old, new) in enumerate(zip(weight.terms, hard.terms, strict=True)):
        assert k in learned.terms or new is old


@pytest.mark.parametrize(("name", "fmt"), cover(list(TUNINGS), FORMATS, kind))
def test_what_is_learned_is_what_is_stored_and_no_worse(name: str, fmt: str) -> None:
    check(name, fmt, "rtn")


@pytest.mark.parametrize(("name", "start"), cover(list(TUNINGS), [s for s in STARTS if s != "rtn"], lambda start: start))
def test_any_start_will_do(name: str, start: str) -> None:
    check(name, "int3-g16-zero", start)


@pytest.mark.parametrize(("name", "fmt"), cover(list(TUNINGS), FORMATS, kind))
def test_the_first_state_is_the_start(name: str, fmt: str) -> None:
    w, stats, _ = case(1)
    weight = begun(fmt, "rtn", w, stats)
    learned = begun_weight(TUNINGS[name](), weight, w)
    if learned is not None:
        assert torch.equal(learned.hard_value(), weight.dequantize())


@pytest.mark.parametrize("name", TUNINGS)
def test_the_same_seed_gives_the_same_bytes(name: str) -> None:
    w, stats, held_out = case(2, 64)
    weight = begun("int2-g16-zero", "rtn", w, stats)
    found = [learn(shorter(name, seed=seed), weight, w, stats, held_out) for seed in (1, 1)]
    if found[0] is not None and found[1] is not None:
        first, second = (result[0].harden().tensors() for result in found if result is not None)
        assert all(torch.equal(value, second[leaf]) for leaf, value in first.items())
        assert found[0][1] == found[1][1]


def test_windows_are_drawn_by_the_seed_and_the_block() -> None:
    """Of 16 windows in batches of 4 every one comes once before any comes again; another seed or block has another order."""

    def drawn(seed: int, salt: int) -> list[list[int]]:
        return [rows.tolist() for rows in itertools.islice(_draw(16, 4, seed, salt), 4)]

    found = [drawn(0, 0), drawn(1, 0), drawn(0, 1)]
    assert all(sorted(itertools.chain(*rows)) == list(range(16)) for rows in found)
    assert len({str(rows) for rows in found}) == 3
    assert drawn(1, 0) == found[1]


class Broken:
    """A loss that is no number from the third step on; held-out text likes whatever is learned."""

    windows = 1

    def __init__(self, gradient_only: bool) -> None:
        self.steps, self.gradient_only = 0, gradient_only

    def loss(self, values: Mapping[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        plain = values["w"].square().mean()
        if self.steps < 3:
            return plain
        # The square root has no gradient at 0.
        return plain + (0 * values["w"]).abs().sum().sqrt() if self.gradient_only else plain * float("nan")

    def held_out(self, values: Mapping[str, torch.Tensor]) -> float:
        return 1.0


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("name", TUNINGS)
def test_a_loss_that_is_no_number_ends_with_the_start_and_is_named(name: str, gradient_only: bool) -> None:
    w, stats, _ = case(3, 64)
    fmt = next(f for f in ("int4-g16-zero", *FORMATS) if is_served(TUNINGS[name].serves, parse_format(f)))
    weight = begun(fmt, "rtn", w, stats)
    tuning = shorter(name)
    one = begun_weight(tuning, weight, w)
    learned = LearnedVector(w[0], 1.0) if one is None else one
    curve = tune_(Broken(gradient_only), {"w": learned}, tuning)
    assert curve.steps == 2
    assert not curve.better
    assert curve.failed is not None
    assert curve.failed.startswith("step 3: ")
    assert ("gradient" in curve.failed) == gradient_only
    assert torch.equal(learned.hard_value(), w[0] if one is None else weight.dequantize())


# ------------------------------------------------------------------------------------------------- problems with a known optimum


# What is left of the start's loss by those that move scales alone, and by those whose roundings or ends of ranges move along.
LEFT = {"parameters": 1e-3, "flexround": 0.01, "lrq": 0.01, "block-ap": 0.15, "learned-clipping": 0.15, "signround": 0.15}


@pytest.mark.parametrize("name", LEFT)
def test_scales_that_are_too_large_are_mended(name: str) -> None:
    """The weights have four levels; the start's scales are half as large again. Every error is theirs, and none need be left."""
    fmt = parse_format("int2-g16-zero-fp32")
    _, stats, held_out = case(4, 64)
    codes = torch.randint(0, 4, (OUT, 64), generator=torch.Generator().manual_seed(5))
    codes[:, ::16], codes[:, 1::16] = 0, 3
    params = {"scale": torch.ones(OUT, 4), "zero": torch.ones(OUT, 4)}
    w = fmt.decode(codes.to(torch.uint8), params)
    wide = fmt.stored({"scale": params["scale"] * 1.5, "zero": params["zero"]})
    chosen = codes.to(torch.uint8) if name == "parameters" else fmt.encode(w, wide)
    tuning = dataclasses.replace(TUNINGS[name](), steps=120, rate=0.01 if name == "signround" else 0.02)
    result = learn(tuning, CompressedWeight((Packed.pack(fmt, chosen, wide),)), w, stats, held_out)
    assert result is not None
    assert result[1].after < LEFT[name] * result[1].before


@pytest.mark.parametrize("name", ["adaround", "flexround", "block-ap"])
def test_the_best_roundings_of_a_few_weights_are_found(name: str) -> None:
    """Six weights a row and inputs that nearly are one: errors must cancel, and all 64 roundings can be tried."""
    generator = torch.Generator().manual_seed(6)
    w = torch.rand(8, 6, generator=generator) * 6 - 3
    w[:, 0], w[:, 1] = 7.0, -7.0
    fmt = parse_format("int4-row-fp32")
    stats = Stats(100, torch.ones(6, 6) + 0.02 * torch.eye(6))
    plain = CompressedWeight((Packed.pack(fmt, fmt.encode(w, fmt.fit(w)), fmt.fit(w)),))
    scale = fmt.fit(w)["scale"]
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
    tried = ((w / scale).floor()[:, None] + choices) * scale[:, None] - w[:, None]
    best = (tried @ stats.need_gram("test") * tried).sum(-1).amin(1).sum()
    extra = {
        "adaround": {"rate": 0.05},
        "block-ap": {"scales": 0.0, "rate": 0.01},
        "flexround": {"scales": False, "rate": 0.01},
    }
    tuning = dataclasses.replace(TUNINGS[name](steps=100, checks=50), **extra[name])
    start, at = LearnedWeight.start(plain, w)
    codes = tuning.begin(start)
    assert codes is not None
    learned, objective = LearnedWeight(plain, codes, at), LayerObjective("w", w, stats.need_gram("test"), None)
    curve = tune_(objective, {"w": learned}, tuning)
    assert curve.before * float(objective.energy) > 1.5 * float(best)
    assert curve.after * float(objective.energy) < 1.001 * float(best)


@pytest.mark.parametrize("loss", ["mse", "channels"])
def test_a_vector_finds_its_size(loss: Any) -> None:
    """A block that multiplies its channels by a vector; one channel is always zero."""
    x = torch.randn(12, 8, 6, generator=torch.Generator().manual_seed(7)) + 1
    x[..., 2] = 0
    wanted = torch.tensor([0.5, 1.5, 1.0, 1.2, 2.0, 1.0])
    objective = BlockObjective(lambda hidden, values: hidden * values["v"], x, x * wanted, 8, loss, batch=4)
    learned = LearnedVector(torch.ones(6), 1.0)
    tuning = TUNINGS["norm-tweaking"](steps=150, rate=0.05, norms=0.05, loss=loss)
    curve = tune_(objective, {"v": learned}, tuning)
    assert curve.failed is None
    assert (learned.harden() - wanted).abs().max() < 0.01


def test_a_gradient_goes_through_every_map_as_through_its_matrix() -> None:
    for kind in MAPS:
        inner, outer = stored.make(kind, stored.IN), stored.make(kind, 40)
        w = stored.draw(40, stored.IN, seed=8).requires_grad_()
        g = stored.draw(40, stored.IN, seed=9)
        maps = MapsAround(CompressedWeight((stored.packed(w.detach()),), inner, outer))
        (found,) = torch.autograd.grad(maps.outputs(maps.inputs(w)), w, g)
        expected = stored.matrix(outer).T @ g @ stored.matrix(inner).T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
