"""Scales as codes of bitsandbytes' dynamic map, under a float for every run of them and their mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float

from bitpress.errors import NumericsError
from bitpress.formats.scale_store import Outer, Shapes

__all__ = ["DoubleQuantized", "dynamic_map"]


@dataclass(frozen=True)
class DoubleQuantized:
    """Scales minus their mean, in blocks of 256 over the tensor, as codes of the 8-bit dynamic map times the block's largest.

    Source   Dettmers et al. 2023, "QLoRA", double quantization; the map is that of bitsandbytes' dynamic quantization.
    """

    block: int = 256

    def outer(self, scale: Float[torch.Tensor, "down across"]) -> dict[str, torch.Tensor]:
        offset = scale.float().mean().reshape(1, 1)
        if not bool(torch.isfinite(offset).all()):
            raise NumericsError("the mean of the scales is beyond the range of dq; store scales as fp32.")
        flat = torch.nn.functional.pad((scale - offset).reshape(-1), (0, -scale.numel() % self.block))
        largest = flat.view(-1, self.block).abs().amax(-1, keepdim=True).expand(-1, self.block)
        return {"offset": offset, "block": largest.reshape(-1)[: scale.numel()].reshape(scale.shape)}

    def round(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        return self._decoded(self._codes(scale, outer), outer)

    def beside(self, scale: torch.Tensor, outer: Outer) -> tuple[torch.Tensor, torch.Tensor]:
        nearest = self._codes(scale, outer)
        return self._decoded((nearest - 1).clamp(min=0), outer), self._decoded((nearest + 1).clamp(max=255), outer)

    @property
    def fine_bits(self) -> int:
        return 7  # 1/142 of the largest difference to the mean, at most: half a step of 128 levels

    def pack(self, scale: Float[torch.Tensor, "down across"], outer: Outer) -> dict[str, torch.Tensor]:
        codes = self._codes(scale, outer).to(torch.uint8)
        block = outer["block"].reshape(-1)[:: self.block].clone(memory_format=torch.contiguous_format)
        return {"": codes.contiguous(), "block": block, "offset": outer["offset"].reshape(1)}

    def unpack(self, stored: Mapping[str, torch.Tensor], across: int) -> Float[torch.Tensor, "down across"]:
        return self._decoded(stored[""].long(), self.stored_outer(stored, across))

    def stored_outer(self, stored: Mapping[str, torch.Tensor], across: int) -> dict[str, torch.Tensor]:
        codes = stored[""]
        block = stored["block"].repeat_interleave(self.block)[: codes.numel()].reshape(codes.shape)
        return {"offset": stored["offset"].reshape(1, 1), "block": block}

    def expected(self, down: int, across: int) -> Shapes:
        blocks = -(-down * across // self.block)
        return {"": (torch.uint8, (down, across)), "block": (torch.float32, (blocks,)), "offset": (torch.float32, (1,))}

    def shared_by_rows(self) -> bool:
        return True

    @property
    def coarseness(self) -> float:
        return 0.5

    def _codes(self, scale: torch.Tensor, outer: Outer) -> torch.Tensor:
        levels = dynamic_map().to(scale.device)
        block = outer["block"]
        values = (scale - outer["offset"]) / torch.where(block == 0, 1.0, block)
        return torch.bucketize(values.contiguous(), (levels[1:] + levels[:-1]) / 2)

    def _decoded(self, codes: torch.Tensor, outer: Outer) -> torch.Tensor:
        return (dynamic_map().to(codes.device)[codes] * outer["block"] + outer["offset"]).clamp(min=0)


@cache
def dynamic_map() -> Float[torch.Tensor, " 256"]:
    """Return the 256 levels of the signed dynamic map: for every decade, a fraction in linear steps; 7 decades at most."""
    levels: list[float] = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade + 1
        edges = torch.linspace(0.1, 1, count)
        middles = (edges[:-1] + edges[1:]) / 2
        levels += (10.0 ** (decade - 6) * middles).tolist()
        levels += (-(10.0 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)
