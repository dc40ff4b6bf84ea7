"""A recipe: everything that decides the bytes of a run, the same in Python, in YAML, on the command line and in the manifest.

weights: int4-g64-zero
transforms: [{name: awq-scale}]         what runs before; left out: what the quantizer's paper puts there
quantizer: {name: gptq, damp: 0.01}     without a name: channel scales and gptq, see `Recipe`
corrections: [{name: lqer, rank: 32}]   terms beside the codes: what is split off before the quantizer, what repairs its error after
tuning: [{name: signround, steps: 200}] what is learned by gradients, block by block, from what the parts above chose
calibration: {text: builtin, samples: 128, length: 512, seed: 0, chat: false,
              inputs: pressed,          or original: what the uncompressed blocks before give a block, instead of the compressed ones
              gram: input,              or loss: tokens count with the loss's squared gradient by the output of the layer
              sequential: false}        true: inside a block too, weights see what the compressed ones before them give; a pass for each
skip: ["*.down_proj"]                   weights that stay as they are; "!*.experts.*" takes back what a pattern before it leaves out
inputs: int8-row                        how inputs of products are rounded, or {format: int8-tensor-zero, parameters: static, observer: minmax}:
                                        static parameters are chosen on the calibration text, and so is the stored part of local ones
                                        ({format: nvfp4, parameters: local}); left out: inputs stay as they are.
                                        {format: int4-row, first: {share: 0.125, format: int8-row}} rounds the first channels otherwise
keys: int8-row                          likewise `queries`, `keys`, `values` and `probabilities` of attention, a scale for every token and head
overrides: [{match: "*.v_proj", weights: int8-row, quantizer: rtn, inputs: keep}]     other formats or methods for some weights,
                                        transforms: [hadamard] other changes of basis
embeddings: int8-row                    the embedding table, or {weights: int8-row, quantizer: rtn}; left out: as stored; auto: int8-row
                                        where there is a table that can take it
head: {weights: int6-g64, quantizer: gptq}      the output head, likewise; tied ones are one matrix, which either key names; `inputs: int8-row`
                                        in a head that is not tied rounds its input, as `inputs` above
budget: 3.3                             bits a weight on average, or {bits: 3.3, among: [int2-g64-zero, int4-g64-zero]}: what each format costs the
                                        loss is measured, and every weight has the format that spends the bits best; left out: no choice
choose: {by: output-error,              what every layer takes one of, by what calibration measures there: formats of one size for its weight, how its
         among: [{weights: e2m1-row, inputs: e2m1-row}, {weights: e1m2-row, inputs: keep}]}     input is rounded, and with `scales: false` no
                                        channel scales; left out: no choice
min_expert_tokens: 32                   experts that see fewer are rounded plainly and named
batch: 8                                windows that go through a block together
compute: auto                           bf16 where that is the faster one (AMX tiles), else fp32
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitpress.formats.activation import ParameterSource

__all__ = [
    "AUTO_OUTER",
    "DEFAULT_OBSERVER",
    "DEFAULT_QUANTIZER",
    "DEFAULT_TRANSFORMS",
    "OUTER",
    "Budget",
    "Calibration",
    "Choose",
    "InputRounding",
    "LayerSetting",
    "OuterWeights",
    "Override",
    "Recipe",
]

# Keys of a recipe for the matrices outside the blocks.
OUTER = ("embeddings", "head")
# What "auto" stands for there. `benchmarks/outer.py`: int8-row by gptq adds less than 2 % to the KL of a model in 4 bits, int6-g64 more.
AUTO_OUTER = "int8-row"


DEFAULT_QUANTIZER = "gptq"
DEFAULT_OBSERVER = "minmax"
DEFAULT_TRANSFORMS: tuple[Mapping[str, Any], ...] = ({"name": "awq-scale", "run_time": False},)


# Calibration samples for each that is held out, and the most that are: errors are measured on those, and nothing else is.
SAMPLES_A_HELD_OUT = 32
MOST_HELD_OUT = 4


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Closed):
    text: str = "builtin"
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)
    chat: bool = False
    inputs: Literal["pressed", "original"] = "pressed"
    gram: Literal["input", "loss"] = "input"
    sequential: bool = False

    @property
    def held_out(self) -> int:
        """The samples that are drawn beside those of calibration, to measure errors on."""
        return min(-(-self.samples // SAMPLES_A_HELD_OUT), MOST_HELD_OUT)

    @property
    def drawn(self) -> int:
        """All samples that are drawn."""
        return self.samples + self.held_out


class FirstChannels(_Closed):
    """The leading channels of an input that are rounded in a format of their own: a share of all."""

    share: float = Field(gt=0, lt=1)
    format: str


class InputRounding(_Closed):
    """How the input of a product, or an operand of attention, is rounded: see `formats.activation`. `observer` chooses static parameters, and has a table.

    `first` are channels of an input that a transform has put in front.
    """

    format: str
    parameters: ParameterSource = "dynamic"
    observer: dict[str, Any] | None = None
    first: FirstChannels | None = None


class Override(_Closed):
    """What weights have whose name matches; a part that is left out is the recipe's. `inputs` of "keep" are not rounded, and `transforms` are
    changes of basis in the place of the recipe's."""

    match: str
    transforms: tuple[dict[str, Any], ...] | None = None
    weights: str | None = None
    quantizer: dict[str, Any] | None = None
    inputs: InputRounding | Literal["keep"] | None = None


class OuterWeights(_Closed):
    """What the embedding table or the output head is stored in. Without a quantizer, `method.outer_quantizer` chooses one; the input of a head
    may be rounded."""

    weights: str
    quantizer: dict[str, Any] | None = None
    inputs: InputRounding | None = None


class Budget(_Closed):
    """Bits a weight on average, parameters counted, and the formats to choose among; left out, the other widths of the recipe's format."""

    bits: float = Field(gt=0, allow_inf_nan=False, strict=True)
    among: tuple[str, ...] | None = None


class LayerSetting(_Closed):
    """What a layer may choose: a format of its weight and how its input is rounded, the recipe's where they are left out; without `scales` the
    recipe's channel scales pass its input by. `inputs` of "keep" are not rounded."""

    weights: str | None = None
    inputs: InputRounding | Literal["keep"] | None = None
    scales: bool = True


class Choose(_Closed):
    """The settings of which every layer takes one, by a rule of the table `allocation.choices`."""

    by: dict[str, Any]
    among: tuple[LayerSetting, ...] = Field(min_length=2)


class Recipe(_Closed):
    """See the head of this file.

    transforms   None stands for those of the quantizer's paper. Where the quantizer has no name either, it stands for channel scales before
                 error feedback where the network takes them, except where a weight is to stay bit for bit and with `calibration.sequential`
    quantizer    its name and settings; without a name `DEFAULT_QUANTIZER`
    """

    weights: str = "int4-g64-zero"
    transforms: tuple[dict[str, Any], ...] | None = None
    quantizer: dict[str, Any] = {}
    corrections: tuple[dict[str, Any], ...] = ()
    tuning: tuple[dict[str, Any], ...] = ()
    inputs: InputRounding | None = None
    queries: InputRounding | None = None
    keys: InputRounding | None = None
    values: InputRounding | None = None
    probabilities: InputRounding | None = None
    calibration: Calibration = Calibration()
    skip: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    embeddings: OuterWeights | Literal["auto", "keep"] | None = None
    head: OuterWeights | Literal["auto", "keep"] | None = None
    budget: Budget | None = None
    choose: Choose | None = None
    min_expert_tokens: int = Field(default=32, ge=0)
    batch: int = Field(default=8, ge=1)
    compute: Literal["auto", "bf16", "fp32"] = "auto"

    @property
    def operands(self) -> dict[str, InputRounding]:
        """What is said of the operands of attention, by their names."""
        said = {"queries": self.queries, "keys": self.keys, "values": self.values, "probabilities": self.probabilities}
        return {name: own for name, own in said.items() if own is not None}

    @property
    def quantizer_name(self) -> str:
        return str(self.quantizer.get("name", DEFAULT_QUANTIZER))
