"""Find the nearest of many codewords, exactly, in blocks that stay in the cache.

    argmin |x - c|^2  =  argmax  x.c - |c|^2 / 2        one matrix product, with the halved squares as one more column

Every word is scored. Cutting large books into cells and skipping cells by the triangle inequality leaves 4% of the scores for 65,536
words of 8 numbers, but selecting them takes as long as computing all: tried and left out.
"""

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress import native

__all__ = ["nearest", "searched_natively"]

# Up to this size, native code scores all words vector by vector; for larger books a matrix product is faster.
NATIVE_WORDS = 1 << 10
# Words scored at a time, and scores: 2 MiB, so that the reductions read them from the cache.
WORDS_TOGETHER = 1 << 12
SCORES_TOGETHER = 1 << 19


def searched_natively(vectors: torch.Tensor, count: int) -> bool:
    """Return whether `native.beam_search` takes these vectors and books of `count` words."""
    return vectors.device.type == "cpu" and vectors.dtype == torch.float32 and count <= NATIVE_WORDS and native.available()


def nearest(vectors: Float[torch.Tensor, "n span"], words: Float[torch.Tensor, "count span"]) -> Int[torch.Tensor, " n"]:
    """Return the index of the nearest word of every vector, in int64.

    `max` and `argmax` take ten times as long as `amax`, which is vectorized: the best group of words is found by its largest score,
    and the best word of that group alone.
    """
    count, span = words.shape
    if searched_natively(vectors, count):
        return native.beam_search(vectors, words[None], 1)[0]
    size = 1 if count <= 32 else 16 if count <= 4096 else 64
    scored = torch.cat([words, words.square().sum(-1, keepdim=True) / -2], dim=-1)
    if count % size:
        scored = torch.nn.functional.pad(scored, (0, 0, 0, -count % size))
        scored[count:, -1] = -torch.inf  # never chosen
    groups = scored.view(-1, size, span + 1)
    numbers = torch.arange(len(groups), dtype=torch.float32, device=words.device)[:, None]
    found = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    # The same memory every time: fresh pages cost more than the product.
    together = max(min(SCORES_TOGETHER // min(len(scored), WORDS_TOGETHER), len(vectors)), 1)
    room = vectors.new_empty(min(len(scored), WORDS_TOGETHER) * together)
    tops = vectors.new_empty(len(groups) * together)
    for at in range(0, len(vectors), together):
        part = vectors[at : at + together]
        n = len(part)
        part = torch.cat([part, torch.ones_like(part[:, :1])], dim=-1)
        top = tops[: len(groups) * n].view(len(groups), n)
        for start in range(0, len(scored), WORDS_TOGETHER):
            some = scored[start : start + WORDS_TOGETHER]
            scores = torch.mm(some, part.T, out=room[: len(some) * n].view(len(some), n))
            torch.amax(scores.view(-1, size, n), 1, out=top[start // size : (start + len(some)) // size])
        best = torch.where(top == top.amax(0), numbers, 0.0).amax(0).long()
        if size > 1:
            best = best * size + torch.bmm(groups[best], part[:, :, None])[..., 0].max(-1).indices
        found[at : at + n] = best
    return found
