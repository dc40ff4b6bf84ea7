"""The bridge into transformers: after `import bitpress`, `AutoModelForCausalLM.from_pretrained(DIR)` knows the method "bitpress".

transformers builds its model, hands it over before any weight is loaded, and fills what it then finds by name. All of bitpress's own
checks run in that moment, so a directory that `bitpress.load` refuses is refused here too.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitpress.checkpoints.pressed import PressedCheckpoint
from bitpress.errors import CheckpointError
from bitpress.runtime.layers import PackedExperts, PackedLinear
from bitpress.runtime.loading import install_

__all__ = ["register"]


class BitpressConfig(QuantizationConfigMixin):
    """What config.json says; everything else is in the manifest."""

    def __init__(self, version: int = 1, weights: str = "decoded", **kwargs: Any) -> None:
        self.quant_method = "bitpress"
        self.version = version
        self.weights = weights


class BitpressQuantizer(HfQuantizer):
    """Puts packed layers into the model before loading and decodes them after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not checkpoint_files:
            raise CheckpointError("a bitpress model is loaded from its directory; there are no files here.")
        directory = Path(checkpoint_files[0]).parent
        pressed = PressedCheckpoint.open(directory)
        pressed.check_fits(model.state_dict())
        model.config._experts_implementation = "eager"
        install_(model, pressed, model.dtype)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, (PackedLinear, PackedExperts)):
                module.weight_terms()  # every check of content
                if self.quantization_config.weights == "decoded":
                    module.decode_()
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return dtype

    def is_serializable(self, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def register(_: Any = None) -> None:
    """Tell transformers about the method, once."""
    if "bitpress" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("bitpress")(BitpressConfig)
        register_quantizer("bitpress")(BitpressQuantizer)
