"""PTQ1.61: input channels of large activations in 4 bits, all others in one bit with factors fitted to the layer's output.

Source   Zhao et al. 2025, "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language
         Models", and its public code (`quantize/blockptq.py`, `models/int_llama_layer.py`): the fifth of the channels with the largest
         activations, min-max 4 bits for them, signs with a factor for every row and one for every column elsewhere.
Differs  row and column factors alternate by least squares on the output of this weight, where the paper trains them through a block
         with the cosine of the outputs in its loss. Signs are those of the weight, not of the weight minus its row mean. An input's
         size is its root mean square, where the code takes the largest value. The 4-bit columns are fitted with clipping. The paper's
         preprocessing, which trains the weights towards rows of equal size, is left out.
Needs    gram [in, in] float32.     Cost  O(steps * (out * in^2 + in^3)).
Update   w_hat[:, j] = a_i s_ij r_j;  a_i = <t_i, v_i> / <v_i, v_i>, v = s r, products by the gram;
         r = (gram o (a s)' (a s) + ridge I)^-1 (diag((a s)' t gram) + ridge 1),  t = w less the kept columns
Fails    if the factors do not reduce the output error, plain signs are used: a fallback. Inputs that were always 0 have the factor 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float

from bitpress.calibration.stats import Stats
from bitpress.errors import UsageError
from bitpress.formats import CompressedWeight, Format, Kept, Packed, Scale, Term, parse_format
from bitpress.quantizers.mechanisms.storage import column_bytes, term_bytes
from bitpress.quantizers.quantizer import Outcome, Quantizer, check_served, output_errors
from bitpress.quantizers.rtn import shrink_ratios

__all__ = ["PTQ161"]

# Limits of a column's factor: a factor beyond them would mean wrong signs, not a wrong scale.
SMALLEST, LARGEST = 1 / 16, 16.0


@dataclass(frozen=True)
class PTQ161(Quantizer):
    salient: float = 0.2
    high: str = "int4-row-zero"
    steps: int = 10
    damp: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    transforms: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str] = "input channels of large activations in 4 bits, the others binary with fitted factors"
    paper: ClassVar[str] = "P432"
    bits: ClassVar[tuple[float, float]] = (1, 2)
    serves: ClassVar[tuple[str, ...]] = ("binary-row*", "binary-g*")

    def __post_init__(self) -> None:
        parse_format(self.high)
        if not 0 <= self.salient < 1:
            raise UsageError(f"salient={self.salient}: must be a share of the input channels, 0 or more and below 1.")
        if self.steps < 0 or not self.damp > 0:
            raise UsageError(f"steps must be 0 or more and damp above 0, got {self.steps}, {self.damp}.")

    @property
    def keeps_map(self) -> bool:
        return self.steps > 1

    def stored_bytes(self, fmt: Format, shape: tuple[int, int], parts: int = 1) -> int:
        width = shape[1]
        cols = 1 if fmt.block.cols == "all" else fmt.block.resolve(shape)[1]
        others = max((width - round(self.salient * width)) // cols * cols, cols)
        if others == width:  # even without salient columns the binary ones are kept columns, with a mask
            return term_bytes("kept", shape, parts, axis="columns", count=width, format=fmt.name)
        return column_bytes(parse_format(self.high), fmt, width - others, shape, parts)

    def quantize(self, w: Float[torch.Tensor, "out in"], stats: Stats | None, fmt: Format) -> Outcome:
        check_served("ptq161", self.serves, fmt)
        gram = (stats or Stats(0)).need_gram("ptq161")
        w = w.float()
        energy = gram.diagonal()
        salient = self.salient_channels(energy, fmt)
        kept = self._keep(w, energy, salient)
        rest = ~salient
        scale = float(energy.mean())
        near = gram / (scale if scale > 0 else 1.0)
        params = fmt.fit(w[:, rest])
        signs = fmt.decode(fmt.encode(w[:, rest], params), params)
        target = w if kept is None else w - kept.dequantize()
        a, r = self._factors(signs, (target @ near)[:, rest], near[rest][:, rest])
        # Experts are stacked with a map each, so there is one of ones where the factors do not help.
        plain, fitted = (torch.ones_like(r), r) if self.keeps_map else (None, None)
        candidates = [_put_together(kept, fmt, signs, rest, plain)]
        candidates.append(_put_together(kept, fmt, signs * a[:, None], rest, fitted))
        errors = output_errors(w, [c.dequantize() for c in candidates], stats)
        better = errors[1] <= errors[0]
        fallbacks = (
            () if better else ("the fitted factors did not reduce the output error; signs with the mean magnitude are used",)
        )
        figures = {"salient": float(salient.float().mean()), "error_without_factors": errors[0]}
        return Outcome(candidates[1] if better else candidates[0], fallbacks, figures)

    def salient_channels(self, energy: Float[torch.Tensor, " in"], fmt: Format) -> Bool[torch.Tensor, " in"]:
        """Return a mask of the channels of most energy: the share `salient`, rounded up so that the others fill whole blocks."""
        width = energy.numel()
        cols = 1 if fmt.block.cols == "all" else fmt.block.resolve((1, width))[1]
        others = max((width - round(self.salient * width)) // cols * cols, cols)
        chosen = torch.ones(width, dtype=torch.bool, device=energy.device)
        chosen[energy.argsort(stable=True)[:others]] = False
        return chosen

    def _keep(self, w: torch.Tensor, energy: torch.Tensor, salient: torch.Tensor) -> Kept | None:
        if not salient.any():
            return None
        high, taken = parse_format(self.high), w[:, salient]
        params = high.fit(taken, energy[salient].clamp(min=0.0), shrink_ratios("mse", 20, 0.5))
        return Kept.place(Packed.pack(high, high.encode(taken, params), params), "columns", salient)

    def _factors(
        self, signs: Float[torch.Tensor, "out n"], wanted: Float[torch.Tensor, "out n"], gram: Float[torch.Tensor, "n n"]
    ) -> tuple[Float[torch.Tensor, " out"], Float[torch.Tensor, " n"]]:
        """Fit a factor for every row and one for every column in turn; `wanted` is the target times the gram."""
        a, r = torch.ones_like(signs[:, 0]), torch.ones_like(signs[0])
        for step in range(self.steps):
            if step:
                scaled = signs * a[:, None]
                h = (gram * (scaled.T @ scaled)).double()
                ridge = self.damp * float(h.diagonal().mean()) or 1.0
                h.diagonal().add_(ridge)
                r = torch.linalg.solve(h, (scaled * wanted).sum(0).double() + ridge).float().clamp(SMALLEST, LARGEST)
            v = signs * r
            power = ((v @ gram) * v).sum(1)
            a = torch.where(power > 0, (v * wanted).sum(1) / torch.where(power > 0, power, 1.0), 1.0).clamp(min=0.0)
        return a, r


def _put_together(
    kept: Kept | None,
    fmt: Format,
    values: Float[torch.Tensor, "out n"],
    rest: Bool[torch.Tensor, " in"],
    r: Float[torch.Tensor, " n"] | None,
) -> CompressedWeight:
    """Pack signs times magnitudes (a fit recovers both) with the kept columns, and the column factors as the input map."""
    params = fmt.fit(values)
    binary = Kept.place(Packed.pack(fmt, fmt.encode(values, params), params), "columns", rest)
    terms: tuple[Term, ...] = (binary,) if kept is None else (kept, binary)
    if r is None:
        return CompressedWeight(terms)
    scale = torch.ones(rest.numel(), device=r.device)
    scale[rest] = r
    return CompressedWeight(terms, input_map=Scale(scale))
