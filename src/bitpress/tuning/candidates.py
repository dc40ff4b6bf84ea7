"""VQ4DiT's candidates: every vector of weights chooses softly among the nearest words of its book, and the words are learned with the choice.

Source   Deng et al. 2024, "VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers", and its public code
         (`CompressedLinear.py`): candidates by Euclidean distance, two of them; the softmax over them starts from log(d_last / d_k); a choice
         above 0.99 is frozen, and at the end the likeliest word is taken.
Differs  one candidate is the word that a closed form chose, and it begins as the likeliest one; the softmax of a choice above 0.99 counts as
         hard, but may become soft again. Scales of blocks are learned with the words. Distances are those of scaled vectors, on the recipe's
         text and not on noise. The weight of the regulariser is this file's, in units of the loss, which is relative.
Update   w_hat = s sum_k p_k words[c_k],  p = softmax(v);  loss + weight * n * mean(p (1 - p))
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int

from bitpress.errors import UsageError
from bitpress.formats import Packed
from bitpress.tuning.fixed_codes import FixedCodes
from bitpress.tuning.learned import Leaf, LearnedTerm, Start
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["Candidates"]

# A choice above this counts as made.
MADE = 0.99
# Distances that are computed at a time.
DISTANCES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Candidates(Tuning):
    """`rate` is that of words and scales, relative to their mean size; choices have `choices` times as much."""

    rate: float | None = 2e-3
    schedule: ScheduleName = "cosine"
    candidates: int = 2
    choices: float = 25.0
    weight: float = 0.1

    summary: ClassVar[str] = "a soft choice among the nearest words of a book, with the words"
    paper: ClassVar[str] = "P050"
    serves: ClassVar[tuple[str, ...]] = ("vq*",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.candidates <= 16:
            raise UsageError(f"candidates={self.candidates}: it is 2 to 16.")

    def begin(self, start: Start) -> LearnedTerm:
        return _Choices(start, self.candidates, self.choices, self.weight)


class _Choices(FixedCodes):
    def __init__(self, start: Start, count: int, rate: float, weight: float) -> None:
        super().__init__(start)
        self.start = start
        self.choice_rate, self.weighted = rate, weight
        self.candidates, distances = self._nearest(min(count, self.fmt.grid.num_codes))
        tiny = torch.finfo(torch.float32).tiny
        logits = (distances.amax(1, keepdim=True).clamp_min(tiny) / distances.clamp_min(tiny)).log()
        logits[:, 0] = logits.amax(1)
        self.logits = logits.requires_grad_()

    def _nearest(self, count: int) -> tuple[Int[torch.Tensor, "vectors count"], Float[torch.Tensor, "vectors count"]]:
        """Return the words that every vector may choose, the one of its code first, with their distances."""
        span, words = self.fmt.grid.span, self.given["words"]
        scale = self.fmt.per_block(self.given)["scale"]
        scaled = self.fmt.to_blocks(self.start.target) / torch.where(scale == 0, 1.0, scale)
        vectors = self.fmt.from_blocks(scaled, self.start.target.shape[0]).reshape(-1, span)
        codes = self.start.codes.reshape(-1, 1).long()
        found, away = [], []
        size = max(DISTANCES // len(words), 1)
        for part, own in zip(vectors.split(size), codes.split(size), strict=True):
            distance = torch.cdist(part, words)
            near = distance.scatter(1, own, -1.0).topk(count, largest=False).indices
            found.append(near)
            away.append(distance.gather(1, near))
        return torch.cat(found), torch.cat(away)

    def leaves(self) -> list[Leaf]:
        return [*super().leaves(), Leaf(self.logits, self.choice_rate)]

    def weight(self, progress: float) -> Float[torch.Tensor, "out in"]:
        params, shape = self.stored_params(), self.start.target.shape
        chosen = (self._shares()[..., None] * params["words"][self.candidates]).sum(1).reshape(shape)
        return self.fmt.from_blocks(self.fmt.to_blocks(chosen) * self.fmt.per_block(params)["scale"], shape[0])

    def penalty(self, progress: float) -> torch.Tensor:
        shares = self._shares()
        return self.weighted * shares.shape[1] * (shares * (1 - shares)).mean()

    def _shares(self) -> Float[torch.Tensor, "vectors count"]:
        shares = self.logits.softmax(1)
        top = shares.detach().amax(1, keepdim=True)
        return torch.where(top > MADE, (shares.detach() == top).float(), shares)

    @torch.no_grad()
    def harden(self) -> Packed:
        codes = self.candidates.gather(1, self.logits.argmax(1, keepdim=True)).reshape(self.start.codes.shape)
        return Packed.pack(self.fmt, codes.to(self.start.codes.dtype), self.stored_params())
