"""Options and arguments of the commands."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from bitpress.errors import UsageError
from bitpress.runtime.native.options import MOST_THREADS, CacheType
from bitpress.runtime.sampling import LIMITS

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a .gguf file, a named model (`bitpress models`) or a hub name.")
]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write. The same command resumes a stopped run.")]
Explain = Annotated[bool, typer.Option("--explain", help="Print the preset's recipe and the reason for it, and stop.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory that bitpress wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Requantize = Annotated[bool, typer.Option("--requantize", help="Quantize a model that is quantized already.")]
ForRuntime = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="RUNTIME", help="Choose what this runtime can load (`bitpress targets`), and export to it at the end."
    ),
]
Weights = Annotated[str | None, typer.Option(help="Number format, for example int4-g64-zero (`bitpress formats`).")]
QuantizerName = Annotated[str | None, typer.Option("--quantizer", help="Method (`bitpress methods`).")]
Tunings = Annotated[
    list[str] | None,
    typer.Option(
        "--tune",
        metavar="NAME",
        help="Learn the compressed weights further, block by block: signround, block-ap, ... (`bitpress methods`). May be repeated.",
    ),
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme", metavar="NAME", help="Weights and inputs of products together: w8a8, fp8, w4a8, ... (`bitpress methods`)."
    ),
]
InputFormat = Annotated[
    str | None,
    typer.Option("--inputs", metavar="FORMAT", help="Round the inputs of products, token by token, for example int8-row."),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML file with any of the settings, or a named recipe (moqe, qtip).")
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
        metavar="int8|mixed|none", help="native: inputs of products in 8 bits or in float; mixed: float in prompts only."
    ),
]
Cache = Annotated[
    str | None, typer.Option(metavar="|".join(get_args(CacheType)), help="native: type of the stored keys and values.")
]
Head = Annotated[
    str | None, typer.Option(metavar="FORMAT|keep", help="native: format for an uncompressed output head, int8-g64 by default.")
]
Context = Annotated[int | None, typer.Option(min=2, help="native: tokens to make room for.")]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Read only so much of a model quantized by bitstack, e.g. 60MB.")
]
Width = Annotated[
    int | None, typer.Option(metavar="8|4|2", help="Read a nested model (bipolar8-...-nested) at so many bits a weight.")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Weights not to quantize, e.g. '*.down_proj'; '!*.experts.*' makes an exception. May be repeated."),
]
Embeddings = Annotated[
    str | None,
    typer.Option(metavar="FORMAT|keep", help="Format of the embedding table, int8-row by default where there is one."),
]
OutputHead = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="FORMAT|keep",
        help="Format of the output head, int8-row by default; one that is tied is the table too.",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Multiple-choice tasks: arc-easy,piqa,... or FILE.jsonl, separated by commas. No perplexity then, unless you set --tokens or --text.",
    ),
]
Documents = Annotated[int, typer.Option(min=1, help="Questions of every task, from the first.")]
Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="By default as many as the process may use.")]

DeviceName = Annotated[
    str | None, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="What computes; auto is a GPU if there is one.")
]
DeviceMemory = Annotated[
    str | None, typer.Option("--device-memory", metavar="SIZE", help="Take at most so much of a GPU's memory, e.g. 2GB.")
]

# Of `run`.
Prompt = Annotated[str | None, typer.Option(help="Text to answer; without it, a chat on the terminal.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End where this text appears. May be repeated.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
Temperature = Annotated[float, typer.Option(min=LIMITS["temperature"].least, help="0 picks the most likely token.")]
TopK = Annotated[
    int | None, typer.Option(min=int(LIMITS["top_k"].least), help="Choose among the k most likely tokens; 0: among all.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=LIMITS["top_p"].least, max=LIMITS["top_p"].most, help="Choose among the fewest with this probability together."
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=LIMITS["min_p"].least,
        max=LIMITS["min_p"].most,
        help="Leave out tokens less likely than this share of the most likely one.",
    ),
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, tokens that appeared before become less likely.")]
SamplingSeed = Annotated[int, typer.Option(help="For temperatures above 0.")]
Runtime = Annotated[str, typer.Option(help="auto, native or transformers; auto is native where the engine knows the model.")]
Packed = Annotated[bool, typer.Option("--packed", help="transformers: hold the codes in memory, not the decoded weights.")]

# Of `compare`.
Results = Annotated[Path, typer.Argument(metavar="OUT", help="The directory of the results. The same command goes on there.")]
Recipes = Annotated[Path, typer.Option(help="YAML file of recipes by name, or a directory of recipe files.")]
Widths = Annotated[str, typer.Option(help="Widths that take the place of {bits} in a recipe.")]
Only = Annotated[list[str] | None, typer.Option(help="Recipes to run, e.g. 'gptq*'. May be repeated.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SOURCE", help="Evaluation text; by default two built-in kinds. May be repeated."),
]
TextTokens = Annotated[int, typer.Option(min=2, help="Tokens of every evaluation text.")]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="original|pressed", help="Inputs that blocks are calibrated on; the original is run once for all recipes."
    ),
]
Compute = Annotated[str, typer.Option(metavar="auto|bf16|fp32", help="Arithmetic of calibration and measuring.")]
Best = Annotated[int, typer.Option(min=1, help="Recipes of every width that answer the tasks, the best by KL.")]
Keep = Annotated[bool, typer.Option("--keep", help="Publish the model of every recipe in OUT/models.")]
ForgetCapture = Annotated[bool, typer.Option("--forget-capture", help="Remove OUT/capture when all is done.")]


def chosen(**values: Any) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in values.items() if value is not None}


def computing(device: str | None, memory: str | None) -> AbstractContextManager[Any]:
    """Compute on the device that --device names, within --device-memory; gives the torch.device."""
    from bitpress.checkpoints.budget import parse_bytes
    from bitpress.devices import computing_on

    return computing_on(device, None if memory is None else parse_bytes(memory))


def is_set(context: typer.Context, *names: str) -> bool:
    """Claim that one of these options stands on the command line."""
    sources = map(context.get_parameter_source, names)
    return any(source is not None and source.name == "COMMANDLINE" for source in sources)


def refuse_idle(context: typer.Context, needed: str, is_missing: bool, names: tuple[str, ...]) -> None:
    """Raise UsageError for options in use that have no effect without another one."""
    for name in names:
        if is_missing and is_set(context, name):
            raise UsageError(f"--{name} needs {needed}.")
