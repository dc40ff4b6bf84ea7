"""Causal language models: a text of tokens in, the logits of every next token out.

loss        the mean negative log-likelihood of the next token
distance    `evaluation.measure_distance`: KL divergence a token, agreement, perplexity of both
score       the perplexity
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.calibration import Samples, read_texts, sample_windows
from bitpress.checkpoints.tokenizer import check_tokenizer, load_tokenizer
from bitpress.errors import CalibrationError, CheckpointError
from bitpress.evaluation import measure_distance, measure_perplexity
from bitpress.models.task import Outputs

__all__ = ["CausalLM", "context_length", "draw_windows"]

Tokens = Int[torch.Tensor, "samples length"]


class CausalLM:
    """The first row of the table; the protocol's docstrings hold."""

    title: ClassVar[str] = "a causal language model"
    titles: ClassVar[str] = "causal language models"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    reads_tokens: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = False
    generates: ClassVar[bool] = True

    def why_not(self, config: Any) -> str | None:
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        is_decoder = getattr(config, "is_decoder", None)
        if type(config).is_encoder_decoder or config.is_encoder_decoder:
            return "an encoder-decoder model, or the decoder of one"
        if hasattr(config, "cross_attention_hidden_size"):
            return "the decoder of an encoder-decoder model"
        if (not is_decoder and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES) or (
            is_decoder is False and hasattr(config, "add_cross_attention")
        ):
            return "an encoder"
        return None if type(config) in AutoModelForCausalLM._model_mapping else "another kind of model"

    def trial(self, config: Any, samples: int, length: int) -> Tokens:
        return torch.arange(samples * length).reshape(samples, length) % 7  # tokens that every vocabulary has

    def vary(self, inputs: Tokens, config: Any) -> Tokens:
        other = inputs.flip(1)
        return (inputs + 1) % _vocabulary(config) if torch.equal(other, inputs) else other

    def shorten(self, inputs: Tokens, length: int) -> Int[torch.Tensor, "samples shorter"]:
        return inputs[:, :length]

    def positions(self, config: Any, length: int) -> int:
        return length

    def cut(self, config: Any, count: int, length: int) -> tuple[int, int]:
        length = min(length, context_length(config) or length, max(count, 2))
        return max(count // length, 1), length

    def check_length(self, config: Any, length: int) -> None:
        context = context_length(config)
        if context is not None and length > context:
            raise CalibrationError(
                f"windows of {length} tokens are beyond the model's context of {context}; use --length {context}."
            )

    def check_directory(self, path: Path) -> None:
        check_tokenizer(path)

    def check_inputs(self, inputs: Int[torch.Tensor, "*tokens"], config: Any, where: str) -> None:
        # A token without a row in the embedding: the tokenizer is of another model.
        vocabulary = _vocabulary(config)
        if inputs.numel() and int(inputs.max()) >= vocabulary:
            raise CheckpointError(
                f"{where}: its tokenizer gives token {int(inputs.max())}, but the model has only {vocabulary}; they do not belong together."
            )

    def draw(
        self,
        data: str,
        path: Path,
        config: Any,
        *,
        samples: int,
        length: int,
        seed: int,
        chat: bool = False,
        held_out: int = 0,
    ) -> Samples:
        windows = draw_windows(data, path, samples=samples, length=length, seed=seed, chat=chat, held_out=held_out)
        for drawn in (windows.inputs, windows.held_out):
            if drawn is not None:
                self.check_inputs(drawn, config, str(path))
        return windows

    def count(self, inputs: Tokens) -> dict[str, int]:
        return {"tokens": inputs.numel()}

    def forward(self, model: Any, inputs: Tokens) -> Float[torch.Tensor, "..."]:
        logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits

    def fits(self, outputs: Float[torch.Tensor, "samples ..."], inputs: Tokens) -> bool:
        return outputs.ndim == 3 and outputs.shape[:2] == inputs.shape

    def output_values(self, config: Any, length: int) -> int:
        return length * _vocabulary(config)

    def loss(self, outputs: Float[torch.Tensor, "samples length vocabulary"], inputs: Tokens) -> Float[torch.Tensor, ""]:
        return torch.nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())

    def drawn_loss(
        self, outputs: Float[torch.Tensor, "samples length vocabulary"], generator: torch.Generator
    ) -> Float[torch.Tensor, ""]:
        flat = outputs.flatten(0, 1).float()
        # Drawn on the host, so that every device has the same targets.
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(flat, drawn.to(flat.device))

    def distance(
        self, original: Outputs, candidate: Outputs, inputs: Tokens, note: Callable[[int], None] = lambda done: None
    ) -> dict[str, Any]:
        return dataclasses.asdict(measure_distance(original, candidate, inputs, note))

    def score(self, outputs: Outputs, inputs: Tokens, note: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        figures = dataclasses.asdict(measure_perplexity(outputs, inputs, note))
        if figures["windows"] == 1:  # one window has no interval
            figures |= {"perplexity_low": None, "perplexity_high": None}
        return figures


def draw_windows(
    text: str, path: Path, *, samples: int, length: int, seed: int, chat: bool = False, held_out: int = 0
) -> Samples:
    """Read a text, tokenize it as the model in `path` does, and draw windows. Raises CalibrationError, CheckpointError."""
    tokenizer: Any = load_tokenizer(path)
    return sample_windows(read_texts(text), tokenizer, samples=samples, length=length, seed=seed, chat=chat, held_out=held_out)


def context_length(config: Any) -> int | None:
    """Return the longest text that a model takes, where its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)
