"""Learn the rotation of a whole network, and write it to a file that the transform `rotate` reads.

    start      the original in the basis that the recipe's `rotate` gives it, a random Hadamard one where it has none
    teacher    what that model says of the calibration text, nothing rounded
    student    the same model with weights and inputs rounded as the recipe says, in the basis that is learned
    result     the product of both rotations: `residual`, and `values.N` for every block (`transforms.given`)

The whole model is held in float32; a block's weights are turned and rounded where it runs, and again on the way back.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bitpress.checkpoints.durable import write_durably
from bitpress.checkpoints.safetensors_file import serialize
from bitpress.devices import CPU, usable_bytes
from bitpress.errors import CheckpointError, MemoryLimitError, NumericsError, UsageError
from bitpress.formats import ActivationFormat, CompressedLayer, CompressedWeight, Format
from bitpress.formats.fake_quantize import fake_quantize
from bitpress.formats.maps.map import Map, chain, moved
from bitpress.measure.samples import draw_calibration
from bitpress.models.opening import open_original
from bitpress.models.rotated import RotatedNetwork
from bitpress.pipeline.learning_plan import LOGITS
from bitpress.pipeline.network import teach
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.quantize import plan_opened
from bitpress.pipeline.tuning import block_runs, windows_counted
from bitpress.progress import Progress, Silent, Stepwise
from bitpress.recipes import Method
from bitpress.stopping import stoppable
from bitpress.transforms.basis import into_basis
from bitpress.transforms.rotate import Rotate
from bitpress.tuning.learned import Learned, Soft, Value
from bitpress.tuning.network_rotations import Axis, NetworkRotations, RotatedParameter, RotationTuning, Rounds
from bitpress.tuning.tuner import Curve, tune_
from bitpress.tuning.wide_objectives import TOP, NetworkObjective

__all__ = ["LearnedRotations", "learn_rotations"]


@dataclass(frozen=True)
class LearnedRotations:
    """A file of rotations that was written.

    Losses are in nats a token: of the first and the last steps on calibration text, of the start and of what is in the file on held-out text.
    rotate   what a recipe says to take the file
    kept     whether a state was better than the start; else the file holds the start
    failed   why learning ended early, None if it did not
    """

    file: str
    sha256: str
    rotate: Mapping[str, object]
    loss: str
    steps: int
    calibration_first: float | None
    calibration_last: float | None
    held_out_before: float
    held_out_after: float
    kept: bool
    failed: str | None
    seconds: float


def learn_rotations(
    model: Path,
    out: Path,
    method: Method,
    tuning: RotationTuning,
    *,
    force: bool = False,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> LearnedRotations:
    """Learn a rotation of a model by a recipe's formats and calibration text, and write it to the safetensors file `out`.

    Raises UsageError, FormatError (2), CheckpointError (3), DiskError (4), MemoryLimitError (5), NumericsError (6), JobStopped (75).
    """
    progress, started = progress or Silent(), time.perf_counter()
    _check_free(model, out, force)
    learner = _Learner(model, method, tuning, device, progress)
    for text in learner.notes:
        progress.note(text)
    with stoppable() as check_stop:
        curve = learner.learn(check_stop)
    steps: Sequence[float | None] = curve.calibration or (None,)
    settings = {"model": model.name, "start": learner.rotate.kind, "rounds": tuning.rounds, "rate": tuning.learning_rate}
    losses = {"loss": tuning.loss, "held_out_before": curve.before, "held_out_after": curve.after, "steps": curve.steps}
    told = json.dumps({**settings, **losses})
    _, sha256 = write_durably(out, serialize(learner.result(), {"format": "pt", "bitpress": told}))
    return LearnedRotations(
        file=str(out),
        sha256=sha256,
        rotate={"name": "rotate", "kind": "given", "tensors": str(out), **learner.sides()},
        loss=tuning.loss,
        steps=curve.steps,
        calibration_first=steps[0],
        calibration_last=steps[-1],
        held_out_before=curve.before,
        held_out_after=curve.after,
        kept=curve.better,
        failed=curve.failed,
        seconds=round(time.perf_counter() - started, 1),
    )


def _check_free(model: Path, out: Path, force: bool) -> None:
    """Raise UsageError for a place where no file can be written, or where it would replace one of the model."""
    if out.is_dir():
        raise UsageError(f"{out}: is a directory; name a file, such as {out / 'rotation.safetensors'}.")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: the folder {out.parent} does not exist.")
    if out.resolve().parent == model.resolve():
        raise UsageError(f"{out}: is in the model's own directory; name a file elsewhere.")
    if out.exists() and not force:
        raise UsageError(f"{out}: exists already; name another file, or replace it with --force.")
    if not os.access(out.parent, os.W_OK):  # better known now than when all is learned
        raise UsageError(f"{out}: the folder {out.parent} cannot be written to.")


class _Learner:
    """A model, all of it held, and the rotations that are learned of it."""

    def __init__(self, path: Path, method: Method, tuning: RotationTuning, device: torch.device, progress: Progress) -> None:
        self.method, self.tuning, self.progress, self.notes = method, tuning, progress, list[str]()
        self.rotate = method.rotate or Rotate()
        self.model, loader = open_original(path, torch.float32, self.rotate, device=device)
        assert loader.rotated is not None
        self.network: RotatedNetwork = loader.rotated
        if self.network.residual is not None and self.network.residual.centred:
            raise CheckpointError(
                f"{path}: its norms subtract the mean, so its rotation must leave the vector of ones where it is, and is not learned; give "
                "rotate residual: false to learn value heads alone."
            )
        self.planned = {p.parameter.name: p for p in plan_opened(self.model, loader, method).weights}
        self._check_rounding()
        calibration = method.recipe.calibration
        samples = draw_calibration(calibration, self.model.task, path, self.model.model.config)
        self.texts = samples.inputs if samples.held_out is None else torch.cat([samples.inputs, samples.held_out])
        self.counted = windows_counted(len(samples.inputs), len(self.texts))
        if self.counted == len(self.texts):
            raise UsageError(
                f"{calibration.text}: gives one window, and none is left to judge by; give --samples 2 or more, or shorter ones."
            )
        self._check_memory()
        found = self.network.residual
        heads = {self._block_of(t.parameter): t.heads.shape[1] for t in self.network.heads if t.heads is not None}
        self.rotations = NetworkRotations(None if found is None else found.width, heads, device)

    def _block_of(self, name: str) -> int:
        return next(i for i in range(len(self.model.blocks)) if name.startswith(f"{self.model.block_name(i)}."))

    def _check_rounding(self) -> None:
        """Raise UsageError for a recipe by which no rotation can be learned, and note the parts of it that are left out meanwhile."""
        method, rounds, weights = self.method, self.tuning.rounds, self.planned.values()
        if method.options or any(p.method.settings for p in weights):
            key = "budget" if method.options else "choose"
            raise UsageError(
                f"{key}: formats are chosen while a model is quantized, and a rotation is learned before; leave it out here."
            )
        inputs = [p.method.inputs for p in weights if p.method.inputs is not None and rounds != "weights"]
        if rounds == "inputs" and not inputs:
            raise UsageError(
                "--rounds inputs: nothing is rounded, as the recipe rounds no inputs; give --inputs or a --scheme, or leave --rounds out."
            )
        if not inputs and not any(isinstance(p.format, Format) for p in weights):
            raise UsageError("nothing is rounded: the recipe's formats keep every bit, so no rotation is better than another.")
        if (stored := next((one for one in inputs if one.parameters != "dynamic"), None)) is not None:
            raise UsageError(
                f"inputs: {stored.name}: its parameters are chosen while a model is quantized, and a rotation is learned before; learn it with dynamic "
                "ones, such as --inputs int8-row-fp32, and quantize with the inputs that you want."
            )
        left = [
            named.name
            for named in method.every_part
            if named.kind not in ("quantizer", "network") and not (named.kind == "basis" and not named.part.needs)
        ]
        left += [*method.attention, *(f"the format of {key}" for key in method.outer)]
        if any(p.parameter.experts for p in weights) and (inputs or any(p.method.changes for p in weights)):
            left.append("inputs and online maps of stacked experts")
        if left:
            self.notes.append(f"left out while rotations are learned: {', '.join(dict.fromkeys(left))}")

    def _check_memory(self) -> None:
        """Raise MemoryLimitError where the model in float32, a block's gradients and what is kept of the texts do not fit."""
        model, texts = self.model, self.texts
        sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        whole = sum(p.numel() for p in model.model.parameters()) + 8 * max(sizes)
        logits = LOGITS * 4 * model.task.output_values(model.model.config, texts.shape[1])
        inside = 4 * texts.shape[1] * model.width * 2 * len(sizes) * self.tuning.batch
        kept = 4 * texts.numel() * model.width + texts.numel() * TOP * 8
        on_device = 4 * whole + logits + inside
        places = {"memory": (on_device + kept, psutil.virtual_memory().available)}
        if model.device.type == "cuda":
            places = {"memory": (4 * max(sizes) + kept, psutil.virtual_memory().available)}
            places[f"memory of {model.device}"] = (on_device, usable_bytes(model.device))
        for place, (need, free) in places.items():
            if need > free:
                raise MemoryLimitError(
                    f"about {need:,} bytes of {place} are needed to hold the whole model while its rotation is learned, and {free:,} are free; use "
                    "fewer or shorter samples, or the random rotation (rotate without a file)."
                )

    def learn(self, check_stop: Callable[[], None]) -> Curve:
        """Learn. Raises NumericsError where the start has no finite loss."""
        model, tuning, texts, counted = self.model, self.tuning, self.texts, self.counted
        self.progress.begin("learning rotations", 2)
        model.load_outer_()
        try:
            teacher = teach(model, texts, self.method.recipe.batch, check_stop) if tuning.loss == "kl-top" else None
            self.progress.advance("the original")
            learned: dict[str, Learned] = {"rotations": self.rotations, **self._parameters(check_stop)}
            hidden = torch.cat([model.embed(batch) for batch in texts.split(tuning.batch)])
            held_out, batch = len(texts) - counted, tuning.batch
            for size in {min(batch, counted), min(batch, held_out), held_out % batch} - {0}:  # steps and looks have these
                model.embed(texts[:size])
            if self.rotations.residual is not None and model.value_columns is not None:
                raise CheckpointError(
                    f"{model.stack}: its blocks are given more than the residual stream, so no rotation of that is learned; give rotate residual: false."
                )
            first, *others = block_runs(model, range(len(model.blocks)), learned)
            objective = NetworkObjective(
                [lambda h, values: first(self.rotations.into(h), values), *others],
                lambda inputs, h: model.says(inputs, self.rotations.back(h)),
                texts,
                hidden,
                counted,
                model.task.loss,
                teacher,
                batch=batch,
                device=model.device,
            )
            curve = tune_(objective, learned, tuning, 0, check_stop, self._note, lazily=True)
        finally:
            for i in range(len(model.blocks)):
                model.drop_block_(i)
            model.drop_outer_()
        if not math.isfinite(curve.before):
            raise NumericsError(
                f"the loss of the model rounded as the recipe says is {curve.before:g} before anything is learned."
            )
        self.progress.advance("rotations", loss=min(curve.before, curve.after))
        return curve

    def _note(self, step: int, loss: float) -> None:
        if isinstance(self.progress, Stepwise):
            self.progress.step("rotations", step / self.tuning.steps, loss=loss)

    def _parameters(self, check_stop: Callable[[], None]) -> dict[str, Learned]:
        """Load every block, and return its parameters that are turned or rounded."""
        axes: dict[str, list[Axis]] = {}
        residual = () if self.network.residual is None else self.network.residual.turns
        for turn in (*residual, *self.network.heads):
            axes.setdefault(turn.parameter, []).append(Axis(turn.axis, turn.heads))
        found: dict[str, Learned] = {}
        for i in range(len(self.model.blocks)):
            check_stop()
            for name in self.model.load_block_(i):
                stored = self.model.model.get_parameter(name).data  # the one copy of it, in float32
                planned = self.planned.get(name)
                if name in axes or planned is not None:
                    rounded = _as_it_is if planned is None else _rounding(planned, self.tuning.rounds, stored)
                    found[name] = RotatedParameter(stored, axes.get(name, []), self.rotations, i, rounded)
        return found

    def sides(self) -> dict[str, bool]:
        """Return what a recipe has to say of sides that the file does not hold."""
        held = {"residual": self.rotations.residual is not None, "values": bool(self.rotations.values)}
        return {side: False for side, there in held.items() if not there}

    def result(self) -> dict[str, torch.Tensor]:
        """Return the start's rotation and the learned one as one, float32, by the names that a file of rotations has."""
        made, residual = {}, self.network.residual
        if residual is not None and self.rotations.residual is not None:
            start = self.rotate.of_residual(residual.width, centred=False)
            made["residual"] = _after(self.rotations.residual, start.apply(torch.eye(residual.width)).T)
        for block, turn in self.rotations.values.items():
            made[f"values.{block}"] = _after(turn, self.rotate.of_values(len(turn), block).apply(torch.eye(len(turn))).T)
        return made


def _after(learned: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return (learned.detach().to(CPU, torch.float64) @ start).float().contiguous()


def _as_it_is(w: torch.Tensor) -> Value:
    return w


def _rounding(planned: PlannedWeight, rounds: Rounds, stored: torch.Tensor) -> Callable[[torch.Tensor], Value]:
    """Return what makes of a weight, as the model holds it, what its block computes with: rounded, and its input too."""
    parameter, fmt, inputs = planned.parameter, planned.format, planned.method.inputs
    around: list[tuple[Map | None, Map | None]] = []
    if isinstance(fmt, Format) and not parameter.experts:
        w = parameter.matrices(stored)[0]
        for change in planned.method.changes:
            if not change.needs:
                ahead, behind = change.plan(w, None, fmt)
                around.append((ahead and moved(ahead, w.device), behind and moved(behind, w.device)))
                w = into_basis(w, around[-1])
    input_map = chain(*(ahead for ahead, _ in around))
    output_map = chain(*(behind for _, behind in reversed(around)))
    own = None
    if inputs is not None and rounds != "weights" and not parameter.experts:
        own = inputs.channels(ActivationFormat(inputs.format), parameter.shape[1])

    def made(w: torch.Tensor) -> Value:
        parts = [into_basis(part, (input_map, output_map)) for part in parameter.matrices(w)]
        if isinstance(fmt, Format) and rounds != "inputs":
            parts = [fake_quantize(part, fmt) for part in parts]
        weight = CompressedWeight((Soft(torch.cat(parts)),), input_map, output_map)  # type: ignore[arg-type]
        return parameter.restore(weight.dequantize()) if own is None else CompressedLayer(weight, own)

    return made
