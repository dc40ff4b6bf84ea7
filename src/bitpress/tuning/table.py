"""Every way to learn, by the name that a recipe uses."""

from bitpress.tuning.adaquant import AdaQuant
from bitpress.tuning.adaround import AdaRound
from bitpress.tuning.affinequant import AffineQuant
from bitpress.tuning.apiq import ApiQ
from bitpress.tuning.block_ap import BlockAP
from bitpress.tuning.candidates import Candidates
from bitpress.tuning.cbq import CBQ
from bitpress.tuning.decoupleq import DecoupleQ
from bitpress.tuning.e2e_qp import E2EQP
from bitpress.tuning.flatquant import FlatQuant
from bitpress.tuning.flexround import LRQ, FlexRound
from bitpress.tuning.jlcm import JLCM
from bitpress.tuning.learned_clipping import LearnedClipping
from bitpress.tuning.low_rank import LowRankFactors
from bitpress.tuning.modcap import ModCap
from bitpress.tuning.norm_tweaking import NormTweaking
from bitpress.tuning.omniquant import OmniQuant
from bitpress.tuning.ostquant import OSTQuant
from bitpress.tuning.parameters import Parameters
from bitpress.tuning.ptq161 import PTQ161
from bitpress.tuning.quip_sharp import QuIPSharp
from bitpress.tuning.signround import SignRound
from bitpress.tuning.spinquant import SpinQuant
from bitpress.tuning.tuner import Tuning
from bitpress.tuning.wkvquant import WKVQuant

__all__ = ["TUNINGS"]

TUNINGS: dict[str, type[Tuning]] = {
    "adaquant": AdaQuant,
    "adaround": AdaRound,
    "affinequant": AffineQuant,
    "apiq": ApiQ,
    "block-ap": BlockAP,
    "candidates": Candidates,
    "cbq": CBQ,
    "decoupleq": DecoupleQ,
    "e2e-qp": E2EQP,
    "flatquant": FlatQuant,
    "flexround": FlexRound,
    "jlcm": JLCM,
    "learned-clipping": LearnedClipping,
    "low-rank": LowRankFactors,
    "lrq": LRQ,
    "modcap": ModCap,
    "norm-tweaking": NormTweaking,
    "omniquant": OmniQuant,
    "ostquant": OSTQuant,
    "parameters": Parameters,
    "ptq161": PTQ161,
    "quip-sharp": QuIPSharp,
    "signround": SignRound,
    "spinquant": SpinQuant,
    "wkvquant": WKVQuant,
}
