"""Every way to learn, by the name that a recipe uses."""

from bitpress.tuning.adaround import AdaRound
from bitpress.tuning.block_ap import BlockAP
from bitpress.tuning.flexround import LRQ, FlexRound
from bitpress.tuning.learned_clipping import LearnedClipping
from bitpress.tuning.parameters import NormTweaking, Parameters
from bitpress.tuning.signround import SignRound
from bitpress.tuning.tuner import Tuning

__all__ = ["TUNINGS"]

TUNINGS: dict[str, type[Tuning]] = {
    "adaround": AdaRound,
    "block-ap": BlockAP,
    "flexround": FlexRound,
    "learned-clipping": LearnedClipping,
    "lrq": LRQ,
    "norm-tweaking": NormTweaking,
    "parameters": Parameters,
    "signround": SignRound,
}
