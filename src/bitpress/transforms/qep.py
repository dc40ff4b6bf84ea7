"""QEP: replace the weight by one that makes the uncompressed model's output from the inputs that the compressed layers before produce.

Source   Arai and Ichikawa 2025, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization"; strength 0.5 and
         damping by the whole mean of the diagonal as in the authors' public code (`gptq.py`: run_weight_correct, `llama.py`).
Differs  the down projection is corrected too, which their code leaves out; the inputs are measured once per block, so that the
         asymmetry is that of the block's input, unless calibration.sequential is on. GPTAQ with target="whole" and GPTQ's damping is
         the same shift.
Needs    gram, cross [in, in] float32.     Cost  O(out * in^2 + in^3) time; nothing stored.
Update   w += strength * w @ cross @ inv(gram + damp * mean_diag * I)
Fails    CalibrationError without statistics. If cross was not measured (experts), or the change would be as large as the
         weight, the weight is left as it is: a named fallback.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float

from bitpress.errors import UsageError
from bitpress.transforms.balance import need_gram
from bitpress.transforms.sites import Sites
from bitpress.transforms.target import TargetStats

__all__ = ["QEP"]


@dataclass(frozen=True)
class QEP:
    strength: float = 0.5
    damp: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "cross"})
    sites: ClassVar[Sites] = {}
    summary: ClassVar[str] = "another target for the codes: makes up for the errors of the layers before"
    paper: ClassVar[str] = "yardstick: QEP"

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength={self.strength}: it is above 0 and at most 1.")
        if not self.damp > 0:
            raise UsageError(f"damp={self.damp}: it is above 0, in means of the gram's diagonal.")

    def aim(
        self, w: Float[torch.Tensor, "out in"], stats: TargetStats | None
    ) -> tuple[Float[torch.Tensor, "out in"], tuple[str, ...]]:
        w = w.float()
        if stats is None or stats.cross is None:
            return w, ("the inputs in the uncompressed model are unknown; the QEP correction was skipped for this layer",)
        gram = need_gram(stats, "qep")
        size = gram.diagonal().mean()
        if not size > 0:
            return w, ()
        factor, failed = torch.linalg.cholesky_ex(gram / size + self.damp * torch.eye(gram.shape[0], device=gram.device))
        shift = self.strength * torch.cholesky_solve((w @ (stats.cross / size)).T, factor).T
        if failed or not shift.norm() < w.norm():  # also where something is not finite
            return w, ("the QEP correction is larger than the weight; it was skipped for this layer",)
        return w + shift, ()
