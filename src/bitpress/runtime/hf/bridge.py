"""The bridge into transformers: after `import bitpress`, `AutoModelForCausalLM.from_pretrained(DIR)` knows the method "bitpress".

transformers reads config.json, asks here about the attention, looks for the weight files, builds its model, hands it over, fills what
it finds by name, and hands it over again. It finds the parameters outside the blocks; everything else is read here. All of bitpress's own
checks run at the first of these moments at which the directory is known, and the files that are about to be read must be the manifest's,
so a directory that `bitpress.load` refuses is refused here too.

A decoded model leaves as one of transformers' own: nothing in it says that it was compressed. A packed one stays marked as quantized.
"""

import os
from collections.abc import Mapping
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

from bitpress.checkpoints.compressed import OUTER_NAME, WEIGHT_FILE_MARKS, CompressedCheckpoint, is_compressed
from bitpress.checkpoints.safetensors_file import read_tensor
from bitpress.errors import CheckpointError, UsageError
from bitpress.models.attention import round_attention_
from bitpress.models.skeleton import set_parameter_
from bitpress.models.tasks.table import find_task
from bitpress.runtime.hf.layers import refuse_saving, replace_
from bitpress.runtime.hf.loading import train_

__all__ = ["register"]

# Keys that transformers may find or miss without a word: the checks here are stricter than its report.
_REPORTS = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")


class BitpressConfig(QuantizationConfigMixin):
    """What config.json says; everything else is in the manifest."""

    def __init__(self, version: int = 1, weights: str = "decoded", **kwargs: Any) -> None:
        self.quant_method = "bitpress"
        self.version = version
        self.weights = weights


class BitpressQuantizer(HfQuantizer):
    """Takes the compressed weights out of the model before transformers loads the rest, and puts their values in after."""

    requires_calibration = True

    _checkpoint: CompressedCheckpoint | None = None
    _reports: Mapping[str, Any] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        """Check a local directory before transformers follows any name in it. (The first call that gets the configuration.)"""
        given = getattr(config, "_name_or_path", "")
        if given and is_compressed(given):
            self._checkpoint = CompressedCheckpoint.open(given)
        if getattr(config, "transformers_weights", None) in WEIGHT_FILE_MARKS:
            config.transformers_weights = OUTER_NAME
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not checkpoint_files:
            raise CheckpointError("a bitpress model is loaded from its directory; there are no files here.")
        checkpoint = self._checkpoint = self._opened(Path(checkpoint_files[0]).parent, model.config)
        expected = [OUTER_NAME]
        if OUTER_NAME not in checkpoint.manifest.files:
            expected = [name for name in checkpoint.manifest.files if name.endswith(".safetensors")]
        found = [str(Path(os.path.realpath(Path(file).parent), Path(file).name)) for file in checkpoint_files]
        if sorted(str(checkpoint.root / name) for name in expected) != sorted(found):
            raise CheckpointError(f"{checkpoint.root}: transformers would read other weight files than the manifest lists.")
        _check_class(checkpoint, model)
        model.config.__dict__.pop("transformers_weights", None)
        model.config._experts_implementation = "eager"
        for name in checkpoint.manifest.weights:
            owner, leaf = _place(model, name)
            there = owner._parameters[leaf]
            # Out of the state dict, in its place among the parameters, and what transformers would initialise bears its mark.
            there._is_hf_initialized = True  # type: ignore[union-attr]
            owner._parameters[leaf] = None
            owner.__dict__[leaf] = there
        self._reports = {name: getattr(model, name) for name in _REPORTS}
        for name in _REPORTS:
            setattr(model, name, {"."})
        return model

    def _opened(self, directory: Path, config: Any) -> CompressedCheckpoint:
        given = Path(getattr(config, "_name_or_path", "") or directory)
        if given.is_dir() and not Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(given)):
            raise CheckpointError(f"{given}: the index leads out of the directory.")
        if self._checkpoint is not None and self._checkpoint.root == Path(os.path.realpath(directory)):
            return self._checkpoint
        return CompressedCheckpoint.open(directory)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from transformers.modeling_utils import PreTrainedModel

        assert self._checkpoint is not None
        checkpoint, is_packed = self._checkpoint, self.quantization_config.weights == "packed"
        for name, own in self._reports.items():
            setattr(model, name, own)
        for name, entry in checkpoint.plain.items():
            there = model.get_parameter_or_buffer(name)
            value = read_tensor(checkpoint.tensors[name][0], entry)
            set_parameter_(model, name, value.to(_device(there), there.dtype))
        for name, record in checkpoint.manifest.weights.items():
            owner, leaf = _place(model, name)
            device, dtype = _device(_neighbour(model, name)), owner.__dict__.pop(leaf).dtype
            if is_packed or record.input is not None:
                layer, parameter = checkpoint.read_layer(name), record.parameter(name)
                for packed in replace_(model, parameter, layer, dtype, checkpoint.manifest.aliases, keep=not is_packed):
                    packed.to(device)
            else:
                owner._parameters[leaf] = torch.nn.Parameter(checkpoint.decode(name).to(device, dtype))
        model.tie_weights(recompute_mapping=False)
        round_attention_(model, checkpoint.load_attention())
        if is_packed or checkpoint.rounds_inputs:
            model.save_pretrained = refuse_saving
        else:
            train_(model)
            self.remove_quantization_config(model)
            model.__dict__.pop("is_quantized", None)
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config.__dict__.pop("_is_quantized", None)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return dtype

    def is_serializable(self, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _check_class(checkpoint: CompressedCheckpoint, model: Any) -> None:
    """Raise CheckpointError unless the parameters are the model's; where it is of another class than was compressed, that is the reason."""
    import transformers

    try:
        checkpoint.check_fits(model.state_dict(), model.all_tied_weights_keys)
    except CheckpointError as error:
        auto_class = find_task(model.config, str(checkpoint.root)).auto_class
        made = getattr(transformers, auto_class)._model_mapping.get(type(model.config), None)
        if made is None or isinstance(model, made):
            raise
        raise CheckpointError(
            f"{checkpoint.root}: holds a {made.__name__}, and {type(model).__name__} has other parameters; open it with {auto_class}."
        ) from error


def _place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf


def _neighbour(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a parameter of the smallest module around a weight that has one."""
    while name:
        name = name.rpartition(".")[0]
        found = next(model.get_submodule(name).parameters(), None)
        if found is not None:
            return found
    raise CheckpointError(f"{type(model).__name__} has no parameter that is not compressed.")


def _device(there: torch.Tensor) -> torch.device:
    if there.is_meta:
        raise UsageError("a bitpress model is not offloaded; leave device_map out, or give one device that has room for it.")
    return there.device


def register(_: Any = None) -> None:
    """Tell transformers about the method, once."""
    if "bitpress" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("bitpress")(BitpressConfig)
        register_quantizer("bitpress")(BitpressQuantizer)


register()  # where this module is what imports transformers, nobody else does
