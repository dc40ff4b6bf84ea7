"""Options and arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A directory, a .gguf file, a named model (`bitpress models`) or a hub name.")]
Directory = Annotated[Path, typer.Argument(help="A directory that bitpress wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Weights = Annotated[str | None, typer.Option(help="Number format, for example int4-g64-zero (`bitpress formats`).")]
QuantizerName = Annotated[str | None, typer.Option("--quantizer", help="Method (`bitpress methods`).")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with any of the settings, or a named recipe (moqe).")
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", metavar="fast|balanced|best", help="The recipe that measured best under the preset's rule."),
]
PresetBits = Annotated[int | None, typer.Option("--bits", help="Bits of the preset's codes; alone: of the preset balanced.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE with dotted keys, e.g. quantizer.damp=0.05.")]
CalibrationText = Annotated[str | None, typer.Option("--calibration", help="builtin, a .txt or .jsonl file, or hf:NAME.")]
Samples = Annotated[int | None, typer.Option(help="Calibration windows.")]
Length = Annotated[int | None, typer.Option(help="Tokens a window.")]
Seed = Annotated[int | None, typer.Option(help="Which windows are drawn.")]
Activations = Annotated[
    str | None,
    typer.Option(
        metavar="int8|mixed|none", help="native: inputs of products in 8 bits or in float; mixed: those of prompts in float."
    ),
]
Cache = Annotated[str | None, typer.Option(metavar="fp16|int8", help="native: type of the kept keys and values.")]
Head = Annotated[
    str | None, typer.Option(metavar="FORMAT|keep", help="native: format for an uncompressed output head, int8-g64 by default.")
]
Context = Annotated[int | None, typer.Option(min=2, help="native: tokens that there must be room for.")]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Read only so much of a model that bitstack made, e.g. 60MB.")]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Weights to leave alone, e.g. '*.down_proj'; '!*.experts.*' takes back. May be given again."),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Multiple-choice tasks: arc-easy,piqa,... or FILE.jsonl, separated by commas."),
]
Documents = Annotated[int, typer.Option(min=1, help="Questions of every task, the first ones.")]
