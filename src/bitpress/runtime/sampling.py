"""How the next token is chosen."""

from dataclasses import dataclass

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the repetition penalty first, then temperature, top-k, top-p and min-p in turn.

    temperature         0 takes the most likely token
    top_k               keep the k most likely; 0 keeps all
    top_p               keep the fewest that have this probability together
    min_p               keep those at least this part as likely as the most likely
    repetition_penalty  divide (multiply, if negative) the logit of every token that has been before
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
