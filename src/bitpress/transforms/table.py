"""The table of transforms: names to the searches that choose their factors."""

from bitpress.transforms.awq_scale import AWQScale

__all__ = ["TRANSFORMS"]

TRANSFORMS: dict[str, type[AWQScale]] = {"awq-scale": AWQScale}
