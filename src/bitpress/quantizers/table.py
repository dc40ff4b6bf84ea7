"""The table of quantizers, one file and one line each."""

from typing import Any

from bitpress.quantizers.awq import AWQ
from bitpress.quantizers.gptq import GPTQ
from bitpress.quantizers.rtn import RTN

__all__ = ["QUANTIZERS"]

QUANTIZERS: dict[str, type[Any]] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ}
