"""A fingerprint of decoded values."""

import hashlib

import torch
from jaxtyping import Float

__all__ = ["digest"]


def digest(w_hat: Float[torch.Tensor, "rows in"]) -> str:
    """Return the SHA-256 of a decoded weight's float32 values, to compare after the file is read again."""
    return hashlib.sha256(w_hat.contiguous().cpu().numpy().data).hexdigest()
