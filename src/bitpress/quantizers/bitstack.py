"""BitStack: a stack of terms of about one bit per weight, each the signs and low-rank magnitudes of the residual of the earlier terms.

Source   Wang et al. 2024, "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
         and its public code; the term is `formats.terms.sign_low_rank`, the order of blocks over a model `formats.stack_budget`.
Differs  an input's size is its root mean square over all tokens, where the code averages the norms of its samples; it is divided
         by its mean, at least `smallest`, and stored as the weight's input map, where the paper folds it into the network. Every
         term also corrects the rounding of the factors before it.
Needs    gram [in, in] float32.     Cost  a singular value decomposition a term: O(terms * out * in * min(out, in)).
Update   r_0 = w * size;  term_k = sign(r_k) * (a b), a b the nearest matrix of the rank to |r_k|;  r_k+1 = r_k - term_k
Fails    NumericsError when a factor is beyond the range of its type. An input that was always 0 counts as one of mean size.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import Format
from bitpress.formats.bit_stack import bit_stack, shorten
from bitpress.quantizers.mechanisms.storage import term_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served, output_errors

__all__ = ["BitStack"]


@dataclass(frozen=True)
class BitStack(Quantizer):
    terms: int = 2
    rank: int = 16
    dtype: str = "fp16"
    smallest: float = 1 / 64

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "a stack of signs times low-rank magnitudes that can be loaded in part"
    paper: ClassVar[str] = "P373"
    bits: ClassVar[tuple[float, float]] = (1, 4)
    # The signs of a term; the method chooses the number of terms.
    serves: ClassVar[tuple[str, ...]] = ("binary-tensor",)

    def __post_init__(self) -> None:
        if self.terms < 1 or self.rank < 1:
            raise UsageError(f"terms and rank must be 1 or more, got {self.terms} and {self.rank}.")
        if not 0 < self.smallest <= 1:
            raise UsageError(
                f"smallest={self.smallest}: must be above 0 and at most 1, a share of the mean size of the inputs."
            )

    @property
    def keeps_map(self) -> bool:
        return True

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        return self.terms * term_bytes("sign_low_rank", shape, parts, rank=self.rank, dtype=self.dtype)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        """Return the stack. The figures `error_k` and `bytes_k` belong to its first k terms; the order of terms over a model uses them."""
        check_served("bitstack", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("bitstack")
        weight = bit_stack(w, self.terms, self.rank, self._size(gram), self.dtype)
        counts = range(1, self.terms + 1)
        prefixes = [shorten(weight, k) for k in counts]
        errors = output_errors(w.float(), [prefix.dequantize() for prefix in prefixes], stats)
        figures = {f"error_{k}": error for k, error in zip(counts, errors, strict=True)}
        return Outcome(weight, figures=figures | {f"bytes_{k}": float(p.nbytes) for k, p in zip(counts, prefixes, strict=True)})

    def _size(self, gram: Float[torch.Tensor, "in in"]) -> Float[torch.Tensor, " in"]:
        """Return the size of every input relative to the mean of those that are not always 0."""
        size = gram.diagonal().clamp(min=0.0).sqrt()
        alive = size > 0
        mean = size[alive].mean() if alive.any() else torch.ones_like(size[0])
        return torch.where(alive, (size / mean).clamp(min=self.smallest), 1.0)
