"""A model of transformers without its weights, and the few verbs that fill it piece by piece.

Parameters start on the `meta` device (a shape, no memory); buffers that a module computes by itself, such as rotary frequencies,
are real from the start. Code that comes with a checkpoint is never run: the architecture must be one that transformers knows.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from bitpress.errors import CheckpointError, UsageError
from bitpress.exhaustion import is_out_of_memory
from bitpress.models.tasks.table import find_task

__all__ = ["build_config", "build_skeleton", "find_stacks", "move_buffers_", "restore_ties_", "set_parameter_"]


def build_config(values: Mapping[str, Any]) -> Any:
    """Make transformers' configuration object from the content of config.json. Raises CheckpointError, UsageError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise _unknown_type(model_type, values.get("auto_map"), CONFIG_MAPPING.keys())
    kept = {k: v for k, v in values.items() if k not in ("auto_map", "quantization_config", "transformers_weights")}
    kept = {k: v for k, v in kept.items() if not (k in ("dtype", "torch_dtype") and v == "auto")}  # which says nothing
    if "rescale_every" in kept:
        kept["rescale_every"] = 0  # RWKV would halve its weights in place while it runs, against overflow in half precision
    try:
        return CONFIG_MAPPING[model_type].from_dict(kept)
    except (TypeError, ValueError, LookupError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json does not describe a {model_type} model: {_one_line(error)}") from error


def build_skeleton(config: Any, dtype: torch.dtype, *, where: str = "config.json") -> Any:
    """Build the model that a configuration describes, by the class of its task, parameters on `meta`, in evaluation mode.

    `where` stands in errors for the configuration. Raises CheckpointError.
    """
    import transformers

    auto_class: Any = getattr(transformers, find_task(config, where).auto_class)
    try:
        with _empty_parameters():
            # One expert at a time goes through plain linear products, where calibration and packed weights can see it.
            model = auto_class.from_config(config, dtype=dtype, experts_implementation="eager")
    except ImportError as error:
        raise CheckpointError(f"{config.model_type} needs a package that is not installed: {_one_line(error)}") from error
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"config.json cannot be built as {config.model_type}: {_one_line(error)}") from error
    return model.eval().requires_grad_(False)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Put the parameters of modules on `meta` and mark them as initialized.

    A parameter on `meta` has no values, but drawing them takes three quarters of the time that a model takes to build. Buffers
    are computed: some are right only behind the initialization of their module.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import guard_torch_init_functions

    with init_empty_weights(include_buffers=False), guard_torch_init_functions():
        register = torch.nn.Module.register_parameter

        def register_initialized(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
            if param is not None:
                param._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers asks before it draws
            register(self, name, param)

        torch.nn.Module.register_parameter = register_initialized  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def set_parameter_(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Return a parameter or a buffer its value, or take its memory away by a value on `meta`."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        raise CheckpointError(f"{name!r} is no parameter of {type(model).__name__}.")


def move_buffers_(model: torch.nn.Module, device: torch.device) -> None:
    """Move what modules compute by themselves, such as rotary frequencies, to a device."""
    for module in model.modules():
        for leaf, value in module._buffers.items():
            if value is not None:
                module._buffers[leaf] = value.to(device)


def restore_ties_(model: Any) -> None:
    """Let tied parameters share one tensor again, after their originals have been set."""
    for alias, original in dict(model.all_tied_weights_keys).items():
        set_parameter_(model, alias, model.get_parameter(original).data)


def find_stacks(model: torch.nn.Module) -> list[tuple[str, torch.nn.ModuleList]]:
    """Find the lists of blocks that lie in no other, those with most parameters first; small ones are no stacks."""
    found: list[tuple[int, str, torch.nn.ModuleList]] = []
    for name, module in model.named_modules():
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module) > 0
            and not any(name.startswith(f"{n}.") for _, n, _ in found)
        ):
            found.append((sum(p.numel() for p in module.parameters()), name, module))
    if not found:
        raise CheckpointError(f"{type(model).__name__} has no list of blocks to walk.")
    found.sort(key=lambda entry: -entry[0])
    return [(name, module) for size, name, module in found if size * 10 >= found[0][0]]


def _unknown_type(model_type: str, code: Any, known: Iterable[str]) -> CheckpointError | UsageError:
    if code:
        named = next((str(value) for value in code.values()), "") if isinstance(code, dict) else str(code)
        return CheckpointError(
            f"config.json: model_type {model_type[:80]!r} needs code that comes with the checkpoint (auto_map: {named[:80]}), "
            "which is never run; only architectures of transformers itself are read."
        )
    near = difflib.get_close_matches(model_type.lower(), list(known), n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UsageError(  # a newer transformers may know it: not the file's fault
        f"config.json: unknown model_type {model_type[:80]!r}. {hint}transformers {version('transformers')} has no such "
        "architecture; a newer one may have it."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]  # some list every name that they know
