"""Tokenize long texts once in a process of tests: every quantized model is proven on the same built-in texts, half a second each time.

Short texts, and tokenizers that are not transformers' own fast ones, are tokenized anew at every call. So are all texts in processes
that a test starts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bitpress.calibration import samples

__all__ = ["install"]

LONG = 50_000  # characters

_kept: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}


def _remember(tokenize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    from transformers import PreTrainedTokenizerFast

    def tokenize_once(units: Sequence[Any], tokenizer: Any, enough: int, generator: torch.Generator) -> torch.Tensor:
        long = sum(len(unit.text or "") for unit in units) > LONG
        if not long or type(tokenizer) is not PreTrainedTokenizerFast or type(tokenizer).__call__ is not _call:
            return tokenize(units, tokenizer, enough, generator)
        state = generator.get_state().numpy().tobytes()
        key = (tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, tuple(units), enough, state)
        if key not in _kept:
            _kept[key] = (tokenize(units, tokenizer, enough, generator), generator.get_state())
        tokens, after = _kept[key]
        generator.set_state(after)
        return tokens.clone()

    _call = PreTrainedTokenizerFast.__call__
    return tokenize_once


def install() -> None:
    """Remember what `sample_windows` tokenizes from now on."""
    samples._tokenize = _remember(samples._tokenize)
