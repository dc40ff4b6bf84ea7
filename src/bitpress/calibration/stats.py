"""What calibration saw at one layer's input. Only what a method asked for is collected.

    gram        [in, in] float32    x.T @ x / tokens
    mean_abs    [in] float32        mean of |x| over tokens

Accumulation is in float32 over batches of at most a few thousand tokens each, and in float64 across batches, so the result does
not lose digits with the number of tokens.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from bitpress import native
from bitpress.errors import CalibrationError, NumericsError

__all__ = ["STATISTICS", "Stats", "StatsCollector"]

STATISTICS = frozenset({"gram", "mean_abs"})

# The gram is built from square tiles of its upper triangle: a third of the products less at 3 tiles, near half at many.
TILE = 512


@dataclass(frozen=True)
class Stats:
    """Statistics of one input; `rescaled` gives those of the same input after a scaling of its channels."""

    tokens: int
    gram: Float[torch.Tensor, "in in"] | None = None
    mean_abs: Float[torch.Tensor, " in"] | None = None

    def rescaled(self, factor: Float[torch.Tensor, " in"]) -> "Stats":
        """Give the statistics of `x * factor`."""
        return Stats(
            self.tokens,
            None if self.gram is None else self.gram * factor[:, None] * factor[None, :],
            None if self.mean_abs is None else self.mean_abs * factor.abs(),
        )

    def need_gram(self, where: str) -> Float[torch.Tensor, "in in"]:
        """Give the gram, or raise CalibrationError when nothing was measured."""
        if self.gram is None or self.tokens == 0:
            raise CalibrationError(f"{where}: no calibration statistics reached this layer.")
        return self.gram


class StatsCollector:
    """Sums up one layer's inputs, batch by batch."""

    def __init__(self, needs: Collection[str], in_features: int) -> None:
        self.needs = frozenset(needs)
        self.in_features = in_features
        self.tokens = 0
        size = native.gram_size(in_features)
        self._gram = torch.zeros(size, size) if "gram" in self.needs else None
        self._sum_abs = torch.zeros(in_features, dtype=torch.float64) if "mean_abs" in self.needs else None

    def add(self, x: Float[torch.Tensor, "*batch in"], where: str) -> None:
        """Take in a batch. Raises NumericsError, naming `where`, when a value is not finite."""
        x = x.reshape(-1, self.in_features)
        # One sum finds any NaN or infinity at the price of a read; opposite infinities give NaN, so none hides.
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise NumericsError(f"{where}: the layer's input holds a NaN or an infinity during calibration.")
        self.tokens += x.shape[0]
        if self._gram is not None:
            # The product of bf16 values is exact in float32, so multiplying them in bf16 and adding in float32 loses nothing.
            if x.dtype == torch.bfloat16 and "amx-bf16" in native.features():
                native.add_gram_(self._gram, x.contiguous())
            else:
                with _bf16_products() if x.dtype == torch.bfloat16 else nullcontext():
                    add_gram_(self._gram[: self.in_features, : self.in_features], x.float())
        if self._sum_abs is not None:
            self._sum_abs += x.float().abs().sum(0, dtype=torch.float64)

    def finish(self) -> Stats:
        tokens = max(self.tokens, 1)
        gram = None
        if self._gram is not None:
            # Only the upper tiles were summed; the lower ones are their mirror image.
            gram = torch.triu(self._gram[: self.in_features, : self.in_features])
            gram = (gram + torch.triu(gram, 1).T).div_(tokens)
            self._gram = None
        mean_abs = None if self._sum_abs is None else (self._sum_abs / tokens).float()
        return Stats(self.tokens, gram, mean_abs)


@contextmanager
def _bf16_products() -> Iterator[None]:
    """Let float32 products multiply in bf16 (2.4 times as fast with AMX); the setting is the process's, so it is put back."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def add_gram_(gram: Float[torch.Tensor, "in in"], x: Float[torch.Tensor, "tokens in"]) -> None:
    """Add x.T @ x to the tiles of `gram` on and above the diagonal; those below are left alone."""
    n = gram.shape[0]
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
