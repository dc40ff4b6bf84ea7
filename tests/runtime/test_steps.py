"""Layers as lists of steps: an architecture of a test's own is one class and a table line, and equal to a plain torch computation.

And texts apart from models: two sequences on one model do not see each other.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from bitpress import native
from bitpress.errors import UsageError
from bitpress.runtime.native.architectures import ARCHITECTURES, Layout, Names, Rotation
from bitpress.runtime.native.architectures.steps import Add, Attend, Gate, Multiply, Norm, Step
from bitpress.runtime.native.assemble import assemble, load_engine, refuses
from bitpress.runtime.native.engine import Engine, make_engine
from bitpress.runtime.native.options import CacheType, EngineOptions
from bitpress.runtime.sampling import Sampling

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

PATHS: list[str] = native.library().paths() if native.available() else []
HIDDEN, HEADS, KV, HEAD, INNER, VOCABULARY, LAYERS, WINDOW = 64, 4, 2, 16, 96, 80, 3, 9
# Keys and values in half precision are the only rounding: 2^-11 of an element, through three layers.
TOLERANCE = 0.01


class Parallel:
    """Blocks whose attention and MLP run side by side on one norm, as those of GPT-NeoX and Phi do, with a norm behind the MLP."""

    def refusal(self, config: Any) -> str | None:
        return "it is too deep" if config.num_hidden_layers > LAYERS else None

    def describe(self, config: Any) -> Layout:
        frequencies = (1.0 / (100.0 ** (np.arange(0, HEAD, 2) / HEAD))).astype(np.float32)
        return Layout(
            hidden=HIDDEN,
            intermediate=INNER,
            heads=HEADS,
            kv_heads=KV,
            head=HEAD,
            layers=config.num_hidden_layers,
            vocabulary=VOCABULARY,
            context=64,
            eps=1e-5,
            attention_scale=HEAD**-0.5,
            embedding_scale=1.0,
            tanh_gelu=True,
            tied=False,
            rotations=(Rotation(frequencies, 1.0),),
            rope=(0,) * LAYERS,
            window=(0, WINDOW, 0),
        )

    def names(self) -> Names:
        return Names("blocks.{}", "table.weight", "last_norm.weight", "top.weight")

    def norm_offset(self) -> float:
        return 0.0

    def layer(self, layout: Layout, index: int) -> list[Step]:
        return [
            Norm("norm", to="x"),
            Multiply("x", {"q": "q", "k": "k", "v": "v"}),
            Attend("q", "k", "v", to="attended", window=layout.window[index]),
            Gate("x", "gate", "up", to="acted"),
            Multiply("attended", {"o": "o"}),
            Multiply("acted", {"down": "down"}),
            Add("o"),
            Add("down", norm="behind"),
        ]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 * 2).bfloat16()

    kv, q = KV * HEAD, HEADS * HEAD
    inside = {"q": (q, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, q)}
    inside |= {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER), "norm": (HIDDEN,), "behind": (HIDDEN,)}
    made = {f"blocks.{i}.{name}.weight": draw(*shape) for i in range(LAYERS) for name, shape in inside.items()}
    made |= {f"blocks.{i}.q.bias": draw(q) for i in range(LAYERS)}
    made |= {"table.weight": draw(VOCABULARY, HIDDEN), "top.weight": draw(VOCABULARY, HIDDEN), "last_norm.weight": draw(HIDDEN)}
    return {name: 1 + w if "norm" in name or "behind" in name else w for name, w in made.items()}


@pytest.fixture
def build(weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Put an engine of the made-up architecture together."""
    monkeypatch.setitem(ARCHITECTURES, "parallel", Parallel())
    monkeypatch.setattr("bitpress.runtime.native.assemble.read_tensor", lambda value: value)

    def make(path: str, cache: str = "fp16", activations: str = "none", threads: int = 2) -> Engine:
        monkeypatch.setenv("BITPRESS_PATH", path)
        config = SimpleNamespace(model_type="parallel", num_hidden_layers=LAYERS)
        tensors = {name: (value,) for name, value in weights.items()}
        manifest = SimpleNamespace(weights={}, prompt_cost=None)
        pressed: Any = SimpleNamespace(plain=weights, tensors=tensors, manifest=manifest, root=".")
        parts = assemble(pressed, config, "keep", lambda text: None)
        return make_engine(parts, EngineOptions.of({"activations": activations, "cache": cache, "threads": threads}))

    return make


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rotated(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[0])[:, None] / 100.0 ** (torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    count = q.shape[0]
    q, k, v = rotated(q.view(count, HEADS, HEAD)), rotated(k.view(count, KV, HEAD)), v.view(count, KV, HEAD)
    k, v = (t.repeat_interleave(HEADS // KV, 1) for t in (k, v))
    distance = torch.arange(count)[:, None] - torch.arange(count)
    seen = (distance >= 0) & ((distance < window) if window else True)
    scores = (torch.einsum("ihd,jhd->hij", q, k) * HEAD**-0.5).masked_fill(~seen, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(count, HEADS * HEAD)


def computed(weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Compute the logits of the made-up architecture in plain torch."""
    stream = weights["table.weight"].float()[tokens]
    for layer in range(LAYERS):
        w = {name: weights[f"blocks.{layer}.{name}.weight"].float() for name in ("q", "k", "v", "o", "gate", "up", "down")}
        x = norm(stream, weights[f"blocks.{layer}.norm.weight"].float())
        q = x @ w["q"].T + weights[f"blocks.{layer}.q.bias"].float()
        attended = attention(q, x @ w["k"].T, x @ w["v"].T, WINDOW if layer == 1 else 0)
        acted = torch.nn.functional.gelu(x @ w["gate"].T, approximate="tanh") * (x @ w["up"].T)
        stream = stream + attended @ w["o"].T + norm(acted @ w["down"].T, weights[f"blocks.{layer}.behind.weight"].float())
    return norm(stream, weights["last_norm.weight"].float()) @ weights["top.weight"].float().T


TOKENS = [int(t) for t in torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize("path", PATHS)
def test_a_made_up_architecture_is_what_torch_computes(
    path: str, build: Callable[..., Engine], weights: dict[str, torch.Tensor]
) -> None:
    engine, want = build(path), computed(weights, TOKENS)
    assert float(want.std()) > 0.5
    whole = engine.forward(TOKENS, "all")
    engine.reset()
    parts = torch.cat([engine.forward(TOKENS[:20], "all"), *(engine.forward([token]) for token in TOKENS[20:])])
    for got in (whole, parts):
        assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())


def test_a_made_up_architecture_can_refuse_and_is_named(build: Callable[..., Engine]) -> None:
    assert refuses(SimpleNamespace(model_type="parallel", num_hidden_layers=LAYERS)) is None
    assert refuses(SimpleNamespace(model_type="parallel", num_hidden_layers=LAYERS + 1)) == "it is too deep"
    assert "parallel" in str(refuses(SimpleNamespace(model_type="serial")))


def test_threads_that_run_one_token_meet_wherever_they_must(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of one product each write what the layer before them was just read from."""
    monkeypatch.setattr(Parallel, "layer", one_product_a_layer)
    alone, *others = [
        torch.cat([engine.forward([token]) for token in TOKENS])
        for engine in (build(PATHS[0], threads=n) for n in (1, 3, 3, 3))
    ]
    assert float(alone.std()) > 0.5
    assert all(torch.equal(alone, other) for other in others)


def one_product_a_layer(self: Parallel, layout: Layout, index: int) -> list[Step]:
    return [Norm("norm", to="x"), Multiply("x", {"o": "q"}), Add("o")]


@pytest.mark.parametrize("cache", get_args(CacheType))
def test_two_sequences_on_one_model_do_not_disturb_each_other(cache: str, pressed_original: Path) -> None:
    def draw(seed: int) -> list[int]:
        return [int(t) for t in torch.randint(0, 200, (30,), generator=torch.Generator().manual_seed(seed))]

    options = EngineOptions.of({"cache": cache, "threads": 2})
    texts, sampling = (draw(1), draw(2)), Sampling(temperature=0.9, seed=3, repetition_penalty=1.3)
    alone = []
    for text in texts:
        engine = load_engine(pressed_original, options, verify=False)
        logits = [engine.forward(text[:12], "all"), *(engine.forward([token]) for token in text[12:])]
        alone.append((torch.cat(logits), list(engine.generate(text, max_tokens=8, sampling=sampling))))
    first = load_engine(pressed_original, options, verify=False)
    both = (first, first.sequence())
    found: list[list[torch.Tensor]] = [[], []]
    for begin, end in ((0, 12), *((i, i + 1) for i in range(12, 30))):
        for engine, text, logits in zip(both, texts, found, strict=True):
            logits.append(engine.forward(text[begin:end], "all"))
    for logits, (want, _) in zip(found, alone, strict=True):
        assert torch.equal(torch.cat(logits), want)
    made = [engine.generate(text, max_tokens=8, sampling=sampling) for engine, text in zip(both, texts, strict=True)]
    tokens = [list(pair) for pair in zip(*made, strict=True)]  # one of each in turn
    assert [[pair[i] for pair in tokens] for i in range(2)] == [want for _, want in alone]
    first.reset()
    assert first.length == 0
    assert both[1].length > 0
    with pytest.raises(UsageError, match="cannot be cut"):
        first.truncate(1)
