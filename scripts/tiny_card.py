"""The card of a test model that `scripts/train_tiny.py` trains: README.md of its directory."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Facts", "card"]


@dataclass(frozen=True)
class Facts:
    """What a card says.

    heldout   the loss by kind of the held-out built-in text, of the weights as stored, and the mean over all kinds
    shares    the least and the largest share of the choices of an expert, by layer; empty without experts
    texts     (kind, package, documents, bytes)
    """

    name: str
    class_name: str
    parameters: int
    shape: Mapping[str, object]
    steps: int
    tokens: int
    text_tokens: int
    seconds: float
    device: str
    heldout: Mapping[str, float]
    heldout_tokens: int
    shares: Sequence[tuple[float, float]]
    texts: Sequence[tuple[str, str, int, int]]
    left_out: str
    seed: int


def card(facts: Facts) -> str:
    """Write the card."""
    parts = [_HEAD.format(name=facts.name), _about(facts), _figures(facts), _experts(facts), _text(facts), _LICENCE]
    return "\n\n".join(part for part in parts if part) + "\n"


_HEAD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags:
- tiny
- test
---
# {name}

A language model for tests and quick tables. It is trained, its weights lie on no grid, and quantizing it costs seconds. It is no
model to talk to: it writes English words and little sense."""

_LICENCE = """## Licence

The text is in the public domain. The weights are under the licence of bitpress, Apache-2.0."""


def _about(facts: Facts) -> str:
    rows = [("class", f"`{facts.class_name}`"), ("parameters", f"{facts.parameters:,}, in bfloat16")]
    rows += [(name, str(value)) for name, value in facts.shape.items()]
    return _table(("shape", ""), rows)


def _figures(facts: Facts) -> str:
    spent = f"{facts.seconds:.0f} seconds of one thread of {facts.device}, which other work shared"
    rows = [("steps", f"{facts.steps:,}"), ("tokens", f"{facts.tokens:,}, of a text of {facts.text_tokens:,}")]
    rows += [("processor time", spent), ("seed", str(facts.seed))]
    judged = [(kind, f"{loss:.3f}", f"{math.exp(loss):.1f}") for kind, loss in facts.heldout.items()]
    return (
        f"## Training\n\n`python scripts/train_tiny.py {facts.name}` in a clone of the repository. The curve is in\n"
        f"`benchmarks/results/{facts.name}-loss.csv`. The loss was still falling at the end.\n\n{_table(('training', ''), rows)}\n\n"
        f"On {facts.heldout_tokens:,} tokens of the held-out built-in text (`builtin:heldout`), of the weights as stored:\n\n"
        + _table(("text", "loss, nats a token", "perplexity"), judged)
    )


def _experts(facts: Facts) -> str:
    if not facts.shares:
        return ""
    rows = [(str(layer), f"{100 * low:.1f} %", f"{100 * high:.1f} %") for layer, (low, high) in enumerate(facts.shares)]
    table = _table(("layer", "least used expert", "most used expert"), rows)
    return f"## Routing\n\nShares of the router's choices on the same text; equal use would be 12.5 %.\n\n{table}"


def _text(facts: Facts) -> str:
    rows = [(kind, source, f"{documents:,}", f"{count / 1e6:.2f} MB") for kind, source, documents, count in facts.texts]
    table = _table(("kind", "package", "documents", "size"), rows)
    books = (
        "The books are History of the United States (Beard), Manual of Surgery (Thomson and Miles) and War and Peace (Tolstoy)."
    )
    left_out = (
        f"Left out, so that calibration and evaluation on the built-in texts are on unseen text: {facts.left_out}. Every paragraph "
        "that shares a longer run of characters with a built-in text is left out too: no run of 200 characters occurs in both."
    )
    return f"## Text\n\n{table}\n\n{books}\n\n{textwrap.fill(left_out, 120)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
