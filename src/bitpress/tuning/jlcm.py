"""JLCM's joint learning: words of codebooks and the codes of weights at once, a code moving to a word nearby.

Source   Yvinec et al. 2023, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings", known here from its abstract
         and summaries of it: codebooks and mappings are learned together by straight-through gradients, made so that a mapping looks for words
         near its own and does not jump to the ends of the book.
Differs  a weight is a number (or a vector) that is learned and has the code of the nearest word, so that it comes to another word by way of those
         between; the paper weighs the gradients of all words by their distance. Scales of blocks are learned with the words. Rows are
         grouped by the quantizer `jlcm` or not at all.
Update   code = argmin |w / s - words|,  w_hat = s words[code],  w by the gradient of w_hat, words by that of all their weights
"""

from dataclasses import dataclass
from typing import ClassVar

from bitpress.tuning.block_ap import ShiftedWeights
from bitpress.tuning.learned import LearnedTerm, Start
from bitpress.tuning.tuner import ScheduleName, Tuning

__all__ = ["JLCM"]


@dataclass(frozen=True, kw_only=True)
class JLCM(Tuning):
    """`rate` is relative to the mean size of a weight; words have `words` times as much, relative to theirs."""

    rate: float | None = 5e-3
    schedule: ScheduleName = "cosine"
    words: float = 1.0

    summary: ClassVar[str] = "words of codebooks and the codes of weights at once"
    paper: ClassVar[str] = "P268"
    serves: ClassVar[tuple[str, ...]] = ("kmeans*", "gmm*", "vq*", "aq*")

    def begin(self, start: Start) -> LearnedTerm:
        return ShiftedWeights(start, scales=self.words, zeros=False)
