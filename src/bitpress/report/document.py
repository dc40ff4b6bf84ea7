"""The report of a run, `report.json` of a published directory, as records that are checked when they are written and when they are read.

The JSON schema of these records is published as docs/report.schema.json (`scripts/list_report.py` writes it). Unknown keys are let
through, since newer versions add some; every key that this version writes is declared here. Keys with a default were added later, or
belong to some runs only: older reports have none.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from bitpress.checkpoints.directory import safe_file
from bitpress.checkpoints.jsonfile import read_json
from bitpress.errors import CheckpointError

__all__ = [
    "REPORT_NAME",
    "Channels",
    "Continuation",
    "Continuations",
    "Distribution",
    "LayerRow",
    "Report",
    "TokenErrors",
    "TunedSpan",
    "Utilization",
    "WeightPicture",
    "check_report",
    "dump_report",
    "read_report",
    "report_schema",
]

REPORT_NAME = "report.json"
# A figure; an infinite one is a string.
Figure = float | Literal["inf", "-inf"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Distribution(_Closed):
    """How the values of a weight are spread, as shares of a sample of them.

    deviation              standard deviation of the original weight, the mean over experts
    reach                  the bins divide the values from -reach to reach standard deviations into equal parts
    original, compressed   values in every bin, in 10,000ths of all
    outside                share of the original's values beyond the bins
    largest                the largest original value, in standard deviations
    """

    deviation: float
    reach: float
    original: list[int]
    compressed: list[int]
    outside: float
    largest: float


class Channels(_Closed):
    """The input channels that stand out most, the largest first.

    ranked_by  "inputs": by the size of the calibration inputs; "weights": by that of the weight's column, where no input was measured
    of         how many channels there are
    index      numbers of the channels
    inputs     root mean square of the channel's inputs, as a multiple of the median channel's
    weights    root mean square of the weight's column, likewise
    error      the channel's share of the squared error, if every channel erred by itself
    """

    ranked_by: Literal["inputs", "weights"]
    of: int
    index: list[int]
    inputs: list[float] | None
    weights: list[float]
    error: list[float]


class Utilization(_Closed):
    """How much of the box that one scale would span is filled (`evaluation.utilization`): by the weight's rows and by its input, each [before
    the transforms, after]. None where the input was not sampled."""

    weights: list[float]
    inputs: list[float] | None = None


class WeightPicture(_Closed):
    """What a weight looks like before and after; of experts, all together."""

    distribution: Distribution
    channels: Channels
    utilization: Utilization | None = None


class TokenErrors(_Closed):
    """Relative squared errors of the layer's output on some held-out tokens: of plain rounding, and as compressed."""

    tokens: int
    error_rounded: float
    error: float


class LayerRow(_Closed):
    """The report's entry for a weight.

    bits_per_weight  from the bytes that are stored, maps included
    error_rounded    relative squared error of plain rounding in the same format; `error` that of the weight as compressed
    measured_on      "output": errors are those of the layer's output on the calibration inputs; "weight": of the weight itself
    calibrated       whether calibration statistics decided the codes, and no part fell back
    tokens           calibration tokens that reached the weight; for experts, a number for each
    held_out         errors on tokens that calibration did not count: "all" of them, and those of each class of `calibration.held_out`
                     that has any; None where nothing was held out
    inputs           how the input of its product is rounded; None: it is not
    choice           what the layer chose of the recipe's settings, and what was measured; None where there was no choice
    seconds          time spent on compressing it
    picture          its distribution and its outlier channels
    """

    name: str
    shape: list[int]
    format: str
    bytes: int
    bits_per_weight: float
    error_rounded: float
    error: float
    measured_on: Literal["output", "weight"]
    calibrated: bool
    tokens: int | list[int]
    held_out: dict[str, TokenErrors] | None = None
    inputs: str | None = None
    choice: str | None = None
    notes: list[str]
    fallbacks: list[str]
    seconds: float = 0.0
    picture: WeightPicture | None = None


class TunedSpan(_Closed):
    """How a block, one weight of it, several blocks or the network was learned by gradients. Losses are relative to the energy of what is aimed
    at, those of the network in nats a token.

    name         of the block or the weight (the span is a layer then), of the first block with the number of the last one (windows), or of the
                 stack of blocks (network); `tuning` is the method's name
    learned      parameters that were learned, from so many calibration `tokens`
    kept         whether the result is kept; False: the start was no worse on held-out windows, and stays
    before       the loss of the start on held-out windows, `after` that of the best state seen
    calibration  the loss on calibration windows over the steps, as means of equal numbers of steps
    failed       why it ended early
    """

    name: str
    tuning: str
    span: Literal["block", "layer", "windows", "network"]
    steps: int
    learned: int
    tokens: int
    before: float
    after: float
    kept: bool
    calibration: list[float]
    seconds: float
    failed: str | None = None


class TextDistance(_Closed):
    """KL divergence on the windows of one kind of text; `kl_ci95` is half the 95 % interval, None for a single window."""

    text: str
    windows: int
    kl_mean: Figure
    kl_ci95: float | None


class PositionDistance(_Closed):
    """KL divergence at the positions `first` to `last` of all windows, counted from 0."""

    first: int
    last: int
    kl_mean: Figure
    kl_ci95: float | None


class RuntimeFigures(_Open):
    """The distance through a runtime; `unmeasured` says why there is none."""

    name: str
    settings: dict[str, Any]
    kl_mean: Figure | None = None
    kl_ci95: float | None = None
    top1_agreement: float | None = None
    top1_ci95: float | None = None
    perplexity: Figure | None = None
    perplexity_original: Figure | None = None
    tokens: int | None = None
    windows: int | None = None
    unmeasured: str | None = None


class Figures(_Open):
    """The proof: distance from the original on held-out text. A task other than language modelling has figures of its own."""

    bits_per_weight: float
    bytes: int
    kl_mean: Figure | None = None
    kl_ci95: float | None = None
    top1_agreement: float | None = None
    top1_ci95: float | None = None
    perplexity: Figure | None = None
    perplexity_original: Figure | None = None
    tokens: int | None = None
    windows: int | None = None
    tokens_per_second: float | None = None
    text: str | None = None
    text_sha256: str | None = None
    length: int | None = None
    seed: int | None = None
    by_text: list[TextDistance] | None = None
    by_position: list[PositionDistance] | None = None
    runtime: RuntimeFigures | None = None


class Ending(_Closed):
    """The text of one model after the tokens that both share: the first token that differs, and what follows it."""

    token: str
    rest: str


class Continuation(_Closed):
    """Texts of both models after the same prompt, each time the most likely token.

    kind              the kind of text that the prompt is from
    shared            the text of the `shared_tokens` first tokens, the same in both
    original, compressed   what follows; None where nothing does
    """

    kind: str
    prompt: str
    shared: str
    shared_tokens: int
    original: Ending | None
    compressed: Ending | None


class Continuations(_Closed):
    """Generated texts, side by side; `omitted` says why there are none."""

    runtime: str
    tokens: int
    texts: list[Continuation]
    omitted: str | None = None


class SizeFigures(_Open):
    """Bytes of the original, of the published directory (without report.html) and of its parts."""

    bytes: int
    ratio: float
    bytes_original: int
    bytes_compressed_weights: int
    bytes_kept: int
    bytes_outer: int = 0
    bytes_converted: int | None = None


class OuterRow(_Open):
    """A matrix outside the blocks that is compressed; `key` is "embeddings" or "head"."""

    key: str
    name: str
    shape: list[int]
    format: str
    bytes: int
    bits_per_weight: float
    quantizer: str


class Budget(_Open):
    bits_asked: float
    bits_spent: float
    weights: dict[str, int]


class Remark(_Open):
    """A fallback or a note on a weight."""

    weight: str
    what: str


class LeftFile(_Open):
    file: str
    why: str


class Calibrated(_Open):
    weights: int
    of: int


class HeldOut(_Open):
    """Errors on tokens that calibration did not count.

    samples         windows of them
    massive_above   how many times the median a token's energy is that makes it massive
    far_above       how many times a weight's error over all a class's error is that is called far
    weights_far     weights with such a class, by class
    """

    samples: int
    massive_above: float
    far_above: float
    weights_far: dict[str, int]


class RunFacts(_Open):
    seconds: float
    seconds_pressing: float
    peak_memory_bytes: int
    threads: int
    native: list[str] | None
    machine: str
    device: str | None = None
    peak_device_memory_bytes: int | None = None


class JobIdentity(_Open):
    """What decides the bytes of the model: hashes of the source's files, of the calibration tokens, the recipe, versions."""

    source: dict[str, str]
    calibration: str | None
    recipe: dict[str, Any]
    versions: dict[str, str]
    directory: int | None = None


class Report(_Open):
    """The whole report. `model` names the original, `auto_class` the class of transformers that opens it."""

    figures: Figures
    size: SizeFigures
    calibrated: Calibrated
    calibration: dict[str, Any] | None
    fallbacks: list[Remark]
    layers: list[LayerRow]
    run: RunFacts
    job: JobIdentity
    model: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    held_out: HeldOut | None = None
    notes: list[Remark] = []
    outer: list[OuterRow] = []
    tuned: list[TunedSpan] = []
    kept: dict[str, str] = {}
    budget: Budget | None = None
    given: dict[str, Any] | None = None
    left_out: list[str] = []
    left_behind: list[LeftFile] = []
    continuations: Continuations | None = None


def check_report(value: Any, where: str) -> Report:
    """Return a report as records. Raises CheckpointError with the place of the first mistake."""
    try:
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: is no report of bitpress: {place}: {first['msg']}.") from error


def read_report(directory: Path) -> Report:
    """Read the report of a published directory. Raises CheckpointError."""
    if not (directory / REPORT_NAME).is_file():
        raise CheckpointError(f"{directory}: holds no {REPORT_NAME}; name a directory that `bitpress quantize` wrote.")
    return check_report(read_json(safe_file(directory, REPORT_NAME)), str(directory / REPORT_NAME))


def dump_report(report: Report) -> dict[str, Any]:
    """Return a report as it was read, without keys that it did not hold."""
    return report.model_dump(mode="json", exclude_unset=True)


class _Schema(GenerateJsonSchema):
    """Names the dialect of the schema."""

    def generate(self, schema: Any, mode: Any = "validation") -> dict[str, Any]:
        return {"$schema": self.schema_dialect, **super().generate(schema, mode=mode)}


def report_schema() -> dict[str, Any]:
    """Return the JSON schema of `report.json`."""
    return Report.model_json_schema(schema_generator=_Schema)
