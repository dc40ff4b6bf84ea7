"""`bitpress compare`: many recipes on one model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from bitpress.cli.accuracy import parse_tasks
from bitpress.cli.options import (
    Best,
    CalibrationText,
    Compute,
    DeviceMemory,
    DeviceName,
    Documents,
    ForgetCapture,
    Inputs,
    Json,
    Keep,
    Length,
    Model,
    Only,
    Recipes,
    Requantize,
    Results,
    Samples,
    Seed,
    Tasks,
    Texts,
    TextTokens,
    Widths,
    chosen,
    computing,
    refuse_idle,
)
from bitpress.cli.screen import print_json
from bitpress.errors import BitpressError

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog="Example: bitpress compare smollm2-135m out/methods --recipes recipes.yaml --bits 4,3,2")
def compare(
    context: typer.Context,
    model: Model,
    output: Results,
    recipes: Recipes,
    bits: Widths = "4,3,2",
    only: Only = None,
    text: Texts = None,
    tokens: TextTokens = 32768,
    calibration: CalibrationText = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    inputs: Inputs = None,
    compute: Compute = "auto",
    tasks: Tasks = None,
    documents: Documents = 500,
    best: Best = 3,
    keep: Keep = False,
    forget_capture: ForgetCapture = False,
    device: DeviceName = None,
    device_memory: DeviceMemory = None,
    requantize: Requantize = False,
    as_json: Json = False,
) -> None:
    """Measure many recipes on one model, where everything but the recipe is the same.

    Recipes without inputs of their own are calibrated on those of the original's blocks, which one pass collects for all. Exits 1
    when a recipe failed; the others are measured all the same.
    """
    from bitpress.cli.compare import Board, parse_texts, parse_widths
    from bitpress.comparison.run import HELDOUT, compare_recipes
    from bitpress.comparison.variants import read_candidates
    from bitpress.pipeline.exporting import open_to_quantize
    from bitpress.recipes import make_recipe

    given = chosen(text=calibration, samples=samples, length=length, seed=seed, inputs=inputs)
    shared = make_recipe({"compute": compute, "calibration": {"inputs": "original", **given}}).calibration
    candidates, notes = read_candidates(recipes, parse_widths(bits), given, compute=compute, only=only or ())
    rest: dict[str, Any] = {"documents": documents, "best": best, "keep": keep, "forget_capture": forget_capture}
    texts, names = parse_texts(text, HELDOUT), parse_tasks(tasks)
    refuse_idle(context, "--tasks", not names, ("documents", "best"))
    with computing(device, device_memory) as place, Board(len(candidates), list(texts), names) as board:
        for note in notes:
            board.note(note)
        done = compare_recipes(
            open_to_quantize(model, board, requantize=requantize),
            output,
            candidates,
            texts,
            shared=shared,
            tokens=tokens,
            length=shared.length,
            tasks=names,
            device=place,
            **rest,
            progress=board,
            note_row=board.row,
        )
    _show({**done, "model": model}, output, as_json=as_json)


def _show(done: Mapping[str, Any], output: Path, *, as_json: bool) -> None:
    """Write the page and print the result. Raises BitpressError where a recipe failed."""
    from bitpress.cli.compare import show_comparison, write_page

    write_page(done, output)
    failed = [row for row in done["rows"] if row["failed"]]
    message = None
    if failed:
        names = ", ".join(dict.fromkeys(row["name"] for row in failed))
        message = f"{len(failed)} of {len(done['rows'])} recipes failed: {names}; their rows say why."
    elif any(row["failed"] for row in done["answers"]):
        message = "some recipes have no answers to the tasks; their rows say why."
    error = {} if message is None else {"error": {"code": 1, "kind": "BitpressError", "message": message}}
    print_json({**done, **error}) if as_json else show_comparison(done, output)
    if message is not None:
        raise BitpressError(message)
