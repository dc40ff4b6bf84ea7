"""Laws of devices, over every row of every table: what is made of a weight on a device is what the references make of it on the host."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretend_device import DEVICE, pretending
from test_quantizers import EVERY, served

from bitpress.calibration import Stats
from bitpress.calibration.observers import OBSERVERS, Seen, static_format
from bitpress.corrections.table import CORRECTIONS
from bitpress.evaluation import measure_distance, measure_perplexity
from bitpress.formats import LOSSLESS, CompressedLayer, CompressedWeight, fake_quantize, parse_format
from bitpress.kernels.reference import Reference
from bitpress.pipeline.compose import compress_matrix
from bitpress.quantizers.quantizer import Outcome
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.table import QUANTIZERS
from bitpress.recipes import LayerMethod, Named
from bitpress.transforms.table import BASIS_CHANGES, SCALE_SEARCHES, TARGETS

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {"awq-scale": {"grid": 3}, "smooth-plus": {"alpha": 0.5}}
ROWS, INNER, HEADS = 16, 32, 2
# Methods with so many steps that the small case takes seconds on a device that is computed by Python.
SLOW = {"boa", "lnq", "decoupleq", "aqlm", "aespa", "quantease", "comq", "pvq", "spqr", "adadim", "db_llm"}
ROW_OF = [pytest.param(name, marks=[pytest.mark.release] * (name in SLOW)) for name in QUANTIZERS]
# One format of every kind of grid on every run, but for searches of many steps.
MANY_STEPS = ("dual", "planes", "trits", "olive")
OF_KIND = {type(parse_format(fmt).grid): fmt for fmt in EVERY if not fmt.startswith(MANY_STEPS)}
FORMAT_OF = [pytest.param(fmt, marks=[pytest.mark.release] * (fmt not in OF_KIND.values())) for fmt in EVERY]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The pretend device; the host computes by the references too."""
    monkeypatch.setenv("BITPRESS_NATIVE", "off")
    with pretending() as there:
        yield there


def case(inner: int = INNER) -> tuple[torch.Tensor, Stats]:
    """A weight with every statistic that any method needs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, inner, generator=generator) @ (torch.randn(inner, inner, generator=generator) / inner**0.5)
    moved = x + 0.1 * torch.randn(300, inner, generator=generator)
    w, felt = torch.randn(ROWS, inner, generator=generator), torch.rand(ROWS, inner, generator=generator) + 0.5
    gram, across = x.T @ x / 300, torch.randn(ROWS, ROWS, generator=generator)
    rows = torch.stack([part @ part.T for part in across.view(HEADS, ROWS // HEADS, ROWS)])
    return w, Stats(
        300,
        gram,
        x.abs().mean(0),
        cross=(moved - x).T @ x / 300,
        attention_gram=gram + 0.1 * torch.eye(inner),
        row_gram=rows,
        head_gram=torch.stack([gram, 1.1 * gram]),
        loss_gram=gram + 0.2 * torch.eye(inner),
        sensitivity=felt,
        output_gram=across @ across.T / ROWS + torch.eye(ROWS),
        max_abs=x.abs().amax(0),
        sample=x[:64],
    )


def alike(make: Callable[[torch.Tensor, Stats], Outcome], inner: int = INNER) -> None:
    """Hold what is made on the device to what is made on the host, to the bit; nothing may be left on the host."""
    w, stats = case(inner)
    ours, theirs = make(w.to(DEVICE), stats.to(DEVICE)), make(w, stats)
    there = ours.weight.tensors()
    assert all(t.device == DEVICE for t in there.values())
    assert ours.weight.dequantize().device == DEVICE
    here = theirs.weight.tensors()
    assert there.keys() == here.keys()
    for name, value in ours.weight.to(CPU).tensors().items():
        assert torch.equal(value, here[name]), name
    assert torch.equal(ours.weight.dequantize().cpu(), theirs.weight.dequantize())
    assert ours.fallbacks == theirs.fallbacks


@pytest.mark.parametrize("name", ROW_OF)
def test_quantizers(name: str) -> None:
    method: Any = QUANTIZERS[name]()
    alike(lambda w, stats: method.quantize(w, stats, parse_format(served(name, "int4-g16-zero"))))


@pytest.mark.parametrize("fmt", FORMAT_OF)
def test_formats(fmt: str) -> None:
    alike(lambda w, stats: RTN(clip="mse").quantize(w, None, parse_format(fmt)), inner=64)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_terms(name: str) -> None:
    alike(lambda w, stats: Outcome(CompressedWeight((LOSSLESS[name].encode(w.bfloat16()),))))


def parts(**changes: Any) -> LayerMethod:
    return LayerMethod(parse_format("int4-g16-zero"), Named("quantizer", "rtn", RTN()), **changes)


@pytest.mark.parametrize("name", BASIS_CHANGES)
def test_changes_of_basis(name: str) -> None:
    alike(lambda w, stats: compress_matrix(w, stats, parts(changes=(BASIS_CHANGES[name](),))))


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    alike(lambda w, stats: compress_matrix(w, stats, parts(targets=(TARGETS[name](),))))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections(name: str) -> None:
    settings: dict[str, Any] = {"rank": 4} if "rank" in CORRECTIONS[name].__dataclass_fields__ else {}
    settings |= {"steps": 2} if name == "svdquant" else {}
    alike(lambda w, stats: compress_matrix(w, stats, parts(corrections=(CORRECTIONS[name](**settings),))))


@pytest.mark.parametrize("name", SCALE_SEARCHES)
def test_scale_searches(name: str) -> None:
    w, stats = case()
    search: Any = SCALE_SEARCHES[name](**SETTINGS.get(name, {}))
    for channel_of in (None, torch.arange(INNER) // 2):
        ours = search.plan([w.to(DEVICE)], stats.to(DEVICE), parse_format("int4-g16"), channel_of)
        assert ours.device == DEVICE
        assert torch.equal(ours.cpu(), search.plan([w], stats, parse_format("int4-g16"), channel_of))


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers(name: str) -> None:
    x, fmt = case()[0], parse_format("int8-tensor")
    chosen = []
    for device in (CPU, DEVICE):
        seen = Seen(product=lambda u: u.cumsum(-1))
        for batch in x.split(16):
            seen.add(batch.to(device))
        chosen.append(OBSERVERS[name]().choose(seen, fmt))
    assert chosen[0] == chosen[1]
    made = static_format(fmt, chosen[0])
    assert torch.equal(made.to(DEVICE).round(x.to(DEVICE)).cpu(), made.round(x))


@pytest.mark.parametrize("fmt", ["int8-row", "e4m3-row", "mxfp4", "int4-g16-zero"])
def test_rounded_inputs(fmt: str) -> None:
    x = case()[0]
    assert torch.equal(fake_quantize(x.to(DEVICE), parse_format(fmt)).cpu(), fake_quantize(x, parse_format(fmt)))


def test_products() -> None:
    w, stats = case()
    layer = CompressedLayer(compress_matrix(w, stats, parts(changes=(BASIS_CHANGES["hadamard"](),))).weight)
    ours = Reference(keep=True).matmul(w.to(DEVICE), layer.to(DEVICE))
    assert torch.equal(ours.cpu(), Reference().matmul(w, layer))


def test_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1, 12, 50, generator=generator).unbind()
    windows = torch.randint(50, (2, 12), generator=generator)
    there = measure_distance(lambda _: p.to(DEVICE), lambda _: q, windows)  # the candidate is a runtime on the processor
    assert there == measure_distance(lambda _: p, lambda _: q, windows)
    assert measure_perplexity(lambda _: p.to(DEVICE), windows) == measure_perplexity(lambda _: p, windows)
