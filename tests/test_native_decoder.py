"""The native decoder against transformers on decoded weights, for every family that it knows.

The engine rounds what transformers does not: keys and values to 16 or 8 bits, inputs of products to 8 bits if asked. The tests do the
same inside transformers and measure what that does to logits. The engine's own are compared with the rounded ones, and may differ by
what the rounding did: a value that lies at the middle between two steps falls to the other side for the last digit of a sum, and what
follows with it, but seldom.
"""

import copy
import functools
import inspect
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bitpress import native
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.errors import FormatError, KernelUnavailable, UsageError
from bitpress.formats import parse_format
from bitpress.models.skeleton import build_config
from bitpress.pipeline.quantize import Proof, quantize_directory
from bitpress.recipes import make_recipe
from bitpress.runtime.hf.loading import load
from bitpress.runtime.native.architectures import ARCHITECTURES, Layout, Rotation, describe
from bitpress.runtime.native.assemble import load_engine, refuses
from bitpress.runtime.native.engine import Engine
from bitpress.runtime.native.options import CacheType, EngineOptions
from bitpress.runtime.opening import load_native
from bitpress.runtime.sampling import Sampling

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")

PATHS: list[str] = native.library().paths() if native.available() else []
VOCABULARY = 384
TOKENS = 40


@dataclass(frozen=True)
class Case:
    """A tiny model: transformers' configuration, what makes it special, and how its weights are pressed."""

    config: str
    weights: str
    own: dict[str, Any] = field(default_factory=dict)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=256)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "layer_types": [SLIDING, FULL, SLIDING],
    "num_hidden_layers": 3,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    },
}
QWEN2 = {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
# Heads of 32 and 64 elements are those that tiles attend to; 1, 2, 3, 6 and 8 queries share a key.
CASES: dict[str, Case] = {
    "llama": Case("LlamaConfig", "int4-g32-zero", {"tie_word_embeddings": True, **LLAMA3}),
    "llama yarn": Case("LlamaConfig", "int8-row", {"head_dim": 32, **YARN}),
    "llama linear": Case(
        "LlamaConfig",
        "nf4-g32",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, **rope("linear", factor=2.0)},
    ),
    "mistral": Case("MistralConfig", "int4-g16", {"sliding_window": 15, "num_key_value_heads": 4, "head_dim": 32}),
    "qwen2": Case("Qwen2Config", "int3-g32-zero", QWEN2),
    "qwen3": Case(
        "Qwen3Config", "vq6x2-row", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}
    ),
    "smollm3": Case("SmolLM3Config", "int5-g32", {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "gemma3_text": Case("Gemma3TextConfig", "int6-g32", GEMMA),
    "wide heads": Case(
        "MistralConfig",
        "int4-g64",
        {
            "intermediate_size": 192,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "sliding_window": 270,
        },
    ),
}
# A model type without a case of its own is tried as it is.
CASES |= {name: Case(CONFIG_MAPPING[name].__name__, "int4-g32-zero") for name in ARCHITECTURES if name not in CASES}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # queries and keys that tell positions apart
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def pressed(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[[str], Path]:
    """Return the compressed model of a case, made once; norms and biases are random too, so that none can be left out unnoticed."""
    import transformers

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            case, root = CASES[name], tmp_path_factory.mktemp("decoder")
            config = getattr(transformers, case.config)(**(SMALL | case.own))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.data += 0.3 * torch.randn(parameter.shape)
            model.save_pretrained(root / "source")
            tiny_tokenizer.save_pretrained(root / "source")
            recipe = make_recipe({"weights": case.weights, "quantizer": {"name": "rtn"}})
            quantize_directory(root / "source", root / "out", recipe, proof=Proof(tokens=0))
            made[name] = root / "out"
        return made[name]

    return make


@pytest.fixture(scope="session")
def reference(pressed: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a case's model in transformers, on decoded weights in float32: fp16 with a factor a row where the engine expands."""

    def make(name: str) -> Any:
        model = load(pressed(name), dtype="fp32").eval()
        if make_engine(pressed(name)).facts["expanded"]:
            for weight in CompressedCheckpoint.open(pressed(name)).manifest.weights:
                decoded = model.get_parameter(weight).data
                gain = decoded.abs().amax(1, keepdim=True)
                decoded.copy_((decoded / gain).half().float() * gain)
        return model

    return functools.cache(make)


def make_engine(directory: Path, **options: Any) -> Engine:
    given = {"activations": "none", "cache": "fp16", "head": "keep", "threads": 1, **options}
    return load_engine(directory, EngineOptions.of(given), verify=False)


def draw(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps(engine: Engine, tokens: Sequence[int], sizes: Sequence[int] = (1,)) -> torch.Tensor:
    """Return the logits of every token of a text that comes in pieces of these sizes in turn."""
    parts, at = [], 0
    for size in itertools.cycle(sizes):
        parts.append(engine.forward(tokens[at : at + size], "all"))
        at += size
        if at >= len(tokens):
            return torch.cat(parts)
    raise AssertionError


# ---- roundings inside transformers ----


def to_half(t: torch.Tensor) -> torch.Tensor:
    return t.half().float()


def to_bytes(t: torch.Tensor) -> torch.Tensor:
    """Round the last dimension in steps of its largest magnitude / 127."""
    step = t.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (t / step).round() * step


class RoundingCache(DynamicCache):
    """A cache that gives back keys and values as `rounding` leaves them."""

    rounding: Callable[[torch.Tensor], torch.Tensor]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rounding = self.rounding
        return super().update(rounding(key_states), rounding(value_states), *args, **kwargs)


def round_input(layer: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Round the input of a product to 8 bits, in pieces of 32 columns."""
    return (to_bytes(args[0].unflatten(-1, (-1, 32))).flatten(-2), *args[1:])


def cache_argument(model: Any) -> str:
    """Return what the model's forward calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def expected(model: Any, tokens: Sequence[int], cache: str = "none", activations: str = "none") -> torch.Tensor:
    """Return transformers' logits of every token, [tokens, vocabulary], with roundings like the engine's."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)] if activations == "int8" else []
    hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
    options: dict[str, Any] = {"use_cache": False}
    if cache != "none":
        store = RoundingCache(config=model.config)
        store.rounding = {"fp16": to_half, "int8": to_bytes}[cache]
        options = {"use_cache": True, cache_argument(model): store}
    logits = model(input_ids=torch.tensor([list(tokens)]), **options).logits[0]
    for hook in hooks:
        hook.remove()
    return cast(torch.Tensor, logits)


@dataclass(frozen=True)
class Expected:
    """Transformers' logits as they are, and with the engine's roundings; `tolerance` is the largest difference of the two."""

    exact: torch.Tensor
    rounded: torch.Tensor

    @property
    def tolerance(self) -> float:
        return distance(self.exact, self.rounded)


@pytest.fixture(scope="session")
def wanted(reference: Callable[[str], Any]) -> Callable[..., Expected]:
    """Return both kinds of logits for a case and a text of so many drawn tokens."""

    @functools.cache
    def make(name: str, count: int = TOKENS, cache: str = "fp16", activations: str = "none") -> Expected:
        model, tokens = reference(name), draw(count)
        found = Expected(expected(model, tokens), expected(model, tokens, cache, activations))
        assert 0 < found.tolerance < (0.05 if (cache, activations) == ("fp16", "none") else 1.2)
        return found

    return make


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def divergence(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Return the mean KL divergence in nats."""
    p, q = exact.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have engines use one code path after another."""
    monkeypatch.setenv("BITPRESS_PATH", request.param)
    return str(request.param)


every_case = pytest.mark.parametrize("name", CASES)


# ---- against transformers ----


@every_case
@pytest.mark.parametrize("cache", get_args(CacheType))
def test_logits_are_those_of_transformers(
    name: str, cache: str, path: str, pressed: Callable[[str], Path], wanted: Callable[..., Expected]
) -> None:
    want = wanted(name, cache=cache)
    engine, tokens = make_engine(pressed(name), cache=cache), draw(TOKENS)
    assert engine.facts["path"] == path
    once = engine.forward(tokens, "all")
    assert engine.length == TOKENS
    assert distance(once, want.rounded) <= want.tolerance
    if cache == "fp16":
        assert divergence(want.exact, once) < 1e-4
    for sizes in ((1,), (7, 1, 3, 4, 5, 17)):
        engine.reset()
        assert distance(steps(engine, tokens, sizes), want.rounded) <= want.tolerance
    engine.reset()
    assert engine.forward(tokens[:-3], "none").shape == (0, VOCABULARY)
    assert distance(engine.forward(tokens[-3:]), once[-1:]) <= want.tolerance


@every_case
def test_greedy_tokens_are_those_of_transformers(
    name: str, pressed: Callable[[str], Path], reference: Callable[[str], Any], wanted: Callable[..., Expected]
) -> None:
    """Every token of 32 is transformers' most likely one behind the same text; at most one is a near tie."""
    tokens = draw(TOKENS)
    made = list(make_engine(pressed(name)).generate(tokens, max_tokens=32))
    assert len(made) == 32
    logits = expected(reference(name), tokens + made)[TOKENS - 1 : -1]
    lost = logits.amax(-1) - logits[torch.arange(32), made]
    assert float(lost.max()) <= 2 * wanted(name).tolerance
    assert int((lost > 0).sum()) <= 1


@every_case
def test_8_bit_activations_are_close(
    name: str, path: str, pressed: Callable[[str], Path], wanted: Callable[..., Expected]
) -> None:
    """The divergence is like that of 8-bit inputs inside transformers: it goes with the square of the error.

    Up to four rows are rounded to 14 bits, whose error is 64 times smaller, and the cache to 16. With more, inputs are rounded in pieces
    of up to 128 columns instead of 32, and attention on tiles computes in bf16.
    """
    want = wanted(name, activations="int8")
    usual = divergence(want.exact, want.rounded)
    engine, tokens = make_engine(pressed(name), activations="int8"), draw(TOKENS)
    many = divergence(want.exact, engine.forward(tokens, "all"))
    engine.reset()
    few = steps(engine, tokens)
    # The levels of nf4 and the words of vq6x2 are no whole numbers: the nearest bytes stand for them, of a table or of a whole book.
    assert divergence(want.exact, few) <= {"llama linear": 1.0, "qwen3": 2.0}.get(name, 0.02) * usual + 1e-5
    assert many <= 6 * usual
    if not engine.facts["expanded"]:  # those are in float up to four rows
        assert not torch.equal(few, steps(make_engine(pressed(name)), tokens)), "nothing was rounded"


@pytest.mark.parametrize("name", ["llama", "llama yarn", "mistral", "gemma3_text", "wide heads"])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_a_long_text_crosses_pieces_of_attention(
    name: str, activations: Literal["none", "int8"], path: str, pressed: Callable[[str], Path], wanted: Callable[..., Expected]
) -> None:
    """Attention looks at 256 positions at a time, tiles at 32."""
    count = 300 if path == "portable" else 600
    want = wanted(name, count, activations=activations)
    tokens = draw(count)
    engine = make_engine(pressed(name), activations=activations)
    whole = engine.forward(tokens, "all")
    engine.reset()
    parts = steps(engine, tokens, (250, 1, 4, 2, 43))
    if activations == "none":
        assert distance(whole, want.rounded) <= want.tolerance
        assert distance(parts, want.rounded) <= want.tolerance
        engine.truncate(250)
        assert distance(steps(engine, tokens[250:270]), want.rounded[250:270]) <= want.tolerance
    else:
        usual = divergence(want.exact, want.rounded)
        for got in (whole, parts):
            assert divergence(want.exact, got) <= 6 * usual
            # Nor is any stretch worse: one wrong piece would hide in the mean of all.
            for at in range(0, count - 49, 50):
                here = slice(at, at + 50)
                assert divergence(want.exact[here], got[here]) <= 8 * usual


@pytest.mark.parametrize(
    "name", ["llama", "llama yarn", "qwen3"]
)  # tied, not tied, and a width that groups of 64 do not divide
def test_a_head_is_rounded_as_asked_and_a_tied_embedding_is_not(
    name: str, pressed: Callable[[str], Path], reference: Callable[[str], Any], wanted: Callable[..., Expected]
) -> None:
    assert make_engine(pressed(name)).facts["head"] == "bfloat16"
    for head in ("int8-g64", "int4-g16"):
        engine = make_engine(pressed(name), head=head)
        fmt = parse_format("int8-row" if name == "qwen3" and head == "int8-g64" else head)
        model = copy.deepcopy(reference(name))
        weight = model.lm_head.weight.data
        params = fmt.fit(weight)
        model.lm_head.weight = torch.nn.Parameter(fmt.decode(fmt.encode(weight, params), params))
        want = expected(model, draw(TOKENS), "fp16")
        assert engine.facts["head"] == fmt.name
        assert distance(want, wanted(name).rounded) > 2 * wanted(name).tolerance
        assert distance(engine.forward(draw(TOKENS), "all"), want) <= wanted(name).tolerance


def longer_window(layout: Layout) -> Layout:
    return replace(layout, window=tuple(window + 1 if window else 0 for window in layout.window))


def faster_rotation(layout: Layout) -> Layout:
    return replace(layout, rotations=tuple(Rotation(r.frequencies * 1.01, r.factor) for r in layout.rotations))


def larger_factor(layout: Layout) -> Layout:
    return replace(layout, rotations=tuple(Rotation(r.frequencies, r.factor * 1.01) for r in layout.rotations))


def all_rotated(layout: Layout) -> Layout:
    return replace(layout, rope=tuple(max(0, rope) for rope in layout.rope))


def first_rotation(layout: Layout) -> Layout:
    return replace(layout, rope=tuple(0 for _ in layout.rope))


def steeper_attention(layout: Layout) -> Layout:
    return replace(layout, attention_scale=layout.attention_scale * 1.02)


def other_gate(layout: Layout) -> Layout:
    return replace(layout, tanh_gelu=not layout.tanh_gelu)


def larger_embedding(layout: Layout) -> Layout:
    return replace(layout, embedding_scale=layout.embedding_scale * 1.01)


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        *((name, longer_window) for name in ("mistral", "qwen2", "gemma3_text")),
        *((name, faster_rotation) for name in CASES),
        ("llama yarn", larger_factor),
        ("smollm3", all_rotated),
        ("gemma3_text", first_rotation),
        ("qwen3", steeper_attention),
        ("llama", other_gate),
        ("gemma3_text", other_gate),
        ("gemma3_text", larger_embedding),
    ],
)
def test_a_small_mistake_leaves_the_tolerance(
    name: str,
    mistake: Callable[[Layout], Layout],
    pressed: Callable[[str], Path],
    wanted: Callable[..., Expected],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the tests above would let pass is smaller than this."""
    monkeypatch.setattr("bitpress.runtime.native.assemble.describe", lambda config: mistake(describe(config)))
    want = wanted(name)
    assert distance(make_engine(pressed(name)).forward(draw(TOKENS), "all"), want.rounded) > want.tolerance


# ---- the same, every time ----


@pytest.mark.parametrize("options", [{}, {"cache": "int8"}, {"activations": "int8"}], ids=str)
@pytest.mark.parametrize("name", ["gemma3_text", "wide heads"])
def test_what_was_forgotten_leaves_no_trace(
    name: str, options: dict[str, Any], path: str, pressed: Callable[[str], Path]
) -> None:
    """Behind a cut, an engine gives the bits of one that never saw what was cut off."""
    tokens, other = draw(70), draw(70, seed=1)
    fresh = make_engine(pressed(name), **options)
    first, second = fresh.forward(tokens[:33], "all"), steps(fresh, tokens[33:50], (1, 6))
    used = make_engine(pressed(name), **options)
    used.forward(other)
    used.reset()
    assert used.length == 0
    assert torch.equal(used.forward(tokens[:33], "all"), first)
    used.forward(other[:30], "none")
    used.forward(other[30:31])
    used.truncate(33)
    assert used.length == 33
    assert torch.equal(steps(used, tokens[33:50], (1, 6)), second)


@pytest.mark.parametrize("options", [{}, {"cache": "int8", "activations": "int8"}], ids=str)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "wide heads"])
def test_the_number_of_threads_changes_no_bit(
    name: str, options: dict[str, Any], path: str, pressed: Callable[[str], Path]
) -> None:
    tokens = draw(300)

    def logits(threads: int) -> torch.Tensor:
        engine = make_engine(pressed(name), threads=threads, **options)
        assert engine.facts["threads"] == threads
        return torch.cat([engine.forward(tokens[:280], "all"), steps(engine, tokens[280:], (1, 1, 3, 5))])

    alone = logits(1)
    for threads in (2, 3):
        assert torch.equal(logits(threads), alone)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_engines_run_side_by_side(threads: int, pressed: Callable[[str], Path]) -> None:
    """Two Python threads, each with its engine: both give what they give alone."""
    engines = [make_engine(pressed(name), threads=threads, activations="int8") for name in ("llama", "mistral")]
    texts = [draw(90, seed=2), draw(60, seed=3)]
    alone = [list(e.generate(t, max_tokens=60)) for e, t in zip(engines, texts, strict=True)]
    made: list[list[int]] = [[], []]
    barrier = threading.Barrier(2)

    def run(index: int) -> None:
        for _ in range(3):
            barrier.wait()
            engines[index].reset()
            made[index] = list(engines[index].generate(texts[index], max_tokens=60))

    runners = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert made == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_goes_on_and_so_does_the_parent(threads: int, pressed: Callable[[str], Path]) -> None:
    """The threads of an engine do not live in a child: it starts its own."""
    text = draw(TOKENS)
    used, untouched = (make_engine(pressed("llama"), threads=threads) for _ in range(2))
    made = list(used.generate(text, max_tokens=20))
    assert in_child(lambda: list(used.generate(text + made, max_tokens=20))) == list(used.generate(text + made, max_tokens=20))
    assert in_child(lambda: list(untouched.generate(text, max_tokens=20))) == made
    assert list(untouched.generate(text, max_tokens=20)) == made
    used.reset()
    assert list(used.generate(text, max_tokens=20)) == made


def in_child(work: Callable[[], list[int]]) -> list[int]:
    """Run in a forked child and give what came back through a pipe; a child that hangs is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the child died"
    return cast(list[int], json.loads(answer))


# ---- generate ----


@pytest.mark.parametrize("options", [{}, {"cache": "int8"}], ids=str)
def test_a_text_that_begins_alike_gives_the_same_tokens(options: dict[str, Any], pressed: Callable[[str], Path]) -> None:
    """What two texts have in common is not run again, however the second one goes on."""
    text = draw(60)
    used = make_engine(pressed("gemma3_text"), **options)
    made = list(used.generate(text, max_tokens=10))
    for follow, common in (
        (text + made + draw(5, seed=4), 69),  # the next turn: the last token made was not run
        (text, 59),  # the same again: the last one is run for its logits
        ([*text[:30], (text[30] + 1) % VOCABULARY, *draw(20, seed=5)], 30),
        (text[:10], 9),
        ([(text[0] + 1) % VOCABULARY, *text[1:]], 0),
        (text[:1], 0),
    ):
        assert used.common(follow) == common
        got = list(used.generate(follow, max_tokens=10))
        assert got == list(make_engine(pressed("gemma3_text"), **options).generate(follow, max_tokens=10))
        assert used.length == len(follow) + 9
        used.reset()
        assert list(used.generate(text, max_tokens=10)) == made


def test_a_text_may_come_in_chunks_and_a_reader_may_leave(pressed: Callable[[str], Path]) -> None:
    text, engine = draw(70), make_engine(pressed("llama"))
    made = list(engine.generate(text, max_tokens=12))
    for chunk in (1, 5, 64, 69, 70):
        engine.reset()
        assert list(engine.generate(text, max_tokens=12, chunk=chunk)) == made
    for wanted in (1, 5):  # what was given so far stays in the cache, and the same call goes on from there
        engine.reset()
        running = engine.generate(text, max_tokens=12)
        assert [next(running) for _ in range(wanted)] == made[:wanted]
        running.close()
        assert list(engine.generate(text + made[:wanted], max_tokens=12 - wanted)) == made[wanted:]


def test_a_seed_gives_the_same_tokens_and_another_one_others(pressed: Callable[[str], Path]) -> None:
    text, engine = draw(20), make_engine(pressed("llama"), activations="int8")

    def made(seed: int, **settings: float) -> tuple[int, ...]:
        engine.reset()
        return tuple(engine.generate(text, max_tokens=24, sampling=Sampling(seed=seed, **{"temperature": 1.5, **settings})))

    assert made(1) == made(1)
    assert made(-1) == made(2**64 - 1)
    assert len({made(seed) for seed in range(5)}) == 5
    greedy = made(0, temperature=0.0)
    assert made(1, top_k=1) == made(2, top_p=1e-9) == made(3, min_p=1.0) == greedy
    # A penalty beyond all logits leaves no token twice.
    once = made(0, temperature=0.0, repetition_penalty=1e6)
    assert len(set(once) | set(text)) == len(once) + len(set(text))


def test_generation_ends_at_a_stop_token_at_the_limit_and_at_the_context(pressed: Callable[[str], Path]) -> None:
    text, engine = draw(20), make_engine(pressed("llama"), context=50)
    assert engine.context == 50
    made = list(engine.generate(text, max_tokens=1000))
    assert len(made) == 30
    assert list(engine.generate(text, max_tokens=7)) == made[:7]
    assert list(engine.generate(text, max_tokens=0)) == []
    for index in (0, 3):
        assert list(engine.generate(text, stop=[VOCABULARY - 1, made[index]])) == made[: made.index(made[index])]
    assert list(engine.generate(text + made)) == []
    assert engine.forward([5]).shape == (1, VOCABULARY)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        ([5, VOCABULARY], f"token {VOCABULARY} is not in the vocabulary of {VOCABULARY}"),
        ([5, -1], "token -1 is not"),
        ([2**31], f"token {2**31} is not"),
        ([1] * 65, "65 tokens; the context is 64"),
    ],
)
def test_tokens_that_cannot_be_run_are_refused(tokens: list[int], message: str, pressed: Callable[[str], Path]) -> None:
    engine = make_engine(pressed("llama"), context=64)
    text = draw(20)
    made = list(engine.generate(text, max_tokens=4))
    for call in (lambda: engine.forward(tokens), lambda: list(engine.generate(tokens))):
        with pytest.raises(UsageError, match=message):
            call()
    assert list(engine.generate(text, max_tokens=4)) == made


def test_a_full_context_is_refused_and_nothing_is_lost(pressed: Callable[[str], Path]) -> None:
    engine = make_engine(pressed("llama"), context=64)
    engine.forward(draw(60))
    with pytest.raises(UsageError, match="context"):
        engine.forward(draw(5))
    assert engine.length == 60
    engine.forward(draw(4))
    with pytest.raises(UsageError, match="context"):
        engine.forward([1])
    for length in (-1, 65):
        with pytest.raises(UsageError, match="cannot be cut"):
            engine.truncate(length)
    assert engine.length == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "activations='int4': it is 'int8', 'mixed' or 'none'"),
        ({"cache": "fp8"}, "cache='fp8': it is 'fp16' or 'int8'"),
        ({"context": 1025}, "context=1025: the model's own is 1024"),
        ({"context": 0}, "context=0"),
        ({"context": -5}, "context=-5"),
        ({"head": "int9-g64"}, "int9"),
        ({"head": "int4-g48"}, "64 is not a multiple of 48"),
        ({"threads": 0}, "threads"),
        ({"threads": -1}, "threads"),
        ({"threads": 5000}, "threads"),
    ],
)
def test_options_that_cannot_work_are_named(options: dict[str, Any], message: str, pressed: Callable[[str], Path]) -> None:
    with pytest.raises((UsageError, FormatError), match=message):
        make_engine(pressed("llama yarn"), **options)


def test_a_code_path_that_is_not_there_is_named(pressed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPRESS_PATH", "neon")
    with pytest.raises(UsageError, match="'neon' is not there; this processor runs"):
        make_engine(pressed("llama"))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"repetition_penalty": 0.0}],
)
def test_sampling_that_cannot_work_is_named(settings: dict[str, Any], pressed: Callable[[str], Path]) -> None:
    engine = make_engine(pressed("llama"))
    with pytest.raises(UsageError, match=next(iter(settings))):
        next(engine.generate([1, 2], sampling=Sampling(**settings)))


def test_an_unknown_kind_of_logits_is_named(pressed: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="logits='first'"):
        make_engine(pressed("llama")).forward([1], "first")  # type: ignore[arg-type]


def test_an_architecture_that_the_engine_does_not_know_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    recipe = make_recipe({"weights": "int4-g16", "quantizer": {"name": "rtn"}})
    quantize_directory(tiny_model("gpt2"), tmp_path / "out", recipe, proof=Proof(tokens=0))
    with pytest.raises(KernelUnavailable, match="use the runtime transformers"):
        make_engine(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"head_dim": 24}, "heads of 24"),
        ({"head_dim": 1024}, "heads of 1024"),
        (rope("longrope", factor=2.0, long_factor=[1.0] * 8, short_factor=[1.0] * 8), "'longrope', which is not among"),
        ({"model_type": "mixtral"}, "mixtral"),
    ],
)
def test_configurations_that_the_engine_does_not_run_are_named(changes: dict[str, Any], message: str) -> None:
    base = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
    assert refuses(build_config(base)) is None
    assert message in str(refuses(build_config({**base, **changes})))


@pytest.mark.parametrize("name", CASES)
def test_a_kept_layout_gives_the_same_bits(
    name: str, pressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITPRESS_LAYOUTS", str(tmp_path))
    options: dict[str, Any] = {"activations": "int8", "cache": "int8", "threads": 1}
    tokens, made = draw(TOKENS), []
    for _ in range(2):
        text = load_native(pressed(name), EngineOptions.of(options))
        made.append((text.engine.forward(tokens, "all"), text.engine.facts, text.file_bytes))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1:] == made[1][1:]
    assert torch.equal(made[0][0], make_engine(pressed(name), **options, head="int8-g64").forward(tokens, "all"))
