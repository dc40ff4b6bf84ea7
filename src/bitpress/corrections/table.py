"""The tables of corrections, one file and one line each: terms of a weight, changes of a layer's bias, and offsets of
attention's probabilities."""

from bitpress.corrections.bias import BiasCorrection
from bitpress.corrections.correction import Correction
from bitpress.corrections.loftq import LoftQ, LQLoRA
from bitpress.corrections.lorc import LoRC
from bitpress.corrections.lqer import LQER
from bitpress.corrections.outliers import Outliers
from bitpress.corrections.qera import QERA
from bitpress.corrections.salient import Salient
from bitpress.corrections.softmax_bias import SoftmaxBias
from bitpress.corrections.svdquant import SVDQuant

__all__ = ["BIAS_CORRECTIONS", "CORRECTIONS", "OFFSET_CORRECTIONS"]

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

BIAS_CORRECTIONS: dict[str, type[BiasCorrection]] = {"bias": BiasCorrection}

OFFSET_CORRECTIONS: dict[str, type[SoftmaxBias]] = {"softmax-bias": SoftmaxBias}
