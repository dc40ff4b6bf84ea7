"""Write docs/architectures.md: every causal language model of transformers, tiny, through the whole road, by rounding and by the default.

`python scripts/list_architectures.py` tries all of them; with names, those alone, and prints their rows.
"""

import os
import runpy
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "architectures.md"
LAW = runpy.run_path(str(ROOT / "tests" / "laws" / "architectures.py"))


def main(names: list[str]) -> None:
    os.environ["BITPRESS_LAYOUTS"] = "off"
    quiet()
    rows = {}
    for name in names or LAW["names"]():
        rows[name] = try_one(name)
        print(row(name, rows[name]), flush=True)
    if not names:
        TARGET.write_text(document(rows), encoding="utf-8")


def quiet() -> None:
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def try_one(name: str) -> str:
    """Return "works", or why it does not: a refusal, or what broke."""
    from bitpress.calibration import builtin_texts

    outcome = "works"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(next(iter(builtin_texts("calibration").values()))[:20_000], encoding="utf-8")
        for kind, recipe in LAW["recipes"](text).items():
            try:
                outcome = LAW["walk_the_road"](name, Path(folder) / kind, recipe)
            except ImportError as error:
                return f"cannot be built: {_first_sentence(error)}"
            except Exception as error:  # noqa: BLE001 - the table says what breaks, whatever it is
                return f"not yet ({kind}): {type(error).__name__}: {_first_sentence(error)}"
            if outcome != "works":
                return outcome
    return outcome


def document(rows: dict[str, str]) -> str:
    import transformers

    works = sum(outcome == "works" for outcome in rows.values())
    head = f"""# Architectures

Every `model_type` that transformers {transformers.__version__} opens with `AutoModelForCausalLM`: {len(rows)}, of which {works} work. `make docs` writes this
page: each is shrunk to a tiny model of random weights, quantized by rounding and by the default recipe, loaded decoded and packed,
and its logits are those of the original with the decoded weights in it. `make test` does so for one of every kind of structure.

bitpress runs a model's own code block by block, with one block's weights in memory. Where more than hidden states goes from block to block
(several streams, keys and values that later layers use again, inputs of every layer that follow from the text) all of that is stored
between blocks. Four kinds of models are refused, before any work and with exit code 3:

* what is no causal language model: encoders, encoder-decoders, and decoders cut out of them;
* models whose blocks run several times in one forward, or which compute a block's input from more than the block before it;
* models whose blocks share a weight: it would be compressed twice, differently;
* models that need a package that is not installed.

Weights with fewer inputs than a group of their format has, such as the 4 columns of Gemma 3n's `altup` layers, are kept as they are; the
plan and the report say so for each.

| model_type | class | works, or why not |
|---|---|---|
"""
    return head + "\n".join(row(name, outcome) for name, outcome in rows.items()) + "\n"


def row(name: str, outcome: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return f"| `{name}` | `{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]}` | {outcome.replace('|', '/')} |"


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200]


def rows_of(text: str) -> Iterable[tuple[str, str]]:
    """Read the table back: model_type and outcome."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 3:
            yield cells[0].strip("`"), cells[2]


if __name__ == "__main__":
    main(sys.argv[1:])
