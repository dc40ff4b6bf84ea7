"""Products of whole numbers on both sides: the law of layers whose input is rounded to integers and whose weights are integers.

    y = T_out (bias + sum over runs of  S_run * (s_w * s_x)),    S_run = sum over the columns of the run of (c_w - z_w) (c_x - z_x)

`c` are codes, `z` zero points and `s` scales, of the weights and of the input behind its map. A run is the columns that share a scale of the
weights and one of the input; leading channels in a format of their own are runs of their own. Its sum is a whole number, the same on every processor, and becomes a float once: dequantization behind the
sums of a group, as MixPE proposes (arXiv 2411.16158). Everything behind the sum is float32: the sum rounded to a float, the product of both
scales, their product, added to the runs before.

`multiply_integers` is slow and plainly right; the native engine is tested against it: equal codes, equal sums, and results within `bound` of
the same product in real numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64

from bitpress.errors import FormatError
from bitpress.formats import ActivationFormat, ChannelFormat, CompressedLayer, InputFormat
from bitpress.formats.channels import build_input
from bitpress.formats.format import Format
from bitpress.formats.grids.integer import Integer
from bitpress.formats.scale_runs import RunCodes
from bitpress.formats.scales import Plain
from bitpress.formats.table import stored_format
from bitpress.formats.terms.packed import Packed

__all__ = [
    "IntegerInput",
    "IntegerProduct",
    "is_integer_product",
    "kinds_of",
    "multiply_integers",
    "refuses_input",
    "repeats_scales",
    "round_input",
    "run_columns",
    "told_input",
    "told_product",
]

# Columns whose products of two bytes add up within 32 bits: 255 * 255 * 2^15 < 2^31.
MOST_SUMMED = 1 << 15
# Terms whose codes stand alone, and those that read the values of rounded inputs beside them.
BESIDE = ("low_rank", "sparse")
# The fewest columns of a run, where leading channels or blocks of two sizes cut rows: below, scales outweigh the codes.
LEAST_RUN = 16
# What is said of inputs that the engine rounds; `observer`, in recipes alone, chooses what is stored.
_SAID = {"format", "parameters", "observer", "first"}


def refuses_input(input_spec: Mapping[str, Any], spec: Mapping[str, Any] | None = None) -> str | None:
    """Say why the native engine cannot round such an input, that of a weight with a specification, or None."""
    if spec is not None and "reassembly" in kinds_of(spec["input_map"]):
        return "channels of inputs are averaged (reassembly) before they are rounded"
    if apart := sorted(set(input_spec) - _SAID):
        return f"channels of inputs are not rounded alike ({', '.join(apart)})"
    for fmt in _formats(input_spec):
        if input_spec["parameters"] == "local":
            return f"inputs in {fmt.name} have local parameters"
        if not isinstance(fmt.grid, Integer):
            return f"inputs in {fmt.name} are no integers"
        if input_spec["parameters"] == "dynamic" and not isinstance(fmt.store, Plain):
            return f"inputs in {fmt.name} have scales in {fmt.scale}, and the engine finds those in fp32, fp16 and bf16"
    return None


def kinds_of(map_spec: Mapping[str, Any] | None) -> set[str]:
    """Return the kinds of the maps in the specification of one."""
    if map_spec is None:
        return set()
    return {map_spec["kind"]} | {part["kind"] for part in map_spec.get("maps", ())}


def _formats(input_spec: Mapping[str, Any]) -> list[Format]:
    """Return the format of an input, and that of its first channels, as a layer or a recipe says it."""
    first = input_spec.get("first")
    names = [first["format"] if isinstance(first, Mapping) else first.split(" ")[-1]] if first else []
    return [stored_format(name) for name in (input_spec["format"], *names)]


def is_integer_product(spec: Mapping[str, Any], input_spec: Mapping[str, Any] | None) -> bool:
    """Return whether the native engine multiplies a layer of these specifications on whole numbers.

    What stands beside integers of weights, low-rank factors and sparse outliers, reads the values of the input's codes.
    """
    if input_spec is None or refuses_input(input_spec, spec) is not None:
        return False
    columns = spec["shape"][1]
    codes = [term for term in spec["terms"] if term["kind"] not in BESIDE]
    return bool(codes) and all(_sums_codes(term, build_input(input_spec, {}), spec["shape"][0], columns) for term in codes)


def told_input(spec: Mapping[str, Any], input_spec: Mapping[str, Any], *, native: bool = True) -> str:
    """Say how the input of a layer is rounded, and whether its product is one of whole numbers (in the native engine) or computed from values."""
    first = f", first {input_spec['first']}" if "first" in input_spec else ""
    how = _how(native and is_integer_product(spec, input_spec))
    return f"inputs {input_spec['format']} {input_spec['parameters']}{first} ({how})"


def told_product(weights: str, input_spec: Mapping[str, Any], *, native: bool = True) -> str:
    """Say how weights in a format are multiplied with such inputs: `integer products` (in the native engine), or `simulated`."""
    return _how(native and refuses_input(input_spec) is None and isinstance(stored_format(weights).grid, Integer))


def _how(is_integer: bool) -> str:
    return "integer products" if is_integer else "simulated"


def _sums_codes(term: Mapping[str, Any], inputs: InputFormat, rows: int, columns: int) -> bool:
    if term["kind"] != "packed" or term.get("parts", 1) != 1:
        return False
    fmt = stored_format(term["format"])
    if not isinstance(fmt.grid, Integer) or fmt.nbytes((rows, columns)) >= 2 * rows * columns:
        return False  # scales of very small blocks: 16 bits a weight take less memory
    run = run_columns(fmt, inputs, (rows, columns))
    return run <= MOST_SUMMED and input_run(inputs, columns) % run == 0


def repeats_scales(fmt: Format) -> bool:
    """Return whether scales of a block can be repeated for parts of it: those that count on their neighbors cannot."""
    return fmt.scale != "dq" and not isinstance(fmt.store, RunCodes)


def run_columns(weights: Format, inputs: InputFormat, shape: tuple[int, int]) -> int:
    """Return the columns of a run: blocks of both sides consist of whole runs. Scales that cannot be repeated keep their blocks, and so
    do those that would be repeated for fewer than LEAST_RUN columns of leading channels: such layers sum no codes.
    """
    block = weights.block.resolve(shape)[1]
    run = math.gcd(block, input_run(inputs, shape[1]))
    is_short = isinstance(inputs, ChannelFormat) and run < min(LEAST_RUN, block)
    return block if is_short or not repeats_scales(weights) else run


def input_run(inputs: InputFormat, columns: int) -> int:
    """Return the columns of which all blocks of an input of so many consist."""
    if isinstance(inputs, ActivationFormat):
        return inputs.format.block.resolve((1, columns))[1]
    blocks = [inputs.rest.format.block.resolve((1, columns - inputs.count))[1]]
    blocks += [] if inputs.first is None else [inputs.count, inputs.first.format.block.resolve((1, inputs.count))[1]]
    return math.gcd(*blocks)


@dataclass(frozen=True)
class IntegerInput:
    """Rows of inputs as codes, and for every block of columns the zero point and the scale."""

    codes: Int64[torch.Tensor, "tokens in"]
    zeros: Int64[torch.Tensor, "tokens blocks"]
    scales: Float[torch.Tensor, "tokens blocks"]


@dataclass(frozen=True)
class IntegerProduct:
    """y      the product in float32
    sums   of every term: whole numbers for each token, output and run
    exact  the product in float64: the codes' values are real numbers, nothing is rounded
    bound  what y may differ from that
    """

    y: Float[torch.Tensor, "tokens out"]
    sums: list[Int64[torch.Tensor, "tokens out runs"]]
    exact: Float[torch.Tensor, "tokens out"]
    bound: Float[torch.Tensor, "tokens out"]


def round_input(x: Float[torch.Tensor, "tokens in"], inputs: InputFormat) -> IntegerInput:
    """Round rows as `InputFormat.round` does, and return the codes. Raises NumericsError where x is not finite."""
    if isinstance(inputs, ChannelFormat):
        return _round_apart(x, inputs)
    fmt, grid = inputs.format, inputs.format.grid
    assert isinstance(grid, Integer)
    params = fmt.fit(x) if inputs.parameters == "dynamic" else inputs.stored()
    codes = fmt.encode(x, params).long()
    across = 1 if inputs.parameters == "static" else fmt.block_grid((x.shape[0], x.shape[1]))[1]
    scales = params["scale"].reshape(-1, across).expand(x.shape[0], across)
    zeros = params["zero"].reshape(-1, across) if grid.zero else torch.full((1, 1), float(1 << (grid.bits - 1)))
    return IntegerInput(codes, zeros.long().expand(x.shape[0], across), scales)


def _round_apart(x: Float[torch.Tensor, "tokens in"], inputs: ChannelFormat) -> IntegerInput:
    """Round leading channels and the others, each by their format; blocks are the runs of both."""
    assert inputs.first is not None
    parts = [round_input(x[:, : inputs.count], inputs.first), round_input(x[:, inputs.count :], inputs.rest)]
    run = input_run(inputs, x.shape[1])

    def by_run(part: IntegerInput, values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(part.codes.shape[1] // values.shape[1] // run, 1)

    return IntegerInput(
        torch.cat([part.codes for part in parts], 1),
        torch.cat([by_run(part, part.zeros) for part in parts], 1),
        torch.cat([by_run(part, part.scales) for part in parts], 1),
    )


def multiply_integers(
    x: Float[torch.Tensor, "tokens in"], layer: CompressedLayer, bias: Float[torch.Tensor, " out"] | None = None
) -> IntegerProduct:
    """Multiply rows with a layer that has no map of its outputs and nothing beside codes. Raises FormatError for another layer."""
    weight, inputs = layer.weight, layer.input
    spec, input_spec = weight.spec(), layer.input_spec()
    packed = [term for term in weight.terms if isinstance(term, Packed)]
    if (
        inputs is None
        or not is_integer_product(spec, input_spec)
        or len(packed) < len(weight.terms)
        or weight.output_map is not None
    ):
        raise FormatError("the layer is no product of whole numbers alone.")
    rows = x.float() if weight.input_map is None else weight.input_map.apply(x.float())
    given = round_input(rows, inputs)
    first = torch.zeros(weight.shape[0]) if bias is None else bias.float()
    y, exact = first.expand(len(x), -1), first.double().expand(len(x), -1)
    size, count, sums = exact.abs(), 0, []
    for term in packed:
        run = run_columns(term.format, inputs, weight.shape)
        s, steps = _sum_runs(given, term, run)
        sums.append(s)
        for r in range(s.shape[2]):
            s_w, s_x = steps[0][:, r], steps[1][:, r]
            y = y + s[:, :, r].float() * (s_x[:, None] * s_w)
            part = s[:, :, r].double() * s_x[:, None].double() * s_w.double()
            exact, size, count = exact + part, size + part.abs(), count + 1
    # Each part is rounded as a sum, as a scale of stores that divide, as a product of scales and as their product, and at every addition
    # from its own on.
    roundings = (count + 4) * 2.0**-24
    return IntegerProduct(y, sums, exact, size * roundings / (1 - roundings))


def _sum_runs(
    given: IntegerInput, term: Packed, run: int
) -> tuple[Int64[torch.Tensor, "tokens out runs"], tuple[torch.Tensor, torch.Tensor]]:
    """Return the sums of every run, and the scales of weights and inputs for every run."""
    grid, (rows, cols) = term.format.grid, term.format.block.resolve(term.shape)
    assert isinstance(grid, Integer)
    codes, params = term.unpack()
    runs = term.shape[1] // run

    def by_run(values: torch.Tensor, columns: int) -> torch.Tensor:
        return values.repeat_interleave(columns // run, 1)

    s_w = by_run(params["scale"].repeat_interleave(rows, 0), cols)
    z_w = by_run(params["zero"].repeat_interleave(rows, 0), cols).long() if grid.zero else torch.tensor(1 << (grid.bits - 1))
    s_x, z_x = (by_run(v, term.shape[1] // v.shape[1]) for v in (given.scales, given.zeros))
    w = codes.long().reshape(term.shape[0], runs, run) - (z_w[..., None] if grid.zero else z_w)
    a = given.codes.reshape(-1, runs, run) - z_x[..., None]
    return torch.einsum("trc,orc->tor", a, w), (s_w, s_x)
