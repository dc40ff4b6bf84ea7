"""Whether numbers are numbers, at the price of reading them once."""

import torch

__all__ = ["all_finite"]


def all_finite(values: torch.Tensor) -> bool:
    """Say whether no value is a NaN or an infinity.

    A sum meets every value, and both stay in it: opposite infinities give a NaN. Only where finite values add up beyond the range is every
    one looked at, which takes far longer.
    """
    if not values.is_floating_point():
        return True
    # Sums of bfloat16 are in float32 as it is, and slower where that is asked for.
    total = values.sum() if values.dtype == torch.bfloat16 or values.itemsize >= 4 else values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())
