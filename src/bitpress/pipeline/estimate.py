"""The estimate of a run's time: its parts are run on small samples of the model's shapes on this machine, and scaled up.

    reading       the text's passes through the blocks, by their products
    statistics    the sums that calibration takes over every input
    quantizing    the recipe's own parts on some rows of a made-up weight for every width of input, scale searches too
    a budget      a trial of each of its formats
    learning      steps of a batch's products forward and back, and of every weight's own part, measured on some rows

Wide inputs are sampled with fewer columns. Processor time is measured, so that the answer is that of an idle machine whatever else
runs here now. Reading and writing files, and the evaluation, are not included.
"""

import functools
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch

from bitpress.calibration import Stats, of_origin
from bitpress.calibration.stats import SAMPLE, STATISTICS, StatsCollector
from bitpress.corrections.softmax_bias import SoftmaxBias
from bitpress.errors import BitpressError, FormatError
from bitpress.formats import AnyFormat, Format
from bitpress.formats.block import Block
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.learning_sample import begin_sample, served_by
from bitpress.pipeline.offer import trial_parts
from bitpress.pipeline.outer_weights import PlannedOuter
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.weights import WeightCompressor
from bitpress.pipeline.windows import windows_of
from bitpress.quantizers.quantizer import Quantizer
from bitpress.recipes import Method, Named
from bitpress.transforms.transform import ScaleSearch
from bitpress.tuning.learned_maps import MapTuning
from bitpress.tuning.span import Window
from bitpress.tuning.tuner import Tuning

__all__ = ["estimate_seconds"]

TOKENS = 512
# Columns of a sample if the input is wider: the largest of these that the format's group divides.
COLUMNS = (2048, 1536, 1024)
# Rows of the smallest sample, and the least seconds of a sample, so that its time is more than the overhead around it.
ROWS, ENOUGH = 64, 0.1
# The time of a block's attention, norms and activations relative to its products, measured with SmolLM2 on texts of 512 tokens.
BESIDE_PRODUCTS = 1.25
# A block's passes up to each of its inputs in turn (attention's own input, its output, the MLP's input, its inside), together.
STAGES = 1.3
# Such inputs: of each, observers see a pass through the whole block.
INPUTS_OF_A_BLOCK = 4


def estimate_seconds(
    model: StreamedModel, method: Method, weights: Sequence[PlannedWeight], outer: Sequence[PlannedOuter] = ()
) -> float:
    """Return the seconds that calibrating and quantizing the planned weights would take on this machine if nothing else ran on it."""
    repeats = _repeats(windows_of(method, weights, len(model.blocks)), len(model.blocks))
    seconds = repeats * _pressing(model, method, weights) + sum(
        _pressing(model, found.method, [found.planned]) for found in outer
    )
    needs = method.needs
    if not method.reads_text:
        return seconds
    # Behind learned maps the quantizer chooses codes anew, at every look at held-out text and at the end.
    again = [named.part for named in method.tunings if isinstance(named.part, MapTuning) and named.part.codes == "quantizer"]
    seconds += sum(part.checks + 1 for part in again) * (_pressing(model, method, weights) if again else 0.0)
    if method.options:  # each takes about as long as the recipe's own format
        tried = [replace(w, method=trial_parts(w)) for w in weights]
        seconds += len(method.options) * _pressing(model, replace(method, parts=(), overrides=()), tried)
    calibration = method.recipe.calibration
    tokens = calibration.samples * model.task.positions(model.model.config, calibration.length)
    text = model.model.config.get_text_config()
    active = getattr(text, "num_experts_per_tok", None)
    heads = getattr(text, "num_key_value_heads", None) or 1
    reading = BESIDE_PRODUCTS * sum(_product_seconds(w, method.compute, active) for w in weights) / TOKENS
    inputs = {(w.block, w.parameter.stem.rpartition(".")[0], w.parameter.shape[1], w.parameter.experts) for w in weights}
    known: dict[int, float] = {}
    summing = 0.0
    for _, _, cols, experts in inputs if needs else ():
        if cols not in known:
            known[cols] = _summing_seconds(needs, cols, heads, method.compute) / TOKENS
        summing += known[cols] * (min(active or experts, experts) if experts else 1)
    learning = sum(_learning_seconds(model, method, named, weights) for named in method.tunings)
    return seconds + tokens * repeats * (reading * _passes(method) + summing) + learning


def _passes(method: Method) -> float:
    """Return how often the calibration text is run through the blocks."""
    needs, calibration = method.needs, method.recipe.calibration
    backward = 4.0 * (bool(of_origin(needs, "loss")) + bool(method.options))
    offset = method.only(SoftmaxBias)
    looks = method.observes + (offset is not None and offset.observes)  # offsets are seen once more, behind their format
    looking = float(looks) * (INPUTS_OF_A_BLOCK if calibration.sequential else 1)
    if not needs:
        return backward + 2 * looking
    if calibration.inputs == "original":
        return backward + 1 + 2 * looking
    beside = method.keeps_original
    measuring = STAGES if calibration.sequential else 1.0
    return backward + measuring * (2 if beside else 1) + 1 + looking


def _learning_seconds(model: StreamedModel, method: Method, named: Named[Tuning], weights: Sequence[PlannedWeight]) -> float:
    """Return the seconds of learning all blocks: products forward and back (twice the forward's work) and every weight's own step."""
    tuning, calibration = named.part, method.recipe.calibration
    positions = model.task.positions(model.model.config, calibration.length)
    own = served_by(named, weights)
    step = sum(w.weights * _step_seconds(tuning, fmt, min(w.parameter.shape[1], COLUMNS[0])) for w, fmt in own)
    if tuning.span == "layer":  # a product with the gram, forward and back
        products = sum(3 * _product_seconds(w, torch.float32, None) * w.parameter.shape[1] / TOKENS for w, _ in own)
        return tuning.steps * (products + step)
    text = model.model.config.get_text_config()
    active = getattr(text, "num_experts_per_tok", None)
    token = BESIDE_PRODUCTS * sum(_product_seconds(w, method.compute, active) for w in weights) / TOKENS
    batch = min(tuning.batch, calibration.samples)
    looks = (tuning.checks + 1) * calibration.held_out
    if tuning.span == "block":
        return positions * token * (3 * batch * tuning.steps + looks) + tuning.steps * step
    # Blocks of wider spans run forward once more, and decode their weights again, on the way back.
    windows, blocks = windows_of(method, weights, len(model.blocks)), len(model.blocks)
    whole = tuning.span == "network"
    ran = 1.0 if whole else sum(len(w.through) for w in windows) / blocks
    made = 1.0 if whole else _repeats(windows, blocks)
    wide = positions * token * ran * (4 * batch * tuning.steps + looks) + 2 * tuning.steps * step * made
    return wide + (positions * token * calibration.drawn if tuning.loss == "kl-top" else 0.0)


def _repeats(windows: Sequence[Window], blocks: int) -> float:
    """Return how often a block is compressed on average: those of overlaps are compressed again in the next window."""
    return sum(len(w.blocks) for w in windows) / blocks if windows else 1.0


@functools.cache
def _step_seconds(tuning: Tuning, fmt: Format, cols: int) -> float:
    """Return the seconds that a weight's own part of a step takes for each of its values: decoding it, its gradient, the optimiser."""
    rows = math.lcm(ROWS, fmt.block.rows) if isinstance(fmt.block.rows, int) else ROWS
    try:
        codes = begin_sample(tuning, fmt, rows, cols)
    except FormatError:  # some of its columns are no whole blocks
        return _step_seconds(tuning, replace(fmt, block=Block(1, "all"), scale="fp16"), cols)
    if codes is None:
        return 0.0
    leaves = [leaf.tensor for leaf in codes.leaves()]
    optimizer = torch.optim.Adam([{"params": leaves, "lr": 1e-6}])

    def work() -> None:
        gradients = torch.autograd.grad(codes.weight(0.5).square().mean(), leaves, allow_unused=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()

    return _timed(work) / (rows * cols)


def _product_seconds(planned: PlannedWeight, dtype: torch.dtype, active: int | None) -> float:
    """Return the seconds of one weight's product with TOKENS inputs."""
    rows, cols = planned.parameter.shape
    experts = planned.parameter.experts
    some = (min(rows, COLUMNS[0]), min(cols, COLUMNS[0]))
    times = min(active or experts, experts) if experts else 1
    return times * _time_product(*some, dtype) * (rows * cols) / (some[0] * some[1])


@functools.cache
def _time_product(rows: int, cols: int, dtype: torch.dtype) -> float:
    x, w = torch.ones(TOKENS, cols, dtype=dtype), torch.ones(rows, cols, dtype=dtype)
    return _timed(lambda: torch.nn.functional.linear(x, w))


def _summing_seconds(needs: Collection[str], cols: int, heads: int, dtype: torch.dtype) -> float:
    """Return the seconds of summing up the needed statistics over TOKENS inputs of one layer."""
    some = min(cols, COLUMNS[0])
    x = torch.ones(TOKENS, some, dtype=dtype)
    collector = StatsCollector(needs, some)
    squares = sum(
        heads if STATISTICS[n].shape[0] == "heads" else 1 for n in needs if n in ("attention_gram", "head_gram", "loss_gram")
    )

    def work() -> None:
        collector.add(x, "")
        if "cross" in needs:
            collector.add_original(x, x)
        for _ in range(squares):
            collector.add_weighted("attention_gram", x, torch.ones(TOKENS))

    return _timed(work) * (cols / some) ** 2


def _pressing(model: StreamedModel, method: Method, weights: Sequence[PlannedWeight]) -> float:
    compressor = WeightCompressor(method)
    kinds: dict[tuple[int, AnyFormat, Named[Quantizer], int | None], list[PlannedWeight]] = {}
    for w in weights:
        kinds.setdefault((w.parameter.shape[1], w.format, w.method.quantizer, _of_heads(model, w)), []).append(w)
    total = 0.0
    for (*_, head), alike in kinds.items():
        cols, rows = alike[0].parameter.shape[1], max(w.parameter.shape[0] for w in alike)
        seconds_of = functools.partial(_sample_seconds, compressor, method.searches, alike[0], method.needs, head)
        some = _columns(alike[0], min(rows, ROWS))
        try:
            once, row = _of_rows(lambda n: seconds_of(n, some), rows)  # noqa: B023 (called at once)
        except BitpressError:  # a setting that fits the weight (a rank, a block of rows) may not fit a part of it
            some, once, row = cols, 0.0, seconds_of(alike[0].parameter.shape[0], cols) / alike[0].parameter.shape[0]
        # With a gram, its solve is cubic in the columns and its use per row quadratic; without a gram everything is linear.
        wider = cols / some
        once, row = (once * wider**3, row * wider**2) if method.needs else (once * wider, row * wider)
        total += sum((once + row * w.parameter.shape[0]) * max(w.parameter.experts, 1) for w in alike)
    return total


def _of_rows(seconds_of: Callable[[int], float], rows: int) -> tuple[float, float]:
    """Return the fixed cost of a weight and the cost of each row, from samples of two numbers of rows."""
    most = min(rows, 2 * ROWS)
    many = seconds_of(most)
    while many < ENOUGH and most < rows:
        most = min(rows, 4 * most)
        many = seconds_of(most)
    least = max(most // 2, 1)
    row = max(many - seconds_of(least), 0.0) / max(most - least, 1)
    return max(many - row * most, 0.0), row


def _of_heads(model: StreamedModel, planned: PlannedWeight) -> int | None:
    """Return the rows of a head if a weight has the shape of one that makes queries, keys or values."""
    text = model.model.config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if not heads or planned.parameter.experts or planned.parameter.shape[1] != hidden:
        return None
    row = getattr(text, "head_dim", None) or hidden // heads
    others = getattr(text, "num_key_value_heads", None) or heads
    return row if planned.parameter.shape[0] in (row * heads, row * others) else None


def _columns(planned: PlannedWeight, rows: int) -> int:
    cols = planned.parameter.shape[1]
    for some in COLUMNS:
        if some < cols and isinstance(planned.format, Format):
            try:
                planned.format.block_grid((rows, some))
            except FormatError:
                continue
            return some
    return cols


def _sample_seconds(
    compressor: WeightCompressor,
    searches: Sequence[ScaleSearch],
    planned: PlannedWeight,
    needs: Collection[str],
    head: int | None,
    rows: int,
    cols: int,
) -> float:
    """Return the seconds of quantizing a made-up weight by the recipe; every `head` rows of it are one head."""
    parameter = replace(planned.parameter, shape=(rows, cols), transposed=False, experts=0, flat=False)
    w = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().float()
    stats = {parameter.stem: _made_up(rows, cols, needs, head)} if needs else {}

    def work() -> None:
        if isinstance(planned.format, Format) and stats:
            for search in searches:
                inputs = planned.method.inputs
                search.plan([w], stats[parameter.stem], planned.format, None, None if inputs is None else inputs.format)
        compressor.compress(replace(planned, parameter=parameter), w, stats, None)

    return _timed(work)


def _made_up(rows: int, cols: int, needs: Collection[str], head: int | None) -> Stats:
    x = torch.randn(TOKENS, cols, generator=torch.Generator().manual_seed(1))
    gram = (x.T @ x) / TOKENS + 0.1 * torch.eye(cols)
    made = {
        "gram": gram,
        "mean_abs": x.abs().mean(0),
        "max_abs": x.abs().amax(0),
        "sample": x[:SAMPLE],
        "cross": 0.01 * gram,
        "attention_gram": gram,
        "loss_gram": gram,
        "output_gram": torch.eye(rows),
        "sensitivity": torch.rand(rows, cols, generator=torch.Generator().manual_seed(2)),
    }
    if head is not None and rows % head == 0:
        made["row_gram"] = torch.eye(head).repeat(rows // head, 1, 1)
    return Stats.named(TOKENS, {name: value for name, value in made.items() if name in needs})


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of the second of two runs, since the first includes one-time work; of the first if it is long."""
    for _ in range(2):
        own, all_threads = time.thread_time(), time.process_time()
        work()
        # This thread does its share of every product; where it waits for the others, their work divided by their number counts.
        seconds = max(time.thread_time() - own, (time.process_time() - all_threads) / torch.get_num_threads())
        if seconds > 10 * ENOUGH:
            break
    return seconds
