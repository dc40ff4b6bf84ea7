"""Generated texts, side by side: what the original and the compressed model continue the same prompts with.

Prompts are the first tokens of evaluation windows, of different kinds of text where there are several. Both models take the most likely
token every time, so both texts are the same up to the first token where the models disagree. The compressed model runs in the runtime
that `run` would choose; the original needs the memory for all its weights at once. Where it is not free, or where a model of transformers
does not generate, the result says so: no figure depends on these texts.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import psutil
import torch
from jaxtyping import Integer as Int

from bitpress.calibration import Samples
from bitpress.checkpoints.compressed import CompressedCheckpoint
from bitpress.checkpoints.tokenizer import load_tokenizer
from bitpress.devices import usable_bytes
from bitpress.errors import BitpressError, MemoryLimitError
from bitpress.exhaustion import is_out_of_memory
from bitpress.measure.runtimes import Runtime
from bitpress.models.opening import open_streamed
from bitpress.models.streaming import StreamedModel
from bitpress.models.tasks.causal_lm import context_length
from bitpress.report.document import Continuation, Continuations, Ending
from bitpress.runtime.detokenizer import Detokenizer, text_decoder
from bitpress.runtime.prompt import end_tokens, read_generation

__all__ = ["continue_texts", "place_difference"]

PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 3, 24, 40

Tokens = Int[torch.Tensor, "prompts length"]


def continue_texts(
    original: StreamedModel, checkpoint: CompressedCheckpoint, runtime: Runtime, samples: Samples
) -> Continuations:
    """Continue a few texts by both models. `original` has its outer parts loaded; it returns the memory of its blocks."""
    prompts, kinds = _choose(samples)
    context = context_length(original.model.config)
    room = min(NEW_TOKENS, runtime.engine.context - prompts.shape[1] if runtime.engine is not None else NEW_TOKENS)
    room = room if context is None else min(room, context - prompts.shape[1])
    try:
        ours = (
            _by_engine(runtime, prompts, room) if runtime.engine is not None else _by_copy(checkpoint, runtime, prompts, room)
        )
        theirs = _by_model(original, prompts, room)
        tokenizer = load_tokenizer(checkpoint.root)
        ends = end_tokens(read_generation(checkpoint), original.model.config, tokenizer)
        decode = text_decoder(tokenizer)
        rows = zip(kinds, prompts.tolist(), theirs, ours, strict=True)
        texts = [place_difference(kind, prompt, _cut(a, ends), _cut(b, ends), decode) for kind, prompt, a, b in rows]
    except BitpressError as error:
        return Continuations(runtime=runtime.name, tokens=room, texts=[], omitted=str(error))
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        return Continuations(runtime=runtime.name, tokens=room, texts=[], omitted=f"the model does not generate here: {reason}")
    return Continuations(runtime=runtime.name, tokens=room, texts=texts)


def place_difference(
    kind: str, prompt: Sequence[int], original: Sequence[int], compressed: Sequence[int], decode: Any
) -> Continuation:
    """Return the text of a prompt and of two continuations, divided at the first token that differs."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(original, compressed, strict=False)))

    def spoken(tokens: Sequence[int]) -> tuple[str, str, str, str]:
        """Return the text of the prompt, of the shared tokens, of the next one, and of the others."""
        detokenizer = Detokenizer(decode)
        pieces = [detokenizer.add(token) for token in (*prompt, *tokens)]
        pieces.append(detokenizer.end())
        first = len(prompt) + same
        # The text of a token that ends within a character comes with the next one.
        at = next((i for i in range(first, len(pieces)) if pieces[i]), first)
        parts = (pieces[: len(prompt)], pieces[len(prompt) : first], pieces[first : at + 1], pieces[at + 1 :])
        said, shared, token, rest = map("".join, parts)
        return said, shared, token, rest

    def ending(tokens: Sequence[int]) -> Ending | None:
        _, _, token, rest = spoken(tokens)
        return Ending(token=token, rest=rest) if len(tokens) > same else None

    before, shared, *_ = spoken(original)
    return Continuation(
        kind=kind,
        prompt=before,
        shared=shared,
        shared_tokens=same,
        original=ending(original),
        compressed=ending(compressed),
    )


def _choose(samples: Samples) -> tuple[Tokens, list[str]]:
    """Return the beginnings of a few windows and their kinds: the first window of every kind, then others."""
    kinds, windows = samples.kinds, samples.inputs
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    order = [*firsts, *(i for i in range(len(kinds)) if i not in firsts)][:PROMPTS]
    return windows[order, : min(PROMPT_LENGTH, max(windows.shape[1] // 2, 1))], [kinds[i] for i in order]


def _by_engine(runtime: Runtime, prompts: Tokens, count: int) -> list[list[int]]:
    assert runtime.engine is not None
    return [list(runtime.engine.generate(prompt, max_tokens=count)) for prompt in prompts.tolist()]


def _by_copy(checkpoint: CompressedCheckpoint, runtime: Runtime, prompts: Tokens, count: int) -> list[list[int]]:
    """Continue prompts by the decoded weights, as transformers opens them."""
    assert runtime.dtype is not None
    model = open_streamed(checkpoint.root, runtime.dtype, checkpoint)
    model.load_outer_()
    return _by_model(model, prompts, count)


@torch.no_grad()
def _by_model(model: StreamedModel, prompts: Tokens, count: int) -> list[list[int]]:
    """Continue prompts by a model of transformers; all its blocks are in memory meanwhile. Raises MemoryLimitError where they do not fit."""
    from transformers import GenerationConfig

    needed = sum(p.numel() for block in model.blocks for p in block.parameters()) * model.dtype.itemsize
    free = psutil.virtual_memory().available if model.device.type != "cuda" else usable_bytes(model.device)
    if needed > free // 2:
        raise MemoryLimitError(
            f"generating needs {needed:,} bytes for all weights at once, twice as many must be free, and {free:,} are."
        )
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    try:
        for i in range(len(model.blocks)):
            model.load_block_(i)
        model.model.generation_config = GenerationConfig()  # settings of the model's own would change what is most likely
        there = prompts.to(model.device)
        found = model.model.generate(there, attention_mask=torch.ones_like(there), generation_config=settings)
    finally:
        for i in range(len(model.blocks)):
            model.drop_block_(i)
    continued: list[list[int]] = found[:, prompts.shape[1] :].tolist()
    return continued


def _cut(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, tokens))
