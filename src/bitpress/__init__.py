"""bitpress: quantize pretrained language models to few bits, prove what that cost, and run them.

    import bitpress
    report = bitpress.quantize("smollm2-135m", "out/smollm2-4bit")
    model = bitpress.load("out/smollm2-4bit")

Importing this package imports neither torch nor transformers. It only arranges that transformers, whenever it is imported, learns to
read the directories that bitpress writes.
"""

import sys
from typing import TYPE_CHECKING, Any

import wrapt

from bitpress.version import __version__

if TYPE_CHECKING:
    from bitpress.api import evaluate, evaluate_tasks, export, learn_rotations, load, load_tokenizer, quantize

__all__ = ["__version__", "evaluate", "evaluate_tasks", "export", "learn_rotations", "load", "load_tokenizer", "quantize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from bitpress import api

        return getattr(api, name)
    raise AttributeError(f"module 'bitpress' has no attribute {name!r}")


def _register(_: Any) -> None:
    bridge = sys.modules.get("bitpress.runtime.hf.bridge")
    if bridge is not None and not hasattr(bridge, "register"):
        return  # the bridge itself is being imported, and imports transformers
    from bitpress.runtime.hf.bridge import register

    register()


wrapt.register_post_import_hook(_register, "transformers.quantizers.auto")
