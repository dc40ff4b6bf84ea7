"""Laws of learning with rounded inputs, over every way to learn, and of learned maps, over every row that learns one."""

import dataclasses
from typing import Any

import pytest
import test_tuning as laws
import torch
from covering import cover

from bitpress.formats import (
    ActivationFormat,
    ChannelFormat,
    CompressedLayer,
    CompressedWeight,
    InputFormat,
    Packed,
    fake_quantize,
    parse_format,
)
from bitpress.kernels.reference import Reference
from bitpress.pipeline.compose import compress_matrix
from bitpress.recipes import make_method
from bitpress.transforms.folding import Fold
from bitpress.tuning.folded import Folded, FoldedVector
from bitpress.tuning.learned import Learned
from bitpress.tuning.learned_maps import MappedCodes, MappedWeight, MapTuning, SharedInput
from bitpress.tuning.objectives import BlockObjective
from bitpress.tuning.table import TUNINGS
from bitpress.tuning.tuner import tune_

IN, OUT = 32, 12
MAPPING = [name for name, row in TUNINGS.items() if issubclass(row, MapTuning)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample() -> torch.Tensor:
    """Inputs of which one channel in eight is ten times as large."""
    x = draw(40, IN, seed=1)
    x[:, ::8] *= 10
    return x


def made_inputs() -> dict[str, InputFormat]:
    x, static, local = sample(), parse_format("int8-tensor-zero"), parse_format("e2m1-g16-fp8over")
    token = ActivationFormat(parse_format("int4-row-fp32"))
    return {
        "a scale a token": token,
        "a zero point a token": ActivationFormat(parse_format("int4-row-zero")),
        "groups of powers of two": ActivationFormat(parse_format("mxfp4")),
        "stored": ActivationFormat.static(static, static.fit(x)),
        "stored above groups": ActivationFormat.local(local, local.fit(x)),
        "first channels": ChannelFormat(token, ActivationFormat(parse_format("int8-row-fp32")), 4, draw(IN, seed=2)),
    }


INPUTS = made_inputs()
KINDS = list(INPUTS)


def pushed(one: Learned, seed: int = 0, size: float = 0.02) -> None:
    for number, leaf in enumerate(one.leaves()):
        leaf.tensor.data.add_(size * draw(*leaf.tensor.shape, seed=seed + number))


def products(one: Learned, x: torch.Tensor, progress: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a learned layer gives, and what gives the layer that is stored, written and read again."""
    soft, hard = one.value(progress), one.hard_value()
    assert isinstance(soft, CompressedLayer)
    assert isinstance(hard, CompressedLayer)
    read = CompressedLayer.build(hard.weight.spec(), {n: t.clone() for n, t in hard.tensors().items()}, hard.input_spec())
    return Reference().matmul(x, soft), Reference().matmul(x, read)


@pytest.mark.parametrize(("name", "kind"), cover([n for n in TUNINGS if n not in laws.BESIDE], KINDS, lambda kind: kind))
def test_learned_codes_see_inputs_as_the_stored_layer_rounds_them(name: str, kind: str) -> None:
    w, x = draw(OUT, IN), sample()
    method = make_method(
        {"weights": "int4-g16-zero", "quantizer": "rtn", "transforms": [{"name": "hadamard", "outputs": True}]}
    )
    weight = compress_matrix(w, None, method.for_layer("a")).weight
    learned = (
        laws.begin_weight(TUNINGS[name](), weight, w, input=INPUTS[kind])
        if laws.begun_weight(TUNINGS[name](), weight, w)
        else None
    )
    if learned is None:
        return
    assert torch.equal(products(learned, x)[1], Reference().matmul(x, CompressedLayer(weight, INPUTS[kind])))
    pushed(learned)
    soft, hard = products(learned, x)
    assert name in laws.SOFT or torch.equal(soft.detach(), hard)
    gradients = torch.autograd.grad(soft.square().sum(), [leaf.tensor for leaf in learned.leaves()], allow_unused=True)
    assert any(g is not None and bool(g.abs().sum() > 0) for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_inputs_has_the_gradient_of_its_ranges(kind: str) -> None:
    """A token that is c times as large is rounded to c times as much: so x times the gradient is what the gradient's way gives."""
    fmt, g = INPUTS[kind], draw(40, IN, seed=3)
    fmt = fmt.rest if isinstance(fmt, ChannelFormat) else fmt
    x = sample().requires_grad_()
    q = fmt.round(x)
    (found,) = torch.autograd.grad((g * q).sum(), x)
    if kind in ("stored", "stored above groups"):
        # Stored ranges have no gradient; what a shared scale of e4m3 clips in groups has a small one that this does not foretell.
        assert torch.equal(q.detach(), fmt.round(x.detach()))
        assert bool((found == g).any())
        return
    torch.testing.assert_close(
        (found * x).sum(1), (g * q).sum(1).detach(), rtol=1e-3, atol=1e-3 * float((g * q).detach().abs().sum(1).max())
    )


def test_a_gradient_without_ranges_is_as_it_was() -> None:
    x, fmt = sample().requires_grad_(), parse_format("int4-row-fp32")
    (plain,) = torch.autograd.grad(fake_quantize(x, fmt).sum(), x)
    (whole,) = torch.autograd.grad(fake_quantize(x, fmt, ranges=True).sum(), x)
    assert torch.equal(plain, torch.ones_like(x))
    assert int((whole != plain).sum(1).max()) == 1  # the largest value of a token alone


def begin(
    name: str, w: torch.Tensor, kind: str | None, transforms: list[Any], folded: Folded | None = None, **settings: Any
) -> MappedWeight:
    method = make_method({"weights": "int4-g16", "quantizer": "rtn", "transforms": transforms})
    weight = compress_matrix(w, None, method.for_layer("a")).weight
    tuning, rounded = TUNINGS[name](**settings), None if kind is None else INPUTS[kind]
    assert isinstance(tuning, MapTuning)
    shared = SharedInput(tuning, IN, weight.input_map, w.device, folded=folded, rounded=[] if rounded is None else [rounded])
    term = weight.terms[0]
    assert isinstance(term, Packed)
    codes = MappedCodes(w, term.format, shared, clip=tuning.clip_weights, output_map=weight.output_map)
    return MappedWeight(weight, codes, rounded, leads=True)


STARTS: dict[str, list[Any]] = {"nothing": [], "hadamard on both sides": [{"name": "hadamard", "outputs": True}]}


@pytest.mark.parametrize("transforms", STARTS)
@pytest.mark.parametrize(("name", "kind"), cover(MAPPING, KINDS, lambda kind: kind))
def test_a_learned_map_is_the_stored_one(name: str, kind: str, transforms: str) -> None:
    one, x = begin(name, draw(OUT, IN), kind, STARTS[transforms]), sample()
    if name != "spinquant":  # whose matrices stay orthogonal by its own steps
        pushed(one)
    soft, hard = products(one, x, 1.0)  # a mask of entries is open at the end
    assert torch.equal(soft.detach(), hard)
    gradients = torch.autograd.grad(soft.square().sum(), [leaf.tensor for leaf in one.leaves()])
    assert all(bool(torch.isfinite(g).all()) for g in gradients)
    # The map is undone in the weight: behind eight bits and inputs as they are nothing but rounding is left.
    w = one.codes.target
    mapped = one.codes.shared.into(w, 1.0).detach()
    change = one.shared.hard_map()
    back = mapped if change is None else change.apply_transposed(mapped)
    torch.testing.assert_close(back, w, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MAPPING)
def test_weights_alone_are_learned_behind_maps_too(name: str) -> None:
    one = begin(name, draw(OUT, IN), None, STARTS["hadamard on both sides"])
    if name != "spinquant":
        pushed(one)
    soft, hard = one.value(1.0), one.hard_value()
    assert isinstance(soft, torch.Tensor)
    assert isinstance(hard, torch.Tensor)
    read = CompressedWeight.build(one.harden().spec(), {n: t.clone() for n, t in one.harden().tensors().items()})
    assert torch.equal(soft.detach(), hard)
    assert torch.equal(hard, read.dequantize())
    assert dict(read.tensors()).keys() >= {"term0.codes"}


@pytest.mark.parametrize("kind", ["norm", "norm_plus_one", "rows"])
def test_folded_factors_leave_what_the_block_computes(kind: Any) -> None:
    """A norm in bf16 or rows of a matrix take the factors, the weight's columns exactly what was divided by."""
    stored = (draw(IN, seed=4).abs() + 0.5).bfloat16()
    if kind == "norm":
        stored[3] = 0.0  # a channel that no factor changes
    order = torch.arange(IN) if kind != "rows" else torch.arange(IN) % 16
    fold = Fold("norm", kind, (0, IN) if kind != "rows" else (4, 20), order)
    folded = Folded(fold, None if kind == "rows" else stored, torch.device("cpu"))
    one = begin("omniquant", draw(OUT, IN), None, [], folded)
    scales = one.shared.own["scales"]
    scales.data.copy_(draw(folded.channels, seed=5) * 0.3)
    assert one.shared.hard_map() is None
    w, u, s = one.codes.target, draw(9, IN, seed=6), scales.detach().exp()
    if kind == "rows":
        before = draw(24, 7, seed=7)
        bias = FoldedVector(folded, scales, draw(24, seed=8), bias=True)
        producer = MappedCodes(
            before, parse_format("int4-row"), SharedInput(TUNINGS["omniquant"](), 7, None, w.device), rows=(one.shared,)
        )  # type: ignore[arg-type]
        made = draw(9, 7, seed=9) @ before.T + bias.start_value()
        after = draw(9, 7, seed=9) @ producer.fold(before).T + bias.hard_value()
        assert torch.equal(after[:, :4], made[:, :4])
        torch.testing.assert_close(after[:, 4:20] * s, made[:, 4:20], rtol=1e-4, atol=1e-5)
        x, y = made[:, 4:20][:, order], after[:, 4:20][:, order]
    else:
        offset = 1.0 if kind == "norm_plus_one" else 0.0
        vector = FoldedVector(folded, scales, stored, bias=False)
        assert torch.equal(vector.value(0.5).detach(), vector.harden().float())
        x, y = u * (stored.float() + offset), u * (vector.hard_value() + offset)
        assert torch.equal(vector.start_value(), stored.float())
    torch.testing.assert_close(y @ one.codes.fold(w).T, x @ w.T, rtol=0, atol=1e-4 * float((x @ w.T).abs().max()))
    gradient = torch.autograd.grad(one.codes.weight(0.5).square().sum(), scales)[0]
    assert bool((gradient != 0).any())


# What of the start's loss may be left behind few steps: a random Hadamard rotation where the paper starts from one, else nothing.
BEATS = {"omniquant": 0.6, "affinequant": 0.7, "flatquant": 0.6, "ostquant": 0.8, "spinquant": 0.97}


@pytest.mark.parametrize("name", MAPPING)
def test_planted_outliers_are_learned_away_at_four_bits(name: str) -> None:
    """Two layers that share an input with large channels, weights and inputs of 4 bits: held-out windows are nearer than at the start."""
    start = STARTS["nothing"] if name in ("omniquant", "affinequant", "flatquant") else [{"name": "hadamard"}]
    pair = [begin(name, draw(OUT, IN, seed=seed), "a scale a token", start) for seed in (10, 11)]
    second = pair[1]
    codes = MappedCodes(second.codes.target, second.codes.fmt, pair[0].shared, clip=2.0 if pair[0].codes.ends else None)
    pair[1] = MappedWeight(second.whole, codes, second.input, leads=False)
    x = draw(24, 16, IN, seed=12)
    x[..., ::8] *= 20
    wanted = torch.cat([x @ one.codes.target.T for one in pair], -1)

    def run(hidden: torch.Tensor, values: Any) -> torch.Tensor:
        out = torch.cat([Reference().matmul(hidden, values[name]) for name in ("a", "b")], -1)
        return torch.nn.functional.pad(out, (0, IN - 2 * OUT))

    wanted = torch.nn.functional.pad(wanted, (0, IN - 2 * OUT))
    objective = BlockObjective(run, x, wanted, 16, "mse", batch=8)
    tuning = dataclasses.replace(TUNINGS[name](), steps=40, rate=0.1 if name == "spinquant" else 0.03)
    learned = {"a": pair[0], "b": pair[1]}
    curve = tune_(objective, learned, tuning)
    assert curve.failed is None
    assert curve.after < BEATS[name] * curve.before, f"{name}: {curve.after / curve.before:.3f}"
    maps = [one.harden().input_map for one in learned.values()]
    if maps[0] is not None:
        assert maps[1] is not None
        assert all(torch.equal(t, maps[1].tensors()[n]) for n, t in maps[0].tensors().items()), "what they share stays shared"
