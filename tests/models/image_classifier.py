"""A made-up task, as far from a language model as can be: no text, no tokenizer, no vocabulary, outputs for the whole input at once."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from bitpress.calibration import Samples
from bitpress.errors import CalibrationError, NumericsError
from bitpress.models.task import Outputs


class ImageClassifier:
    """Pixels [samples, channels, size, size] in, logits [samples, classes] out. Data are images of noise: `noise:SEED`."""

    title: ClassVar[str] = "an image classifier"
    titles: ClassVar[str] = "image classifiers"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    reads_tokens: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    def why_not(self, config: Any) -> str | None:
        return None if config.architectures == ["ViTForImageClassification"] else "another kind of model"

    def trial(self, config: Any, samples: int, length: int) -> torch.Tensor:
        shape = (samples, config.num_channels, config.image_size, config.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def vary(self, inputs: torch.Tensor, config: Any) -> torch.Tensor:
        return inputs.flip(-1) + 1

    def shorten(self, inputs: torch.Tensor, length: int) -> torch.Tensor:
        return inputs

    def positions(self, config: Any, length: int) -> int:
        return int(config.image_size // config.patch_size) ** 2 + 1

    def cut(self, config: Any, count: int, length: int) -> tuple[int, int]:
        return count, 1

    def check_length(self, config: Any, length: int) -> None:
        return None

    def check_directory(self, path: Path) -> None:
        return None

    def check_inputs(self, inputs: torch.Tensor, config: Any, where: str) -> None:
        assert inputs.shape[1:] == (config.num_channels, config.image_size, config.image_size)

    def draw(
        self,
        data: str,
        path: Path,
        config: Any,
        *,
        samples: int,
        length: int,
        seed: int,
        chat: bool = False,
        held_out: int = 0,
    ) -> Samples:
        kind, _, number = data.partition(":")
        if kind != "noise":
            raise CalibrationError(f"{data}: unknown images; use noise:SEED.")
        shape = (samples, config.num_channels, config.image_size, config.image_size)
        generator = torch.Generator().manual_seed(seed + int(number))
        inputs = torch.randn(shape, generator=generator)
        further = torch.randn((held_out, *shape[1:]), generator=generator) if held_out else None
        return Samples(inputs, (kind,) * samples, hashlib.sha256(inputs.numpy().tobytes()).hexdigest(), further)

    def count(self, inputs: torch.Tensor) -> dict[str, int]:
        return {"images": len(inputs)}

    def forward(self, model: Any, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(pixel_values=inputs.to(model.dtype)).logits
        return logits

    def fits(self, outputs: torch.Tensor, inputs: torch.Tensor) -> bool:
        return outputs.ndim == 2 and len(outputs) == len(inputs)

    def output_values(self, config: Any, length: int) -> int:
        return int(config.num_labels)

    def loss(self, outputs: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return -torch.log_softmax(outputs.float(), -1).max(-1).values.mean()

    def drawn_loss(self, outputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        drawn = torch.multinomial(outputs.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(outputs.float(), drawn)

    def distance(
        self,
        original: Outputs,
        candidate: Outputs,
        inputs: torch.Tensor,
        note: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        logs = [[torch.log_softmax(of(image).double(), -1)[0] for image in inputs.split(1)] for of in (original, candidate)]
        p, q = torch.stack(logs[0]), torch.stack(logs[1])
        if not bool(torch.isfinite(q).all()):
            raise NumericsError("the logits of the compressed model are not finite.")
        kl = (p.exp() * (p - q)).sum(-1)
        half = 1.96 * float(kl.std()) / math.sqrt(len(kl))
        return {"kl_mean": float(kl.mean()), "kl_ci95": half, **self.count(inputs)}

    def score(self, outputs: Outputs, inputs: torch.Tensor, note: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
        top = [float(torch.softmax(outputs(image), -1).max()) for image in inputs.split(1)]
        return {"confidence": sum(top) / len(top), **self.count(inputs)}
