"""Capture: record every product with a weight while a block runs, for any architecture.

Products are recognised by the address of the weight. Products with the same input share one set of statistics.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bitpress.calibration.attention import Attention, HeadCollector, Role, is_attention, token_weights
from bitpress.calibration.observed import Observed, product_of
from bitpress.calibration.stats import Stats, StatsCollector, of_origin
from bitpress.errors import CalibrationError

__all__ = ["Capture", "Observed"]


class _Left(Exception):
    """Raised to leave a forward after its last observed product."""


class Capture(TorchFunctionMode):
    """Collects statistics of every observed weight while active. Call `next_batch` between forwards, or let `run` do both.

    If the inputs of the uncompressed model are needed too, run its forward first, inside `original`. `roles` names the weights of the
    block's attention, for statistics of its heads. Inputs of a forward `run` with `held_out` are kept and not counted. `loss_weights` returns the weights of this forward's tokens for the input of a weight,
    or None where they are not known; such an input has no `loss_gram`.
    """

    def __init__(
        self,
        observed: Sequence[Observed],
        needs: Collection[str],
        roles: Mapping[Role, Observed] | None = None,
        loss_weights: Callable[[str], torch.Tensor | None] = lambda name: None,
    ) -> None:
        super().__init__()
        self._loss_weights = loss_weights
        self._by_address = {w.view.data_ptr(): w for w in observed}
        self._needs = needs
        self._attention_needed = bool(of_origin(needs, "attention"))
        self._heads = HeadCollector(roles) if roles else None
        self._leader: dict[str, str] = {}
        self._collectors: dict[str, StatsCollector] = {}
        # Inputs of this forward and the groups that have counted them. Holding an input keeps its memory from being reused
        # by another tensor, which would then look like the same input.
        self._seen: dict[tuple[int, tuple[int, int], int], tuple[torch.Tensor, list[str]]] = {}
        self._recording = False
        # Windows and positions of a forward whose inputs are kept and not counted.
        self._held_out: tuple[int, int] | None = None
        self._originals: dict[str, torch.Tensor] = {}
        # Inputs whose tokens the loss does not weigh one by one: an expert's, and positions that a model leaves out on its way.
        self._unweighed: set[str] = set()
        self._attention: list[Attention] = []
        self._attended = False
        # Products with observed weights in this forward, and in a whole one if that number is constant.
        self._products = 0
        self._products_of_whole: int | None = None
        self._leave_after: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = product_of(func, args, kwargs)
        if product is not None and product[1].data_ptr() in self._by_address:
            self._note(*product)
            self._products += 1
            if self._products == self._leave_after:
                raise _Left
        if self._attention_needed and not self._recording and self._held_out is None and is_attention(func):
            self._attention.append(Attention.of(args, kwargs))
        return func(*args, **kwargs)

    def run(
        self,
        forward: Callable[[], torch.Tensor],
        *,
        whole: bool,
        original: bool = False,
        held_out: tuple[int, int] | None = None,
    ) -> torch.Tensor | None:
        """Run a forward, of the uncompressed model if `original`, and record its inputs. With `held_out`, its windows and positions, inputs
        are kept and not counted.

        Without `whole`, a forward stops after its last product with an observed weight and the result is None, once an earlier forward
        has shown which product that is.
        """
        self._products = 0
        needs_all = whole or self._attention_needed or self._heads is not None
        self._leave_after = None if needs_all else self._products_of_whole
        self._held_out = held_out
        try:
            with self.original() if original else self:
                out = forward()
        except _Left:
            return None
        finally:
            self._leave_after, self._held_out = None, None
            if not original:
                self.next_batch()
        if not any(w.expert for w in self._by_address.values()):
            self._products_of_whole = self._products
        return out

    @contextmanager
    def original(self) -> Iterator[None]:
        """Record the inputs of a forward of the uncompressed model; those of the next forward are compared with them."""
        self._originals.clear()
        self._recording = True
        try:
            with self:
                yield
        finally:
            self._recording = False

    def next_batch(self) -> None:
        """Forget the inputs of the forward that just ended."""
        if self._attention:
            self._take_attention()
        self._seen.clear()
        self._originals.clear()

    def groups(self) -> list[list[str]]:
        """Return the names of weights that shared their input, in the order of first use."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def finish(self) -> dict[str, Stats]:
        """Return the statistics by weight. Weights that share an input share the object, except for statistics of heads.

        Unused weights are absent.
        """
        if self._attention_needed and not self._attended and self._leader:
            raise CalibrationError(
                "this method needs the attention of the block, but the block never calls torch's attention; use another method."
            )
        done = {leader: collector.finish() for leader, collector in self._collectors.items()}
        done |= {leader: replace(done[leader], loss_gram=None) for leader in self._unweighed}
        return {name: self._with_heads(name, done[leader]) for name, leader in self._leader.items()}

    def _note(self, x: torch.Tensor, w: torch.Tensor, axis: int) -> None:
        if w.ndim == 3:  # all experts in one batched product
            for e in range(w.shape[0]):
                self._note(_routed(x[e]) if x.ndim == 3 else x, w[e], axis)
            return
        observed = self._by_address.get(w.data_ptr())
        if observed is None or w.ndim != 2 or x.numel() == 0:
            return
        if (w.stride(axis) == 1) != observed.out_first and min(w.shape) > 1:
            raise CalibrationError(
                f"{observed.name}: the model uses the weight transposed, against its module's declaration; leave it out with --skip."
            )
        if self._recording:
            # An expert gets other tokens there, so nothing can be compared token by token.
            if not observed.expert:
                self._originals[observed.name] = x.clone()
            return
        counted = self._seen.setdefault((x.data_ptr(), (x.numel(), x.shape[-1]), x._version), (x, []))[1]
        if self._held_out is not None and observed.name not in self._leader:
            return  # an expert that no counted token reached
        leader = self._leader.setdefault(observed.name, counted[0] if counted else observed.name)
        if leader not in counted:
            counted.append(leader)
            if leader not in self._collectors:
                self._collectors[leader] = StatsCollector(self._needs, observed.in_features, x.device)
            if self._held_out is not None:
                self._collectors[leader].hold_out(x, None if observed.expert else self._held_out)
                return
            self._collectors[leader].add(x, observed.name)
            if "loss_gram" in self._needs:
                self._add_by_loss(leader, x)
            original = self._originals.get(leader)
            if original is not None:
                self._collectors[leader].add_original(x, original)

    def _add_by_loss(self, leader: str, x: torch.Tensor) -> None:
        weights = self._loss_weights(leader)
        if weights is None or weights.numel() != x.numel() // x.shape[-1]:
            self._unweighed.add(leader)
        elif leader not in self._unweighed:
            self._collectors[leader].add_weighted("loss_gram", x, weights)

    def _take_attention(self) -> None:
        """Add the token weights and head statistics of the forward that just ended."""
        self._attended = True
        experts = {w.name for w in self._by_address.values() if w.expert}
        if "attention_gram" in self._needs:
            weights = torch.stack([token_weights(attention) for attention in self._attention]).mean(0).flatten()
            for (_, _, version), (x, leaders) in self._seen.items():
                # An expert's tokens, and an input that was overwritten since, cannot be weighed.
                if x._version == version and x.numel() == weights.numel() * x.shape[-1]:
                    for leader in set(leaders) - experts:
                        self._collectors[leader].add_weighted("attention_gram", x, weights)
        if self._heads is not None and len(self._attention) == 1:
            value = self._heads.weights["value"].name
            for (_, _, version), (x, leaders) in self._seen.items():
                if x._version == version and self._leader.get(value) in leaders:
                    self._heads.add(self._attention[0], x)
        self._attention.clear()

    def _with_heads(self, name: str, stats: Stats) -> Stats:
        if self._heads is None:
            return stats
        row_gram, head_gram = self._heads.finish(name, max(stats.tokens, 1))
        return stats if row_gram is None else replace(stats, row_gram=row_gram, head_gram=head_gram)


def _routed(x: torch.Tensor) -> torch.Tensor:
    """Remove the tokens that were routed elsewhere (zero rows); return the tensor itself if there are none."""
    reached = x.any(-1)
    return x if bool(reached.all()) else x[reached]
