"""How much the loss depends on what is made of each token, and on which outputs: gradients by the outputs of observed products."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch.overrides import TorchFunctionMode

from bitpress.calibration.observed import Observed, product_of
from bitpress.calibration.stats import add_gram_

__all__ = ["OutputGradients"]


class OutputGradients(TorchFunctionMode):
    """Records products with observed weights while a block runs forward; the backward pass after it fills `found`.

    found      by the name of a weight, for every token of its input the mean over outputs of the squared gradient
    leader_of  by the name of a weight, the first weight that has the same input

    `grams` are sums by the name of a weight, to which the gram of its outputs' gradients is added, tokens weighted by the squared norm of
    their input: the upper tiles, as `add_gram_` does. Weights of experts are left out: which tokens reach them may change once the model is compressed.
    """

    def __init__(self, observed: Sequence[Observed], grams: Mapping[str, Float[torch.Tensor, "out out"]] | None = None) -> None:
        super().__init__()
        self._grams = grams or {}
        self._by_address = {w.view.data_ptr(): w for w in observed if not w.expert}
        # Holding an input keeps its memory from being reused by another tensor, which would then look like the same input.
        self._seen: dict[tuple[int, int, int], tuple[torch.Tensor, str]] = {}
        self.found: dict[str, Float[torch.Tensor, " tokens"]] = {}
        self.leader_of: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        product = product_of(func, args, kwargs or {})
        observed = None if product is None else self._by_address.get(product[1].data_ptr())
        if product is not None and observed is not None and out.requires_grad:
            x = product[0]
            key = (x.data_ptr(), x.numel(), x._version)
            self.leader_of[observed.name] = self._seen.setdefault(key, (x, observed.name))[1]
            out.register_hook(partial(self._keep, observed.name))
            if observed.name in self._grams:
                norm = x.detach().reshape(-1, x.shape[-1]).float().norm(dim=-1, keepdim=True)
                out.register_hook(partial(self._add, observed.name, norm))
        return out

    def __exit__(self, *raised: Any) -> None:
        # An input holds the graph that its product hangs on, and the graph holds this object by its hooks: a circle through torch's own
        # memory, which Python's collector does not see.
        self._seen.clear()
        super().__exit__(*raised)

    def _add(self, name: str, norm: Float[torch.Tensor, "tokens 1"], gradient: torch.Tensor) -> None:
        add_gram_(self._grams[name], gradient.reshape(-1, gradient.shape[-1]).float() * norm)

    def _keep(self, name: str, gradient: torch.Tensor) -> None:
        squared = gradient.reshape(-1, gradient.shape[-1]).float().square().mean(-1)
        # A weight that is used twice on the same tokens counts with both uses.
        known = self.found.get(name)
        self.found[name] = squared if known is None or known.shape != squared.shape else known + squared
