"""The table of quantizers, one file and one line each."""

from bitpress.quantizers.adadim import AdaDim
from bitpress.quantizers.aespa import Aespa
from bitpress.quantizers.aligned_groups import AlignedGroups
from bitpress.quantizers.aqlm import AQLM
from bitpress.quantizers.awq import AWQ
from bitpress.quantizers.bitnet_ptq import BitNetPTQ
from bitpress.quantizers.bitstack import BitStack
from bitpress.quantizers.boa import BoA
from bitpress.quantizers.comq import COMQ
from bitpress.quantizers.db_llm import DBLLM
from bitpress.quantizers.decoupleq import DecoupleQ
from bitpress.quantizers.easyquant import EasyQuant
from bitpress.quantizers.gptaq import GPTAQ
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.higgs import HIGGS
from bitpress.quantizers.hqq import HQQ
from bitpress.quantizers.jlcm import JLCM
from bitpress.quantizers.ldlq import LDLQ
from bitpress.quantizers.lnq import LNQ
from bitpress.quantizers.mr_gptq import MRGPTQ
from bitpress.quantizers.one_bit import OneBit
from bitpress.quantizers.pb_llm import PBLLM
from bitpress.quantizers.ptq161 import PTQ161
from bitpress.quantizers.ptqtp import PTQTP
from bitpress.quantizers.pvq import PVQ
from bitpress.quantizers.quantease import QuantEase
from bitpress.quantizers.quantizer import Quantizer
from bitpress.quantizers.quip_sharp import QuIPSharp
from bitpress.quantizers.rsq import RSQ
from bitpress.quantizers.rtn import RTN
from bitpress.quantizers.spqr import SpQR
from bitpress.quantizers.squeezellm import SqueezeLLM
from bitpress.quantizers.yaqa import YAQA

__all__ = ["QUANTIZERS"]

QUANTIZERS: dict[str, type[Quantizer]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "spqr": SpQR,
    "easyquant": EasyQuant,
    "adadim": AdaDim,
    "aligned_groups": AlignedGroups,
    "jlcm": JLCM,
    "squeezellm": SqueezeLLM,
    "pb_llm": PBLLM,
    "db_llm": DBLLM,
    "ptqtp": PTQTP,
    "bitnet_ptq": BitNetPTQ,
    "one_bit": OneBit,
    "bitstack": BitStack,
    "ptq161": PTQ161,
    "gptaq": GPTAQ,
    "rsq": RSQ,
    "boa": BoA,
    "aespa": Aespa,
    "ldlq": LDLQ,
    "yaqa": YAQA,
    "quantease": QuantEase,
    "comq": COMQ,
    "decoupleq": DecoupleQ,
    "hqq": HQQ,
    "higgs": HIGGS,
    "quip_sharp": QuIPSharp,
    "pvq": PVQ,
    "aqlm": AQLM,
    "lnq": LNQ,
    "mr_gptq": MRGPTQ,
}
