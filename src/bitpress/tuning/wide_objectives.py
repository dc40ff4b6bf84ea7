"""What spans of several blocks are learned by: blocks in a row by their outputs, the whole network by what the model says.

The blocks run one after the other; of each only its input is kept, and it runs again on the way back (gradient checkpoints), with the
parameters made anew from what is learned. So a span takes the memory of one block's backward pass and of the states between blocks.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from jaxtyping import Integer as Int
from torch.utils.checkpoint import checkpoint

from bitpress.tuning.learned import Value
from bitpress.tuning.objectives import LOSSES, Out
from bitpress.tuning.tuner import LossName, Objective

__all__ = ["TOP", "BlockRun", "NetworkObjective", "Teacher", "WindowObjective"]

# Runs a block on hidden states with some of its parameters replaced.
BlockRun = Callable[[torch.Tensor, Mapping[str, Value]], torch.Tensor]
# The likeliest tokens of the original that the KL divergence looks at.
TOP = 100


def _through(run: BlockRun, hidden: torch.Tensor, values: Mapping[str, Value]) -> torch.Tensor:
    """Run a block so that its inside is not kept for the gradient."""
    if not torch.is_grad_enabled():
        return run(hidden, values)
    out: torch.Tensor = checkpoint(lambda h: run(h, values), hidden, use_reentrant=False, preserve_rng_state=False)
    return out


class WindowObjective(Objective):
    """The outputs of blocks in a row beside their targets, each relative to the mean square of its targets; the mean over the outputs.

    runs     of the blocks in their order; `targets` what is wanted behind some of them, by their number
    inputs   hidden states of all windows of text before the first block; `counted` of them are learned from, and those after them are held out
    """

    def __init__(
        self,
        runs: Sequence[BlockRun],
        inputs: Out,
        targets: Mapping[int, Out],
        counted: int,
        loss: LossName,
        *,
        batch: int,
        device: torch.device,
        columns: int | None = None,
    ) -> None:
        self.runs, self.inputs, self.targets, self.windows = runs, inputs, targets, counted
        self.distance, self.batch, self.device, self.columns = LOSSES[loss], batch, device, slice(columns)
        self.energy = {at: self._energy(wanted[:counted]) for at, wanted in targets.items()}

    def _energy(self, wanted: Out) -> float:
        energy = torch.stack([t[..., self.columns].float().square().mean() for t in wanted.split(self.batch)]).mean()
        return max(float(energy), torch.finfo(torch.float32).tiny)

    def loss(self, values: Mapping[str, Value], rows: Int[torch.Tensor, " batch"]) -> Float[torch.Tensor, ""]:
        hidden, total = self.inputs[rows].to(self.device), torch.zeros((), device=self.device)
        for at, run in enumerate(self.runs):
            hidden = _through(run, hidden, values)
            if at in self.targets:
                wanted = self.targets[at][rows].to(self.device)[..., self.columns]
                total = total + self.distance(hidden[..., self.columns], wanted) / self.energy[at]
        return total / len(self.targets)

    @torch.no_grad()
    def held_out(self, values: Mapping[str, Value]) -> float:
        return _mean_loss(self, values, self.windows, len(self.inputs), self.batch)


class Teacher:
    """What the original says of every token of some windows: its likeliest tokens with their logits, on the host."""

    def __init__(
        self, tokens: Int[torch.Tensor, "windows positions top"], logits: Float[torch.Tensor, "windows positions top"]
    ) -> None:
        self.tokens, self.logits = tokens, logits

    @classmethod
    def of(cls, said: Sequence[torch.Tensor], top: int = TOP) -> "Teacher":
        """Keep the likeliest tokens of logits [windows, positions, vocabulary]."""
        found = [logits.float().topk(min(top, logits.shape[-1]), dim=-1) for logits in said]
        return cls(torch.cat([f.indices.int().cpu() for f in found]), torch.cat([f.values.cpu() for f in found]))


def _kl_top(
    logits: Float[torch.Tensor, "windows positions vocabulary"], tokens: torch.Tensor, wanted: torch.Tensor
) -> Float[torch.Tensor, ""]:
    """Return the mean KL divergence over the original's likeliest tokens, both sides normalised over these alone: OSTQuant's KL-Top."""
    found = logits.gather(-1, tokens.long()).float().log_softmax(-1)
    wanted = wanted.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


class NetworkObjective(Objective):
    """What the model says of texts, in nats a token: beside the original, or of the text's own next tokens.

    runs     of all blocks in their order; `says` makes logits of the inputs and the last block's output
    hidden   before the first block, `inputs` the texts themselves; `counted` of them are learned from, those after them are held out
    teacher  what the original says; None: `own_loss` of the logits and the inputs is taken, the task's own
    """

    def __init__(
        self,
        runs: Sequence[BlockRun],
        says: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        hidden: Out,
        counted: int,
        own_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        teacher: Teacher | None,
        *,
        batch: int,
        device: torch.device,
    ) -> None:
        self.runs, self.says, self.inputs, self.hidden, self.windows = runs, says, inputs, hidden, counted
        self.own_loss, self.teacher, self.batch, self.device = own_loss, teacher, batch, device

    def loss(self, values: Mapping[str, Value], rows: Int[torch.Tensor, " batch"]) -> Float[torch.Tensor, ""]:
        hidden, inputs = self.hidden[rows].to(self.device), self.inputs[rows].to(self.device)
        for run in self.runs:
            hidden = _through(run, hidden, values)
        # One text at a time: logits are the largest tensors here.
        return torch.stack(
            [self._text(h, x, row) for h, x, row in zip(hidden.split(1), inputs.split(1), rows, strict=True)]
        ).mean()

    def _text(self, hidden: torch.Tensor, inputs: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._judged(hidden, inputs, row)
        out: torch.Tensor = checkpoint(self._judged, hidden, inputs, row, use_reentrant=False, preserve_rng_state=False)
        return out

    def _judged(self, hidden: torch.Tensor, inputs: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        logits = self.says(inputs, hidden)
        if self.teacher is None:
            return self.own_loss(logits, inputs)
        at = row.reshape(1)
        return _kl_top(logits, self.teacher.tokens[at].to(self.device), self.teacher.logits[at].to(self.device))

    @torch.no_grad()
    def held_out(self, values: Mapping[str, Value]) -> float:
        return _mean_loss(self, values, self.windows, len(self.inputs), self.batch)


def _mean_loss(objective: Objective, values: Mapping[str, Value], first: int, windows: int, batch: int) -> float:
    """Return the mean loss of the windows from `first` on, run in batches."""
    total = 0.0
    for at in range(first, windows, batch):
        rows = torch.arange(at, min(at + batch, windows))
        total += float(objective.loss(values, rows)) * len(rows)
    return total / max(windows - first, 1)
