"""The shifts of a block's inputs: chosen on what calibration saw, and folded into norms and biases where these take them.

Weights and formats are chosen as if every shift stayed online: the product sees the middle plus a rounded distance. At the end of the block
the shifts that fold leave their layers, which are plain then: the norm in front subtracts the shift, and the layer's bias adds what the
original weight makes of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float

from bitpress.calibration import Observed, Stats
from bitpress.checkpoints.parameter import WeightParameter
from bitpress.formats import ChannelFormat, InputFormat
from bitpress.models.streaming import StreamedModel
from bitpress.pipeline.calibration_stream import Measured
from bitpress.pipeline.channel_scaling import PROBE_LENGTH
from bitpress.pipeline.planned_weight import PlannedWeight
from bitpress.pipeline.rounded_inputs import SeenChannels
from bitpress.pipeline.weights import CompressedBlock
from bitpress.transforms.folding import find_folds
from bitpress.transforms.shift import Shift
from bitpress.transforms.shift_folds import find_shift_folds, layer_bias, norm_bias

__all__ = ["NO_NORM_BIAS", "BlockShifts"]

NO_NORM_BIAS = (
    "its input is not shifted: no norm in front of it takes the shift into a bias, or a layer behind that norm has none"
)


@dataclass(frozen=True)
class BlockShifts:
    """The shifts of the weights of a block.

    middles  by the weights' names, before any channel is scaled
    folds    the norms that take shifts, by their biases' names, with all weights behind each
    """

    shift: Shift
    middles: Mapping[str, Float[torch.Tensor, " in"]]
    folds: Mapping[str, Sequence[WeightParameter]]

    @classmethod
    def choose(
        cls,
        shift: Shift,
        model: StreamedModel,
        i: int,
        planned: Sequence[PlannedWeight],
        observed: Mapping[str, tuple[WeightParameter, Observed]],
        found: Measured,
    ) -> "BlockShifts":
        """Choose the shifts by the statistics of a loaded block, whose weights are the original ones. Raises CalibrationError."""
        # Of a layer that is still to choose, the first format that its input may have.
        rounded = {p.parameter.stem: p.method.every_input[0].format for p in planned if p.method.every_input}
        groups = [[name for name in group if not observed[name][0].experts] for group in found.groups]
        folds: dict[str, list[WeightParameter]] = {}
        if shift.place != "online":
            views = [[observed[name][1] for name in group] for group in groups]
            block, probe = model.blocks[i], found.probe[:1, :PROBE_LENGTH]

            def run() -> torch.Tensor:
                return model.run_block(i, probe)

            for g, fold in find_shift_folds(block, run, views, find_folds(block, run, views)).items():
                if any(name in rounded and found.stats[name].tokens for name in groups[g]):
                    folds[f"{model.block_name(i)}.{fold.producer}.bias"] = [observed[name][0] for name in groups[g]]
        middles: dict[str, Float[torch.Tensor, " in"]] = {}
        for parameters in folds.values():  # all of them have one shift, that of a rounded input
            names = [parameter.stem for parameter in parameters]
            first = next(name for name in names if name in rounded)
            middles |= dict.fromkeys(names, shift.plan(found.stats[first], rounded[first]))
        if shift.place != "folded":
            others = {name: s for name, s in found.stats.items() if s.tokens and name not in middles}
            middles |= {name: shift.plan(s, rounded.get(name)) for name, s in others.items()}
        return cls(shift, middles, folds)

    def of_distances(self, stats: Mapping[str, Stats]) -> dict[str, Stats]:
        """Return statistics of what is rounded of inputs."""
        return {name: s.shifted(self.middles[name]) if name in self.middles else s for name, s in stats.items()}

    def fold_(
        self,
        model: StreamedModel,
        planned: Sequence[PlannedWeight],
        tensors: dict[str, torch.Tensor],
        made: CompressedBlock,
        seen: dict[str, SeenChannels],
    ) -> set[str]:
        """Fold the shifts of a compressed block into `tensors` and the model, and return the names of the layers that have none any more.

        `tensors` hold the original weights with their channels scaled, `seen` the shifts as these left them.
        """
        plain: set[str] = set()
        for bias, parameters in self.folds.items():
            shift = next(seen[p.name].shift for p in parameters if p.name in seen)
            assert shift is not None
            tensors[bias], taken = norm_bias(tensors[bias], shift.float())
            changed = {bias: tensors[bias]}
            for parameter in parameters:
                name = f"{parameter.name.removesuffix('weight')}bias"
                (w,) = parameter.matrices(tensors[parameter.name])
                before = seen.get(parameter.name)
                if before is not None and before.online is not None:
                    w = w / before.online
                changed[name] = tensors[name] = layer_bias(tensors[name], w, taken)
                if before is not None:
                    seen[parameter.name] = SeenChannels(before.sample - taken, None, before.online)
                if parameter.name in made.parameters and (own := made.parameters[parameter.name]).input is not None:
                    made.put_(own.with_input(_without_shift(own.input)))
                    plain.add(parameter.name)
            model.fill_(changed)
        for p in planned if self.shift.place == "folded" else ():
            own = made.parameters[p.parameter.name]
            if own.input is not None and p.parameter.name not in plain:
                made.put_(own.with_note(NO_NORM_BIAS))
        return plain


def _without_shift(own: InputFormat) -> InputFormat:
    """Return the format of an input whose shift is made in front of the layer."""
    if not isinstance(own, ChannelFormat):
        return own
    bare = own.first is None and own.copies is None and own.clip is None
    return own.rest if bare else replace(own, shift=None)
