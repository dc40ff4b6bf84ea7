"""The bridge into transformers: after `import bitpress`, `AutoModelForCausalLM.from_pretrained(DIR)` knows the method "bitpress".

transformers reads config.json, asks here about the attention, looks for the weight files, builds its model, hands it over, and fills
what it then finds by name. All of bitpress's own checks run at the first of these moments at which the directory is known, and the files
that are about to be read must be the manifest's, so a directory that `bitpress.load` refuses is refused here too.
"""

import os
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

from bitpress.checkpoints.pressed import PressedCheckpoint, is_pressed
from bitpress.errors import CheckpointError, FormatError
from bitpress.runtime.layers import PackedExperts, PackedLinear
from bitpress.runtime.loading import install_, refuse_saving_

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

    _pressed: PressedCheckpoint | None = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Check a local directory before transformers follows any name in it. (The first call that gets the configuration.)"""
        given = getattr(config, "_name_or_path", "")
        if given and is_pressed(given):
            self._pressed = PressedCheckpoint.open(given)
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not checkpoint_files:
            raise CheckpointError("a bitpress model is loaded from its directory; there are no files here.")
        pressed = self._opened(Path(checkpoint_files[0]).parent, model.config)
        shards = sorted(str(pressed.root / name) for name in pressed.manifest.files if name.endswith(".safetensors"))
        if shards != sorted(str(Path(os.path.realpath(Path(file).parent), Path(file).name)) for file in checkpoint_files):
            raise CheckpointError(f"{pressed.root}: transformers would read other weight files than the manifest lists.")
        pressed.check_fits(model.state_dict(), model.all_tied_weights_keys)
        model.config._experts_implementation = "eager"
        install_(model, pressed, model.dtype)
        return model

    def _opened(self, directory: Path, config: Any) -> PressedCheckpoint:
        given = Path(getattr(config, "_name_or_path", "") or directory)
        if given.is_dir() and not Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(given)):
            raise CheckpointError(f"{given}: the index leads out of the directory.")
        if self._pressed is not None and self._pressed.root == Path(os.path.realpath(directory)):
            return self._pressed
        return PressedCheckpoint.open(directory)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, (PackedLinear, PackedExperts)):
                try:
                    module.weight_terms()  # every check of content but those that only decoding makes
                    if self.quantization_config.weights == "decoded":
                        module.decode_()
                except FormatError as error:
                    raise CheckpointError(f"{model.config.name_or_path}: {name}: {error}") from error
        refuse_saving_(model)
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
