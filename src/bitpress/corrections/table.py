"""The table of corrections, one file and one line each."""

from bitpress.corrections.correction import Correction
from bitpress.corrections.loftq import LoftQ, LQLoRA
from bitpress.corrections.lorc import LoRC
from bitpress.corrections.lqer import LQER
from bitpress.corrections.outliers import Outliers
from bitpress.corrections.qera import QERA
from bitpress.corrections.salient import Salient
from bitpress.corrections.svdquant import SVDQuant

__all__ = ["CORRECTIONS"]

CORRECTIONS: dict[str, type[Correction]] = {
    "lorc": LoRC,
    "lqer": LQER,
    "qera": QERA,
    "loftq": LoftQ,
    "lq-lora": LQLoRA,
    "svdquant": SVDQuant,
    "outliers": Outliers,
    "salient": Salient,
}
