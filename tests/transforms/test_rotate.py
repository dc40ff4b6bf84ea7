"""The rotation itself: orthogonal in float64 at every width, the vector of ones where means are subtracted, another one for another seed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitpress.errors import CheckpointError, FormatError, UsageError
from bitpress.transforms.rotate import Rotate

# A power of two, one with Paley's matrix of order 36, one with the Hartley matrix of 43.
WIDTHS = (64, 576, 172)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("centred", [False, True])
def test_a_rotation_is_orthogonal_and_leaves_no_channel_apart(kind: str, width: int, centred: bool) -> None:
    rotation = Rotate(kind=kind).of_residual(width, centred=centred)  # type: ignore[arg-type]
    matrix = rotation.apply(torch.eye(width)).T
    assert matrix.dtype == torch.float64
    # Hartley's matrix is held in float32: entries below 2 / sqrt(width) are rounded by 2^-25 of that.
    assert (matrix @ matrix.T - torch.eye(width)).abs().max() < 1e-6
    # A channel alone is spread over all: entries of variance 1 / width, of which sqrt(40 / width) is beyond six deviations.
    assert matrix.abs().max() < (40 / width) ** 0.5
    ones = torch.ones(width, dtype=torch.float64)
    assert bool(((matrix @ ones - ones).abs() < 1e-5).all()) == centred


def test_the_seed_and_the_site_decide_the_rotation() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    first = Rotate().of_residual(64, centred=False).apply(x)
    assert torch.equal(first, Rotate().of_residual(64, centred=False).apply(x))
    assert not torch.equal(first, Rotate(seed=1).of_residual(64, centred=False).apply(x))
    assert not torch.equal(first, Rotate().of_values(64).apply(x))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UsageError, match="kind='random'"):
        Rotate(kind="random")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one of them is true"):
        Rotate(residual=False, values=False)
    with pytest.raises(UsageError, match="seed=-1"):
        Rotate(seed=-1)
    with pytest.raises(FormatError, match="core must be at most"):
        Rotate().of_residual(2 * 2053, centred=False)


def rotations(folder: Path, **tensors: torch.Tensor) -> Rotate:
    path = folder / "R.safetensors"
    save_file({name.replace("_", "."): value.contiguous() for name, value in tensors.items()}, path)
    return Rotate(kind="given", tensors=str(path))


def random_rotation(width: int, seed: int = 5) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]


def test_a_given_rotation_is_that_of_the_file_and_exactly_orthogonal(tmp_path: Path) -> None:
    residual, values, third = random_rotation(24), random_rotation(8), random_rotation(8, 6)
    rotate = rotations(tmp_path, residual=residual.bfloat16(), values=values, values_3=third)
    matrix = rotate.of_residual(24, centred=False).apply(torch.eye(24)).T
    assert (matrix - residual).abs().max() < 4e-3  # bf16 entries
    assert (matrix @ matrix.T - torch.eye(24)).abs().max() < 1e-14
    eye = torch.eye(8)
    assert (rotate.of_values(8, 2).apply(eye).T - values).abs().max() < 1e-6
    assert (rotate.of_values(8, 3).apply(eye).T - third).abs().max() < 1e-6
    ones = torch.ones(24, dtype=torch.float64)
    assert (rotate.of_residual(24, centred=True).apply(ones) - ones).abs().max() < 1e-12


def test_a_file_whose_rotation_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    rotate = rotations(tmp_path, residual=random_rotation(24), values=2 * torch.eye(8), other=torch.eye(8, dtype=torch.int64))
    with pytest.raises(
        CheckpointError, match=r"R\.safetensors: residual is 24x24 of float32; a rotation of 32 channels is 32x32"
    ):
        rotate.of_residual(32, centred=False)
    with pytest.raises(CheckpointError, match=r"values is not orthogonal: R R' is up to 3 away from the identity, and 0.01 is"):
        rotate.of_values(8, 0)
    with pytest.raises(
        CheckpointError, match=r"holds no tensor values\.1 or values, but residual; add it, or use values: false"
    ):
        rotations(tmp_path, residual=random_rotation(24)).of_values(8, 1)
    with pytest.raises(CheckpointError, match="values is not orthogonal"):
        rotations(tmp_path, values=torch.full((8, 8), float("nan"))).of_values(8)
    with pytest.raises(UsageError, match=r"is another file than the recipe records \(SHA-256 .*leave sha256 out"):
        Rotate(kind="given", tensors=str(tmp_path / "R.safetensors"), sha256="0" * 64)
    with pytest.raises(UsageError, match=r"R\\x00': the name holds a NUL character"):
        Rotate(kind="given", tensors="R\0")
    with pytest.raises(UsageError, match=r"none\.safetensors: cannot be read"):
        Rotate(kind="given", tensors=str(tmp_path / "none.safetensors"))
    for wrong in ({"kind": "given"}, {"tensors": str(tmp_path / "R.safetensors")}, {"sha256": "0" * 64}):
        with pytest.raises(UsageError, match="give both or neither"):
            Rotate(**wrong)  # type: ignore[arg-type]
    (tmp_path / "R.safetensors").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        Rotate(kind="given", tensors=str(tmp_path / "R.safetensors")).of_values(8)
