"""Whether all values are finite, with one pass over them."""

import torch

__all__ = ["all_finite"]


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is a NaN or an infinity.

    Both survive in a sum of all values: opposite infinities give a NaN. Only if the sum of finite values overflows is every value tested,
    which takes far longer.
    """
    if not values.is_floating_point():
        return True
    # torch sums bfloat16 in float32 already, and is slower if asked to.
    total = values.sum() if values.dtype == torch.bfloat16 or values.itemsize >= 4 else values.sum(dtype=torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(values).all())
