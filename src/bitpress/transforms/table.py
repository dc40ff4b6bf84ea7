"""The table of transforms: changes of the whole network, of the operands of attention and of how channels of inputs are rounded, searches for channel factors (for groups of weights), changes of basis and of
target (for single weights).

Every row declares its sites, and whether it is folded or stays online there (`transforms.sites`).
"""

from bitpress.transforms.aqas import AQAS
from bitpress.transforms.awq_scale import AWQScale
from bitpress.transforms.balance import Balance
from bitpress.transforms.basis import BasisChange
from bitpress.transforms.dgq_smooth import DGQSmooth
from bitpress.transforms.disassemble import Disassemble
from bitpress.transforms.equalize import Equalize
from bitpress.transforms.fptq_smooth import FPTQSmooth
from bitpress.transforms.hadamard import HadamardBasis
from bitpress.transforms.klt import KLT
from bitpress.transforms.llm_fp4_scale import LLMFP4Scale
from bitpress.transforms.orthogonal import OrthogonalBasis
from bitpress.transforms.qep import QEP
from bitpress.transforms.qk_hadamard import QKHadamard
from bitpress.transforms.qqq_smooth import QQQSmooth
from bitpress.transforms.rearrange import Rearrange
from bitpress.transforms.reassemble import Reassemble
from bitpress.transforms.repquant_scale import RepQuantScale
from bitpress.transforms.rotate import Rotate
from bitpress.transforms.shift import Shift
from bitpress.transforms.smooth_plus import SmoothPlus
from bitpress.transforms.smoothquant import SmoothQuant
from bitpress.transforms.target import Target
from bitpress.transforms.transform import ScaleSearch

__all__ = [
    "ATTENTION_CHANGES",
    "BASIS_CHANGES",
    "CHANNEL_CHANGES",
    "NETWORK_CHANGES",
    "SCALE_SEARCHES",
    "TARGETS",
    "TRANSFORMS",
]

NETWORK_CHANGES: dict[str, type[Rotate]] = {"rotate": Rotate}

ATTENTION_CHANGES: dict[str, type[QKHadamard]] = {"qk-hadamard": QKHadamard}

CHANNEL_CHANGES: dict[str, type[Shift] | type[Disassemble]] = {"shift": Shift, "disassemble": Disassemble}

SCALE_SEARCHES: dict[str, type[ScaleSearch]] = {
    "awq-scale": AWQScale,
    "smooth-plus": SmoothPlus,
    "smoothquant": SmoothQuant,
    "aqas": AQAS,
    "qqq-smooth": QQQSmooth,
    "dgq-smooth": DGQSmooth,
    "fptq-smooth": FPTQSmooth,
    "llm-fp4-scale": LLMFP4Scale,
    "equalize": Equalize,
    "repquant-scale": RepQuantScale,
}

BASIS_CHANGES: dict[str, type[BasisChange]] = {
    "balance": Balance,
    "hadamard": HadamardBasis,
    "orthogonal": OrthogonalBasis,
    "klt": KLT,
    "rearrange": Rearrange,
    "reassemble": Reassemble,
}

TARGETS: dict[str, type[Target]] = {"qep": QEP}

TRANSFORMS: dict[
    str,
    type[Rotate] | type[QKHadamard] | type[Shift] | type[Disassemble] | type[ScaleSearch] | type[BasisChange] | type[Target],
] = {
    **NETWORK_CHANGES,
    **ATTENTION_CHANGES,
    **CHANNEL_CHANGES,
    **SCALE_SEARCHES,
    **BASIS_CHANGES,
    **TARGETS,
}
