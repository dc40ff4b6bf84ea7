"""`bitpress rotations`: learn the rotation of a whole network, for the transform `rotate`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from bitpress.cli.options import (
    CalibrationText,
    DeviceMemory,
    DeviceName,
    InputFormat,
    Json,
    Length,
    Model,
    RecipeFile,
    Samples,
    SchemeName,
    Seed,
    Sets,
    Skip,
    Weights,
    computing,
)
from bitpress.cli.recipe_options import read_method
from bitpress.cli.screen import Screen, out, print_json

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog="Example: bitpress rotations smollm2-135m rotation.safetensors --scheme w4a4")
def rotations(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The safetensors file that is written.")],
    weights: Weights = None,
    scheme: SchemeName = None,
    inputs: InputFormat = None,
    recipe: RecipeFile = None,
    sets: Sets = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    skip: Skip = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of learning.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 1,
    rate: Annotated[float, typer.Option(help="Length of a step, in radians; it falls to 0 by a cosine.")] = 1.0,
    loss: Annotated[
        str, typer.Option(metavar="kl-top|cross-entropy", help="Learn by what the original says, or by the text's next tokens.")
    ] = "kl-top",
    rounds: Annotated[
        str, typer.Option(metavar="all|inputs|weights", help="Round inputs, weights or both meanwhile, as the recipe says.")
    ] = "all",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    device: DeviceName = None,
    device_memory: DeviceMemory = None,
    as_json: Json = False,
) -> None:
    """Learn a rotation of the whole network under which rounding costs less, and write it for the transform rotate."""
    from bitpress.pipeline.exporting import open_to_quantize
    from bitpress.pipeline.learned_rotations import learn_rotations
    from bitpress.tuning.network_rotations import RotationTuning

    text_options = (calibration, samples, length, seed)
    method = read_method(recipe, None, None, weights, None, sets, *text_options, skip, None, None, None, scheme, inputs, None)
    tuning = RotationTuning(steps=steps, batch=batch, rate=rate, loss=loss, rounds=rounds)  # type: ignore[arg-type]
    with computing(device, device_memory) as place, Screen() as screen:
        source = open_to_quantize(model, screen)
        found = learn_rotations(source, file, method.computed_on(place), tuning, force=force, device=place, progress=screen)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    out.print(f"held-out loss {found.held_out_before:.4g} -> {found.held_out_after:.4g} nats a token")
    if found.failed is not None:
        out.print(f"learning ended early: {found.failed}", markup=False)
    if not found.kept:
        out.print(
            "no step was better than the start on held-out text, so the file holds the rotation that learning started from"
        )
    out.print(f"{file} holds the rotation. In a recipe: transforms: [{json.dumps(found.rotate)}]", markup=False)
