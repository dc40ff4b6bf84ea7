"""Matrices behind maps in native code: what the maps themselves give, within rounding, whatever the threads."""

import numpy as np
import pytest
import torch

from bitpress import native
from bitpress.formats import Affine, Chain, Map, Permutation, Scale
from bitpress.formats.maps.reassembly import Reassembly
from bitpress.formats.maps.rotations import Hadamard, Kronecker
from bitpress.kernels.native_maps import MatrixMap, map_steps

CPU = torch.device("cpu")
built = pytest.mark.skipif(not native.available(), reason="no C++ compiler was there when bitpress was installed")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hadamard(size: int) -> Hadamard:
    return Hadamard.random(size, size, torch.Generator().manual_seed(size))


MAPS: dict[str, tuple[Map, int]] = {
    "scale": (Scale(draw(40)), 40),
    "permutation": (Permutation.of(torch.randperm(40, generator=torch.Generator().manual_seed(1))), 40),
    "hadamard of 64": (hadamard(64), 64),
    "hadamard of 40": (hadamard(40), 40),
    "hadamard of 576": (hadamard(576), 576),
    "kronecker": (Kronecker(torch.linalg.qr(draw(5, 5)).Q, torch.linalg.qr(draw(8, 8)).Q), 40),
    "affine": (Affine(draw(6, 6), draw(4, 4, seed=1)), 24),
    "chain": (Chain((Scale(draw(40)), hadamard(40), Scale(draw(40, seed=2)), Permutation.of(torch.arange(40).flip(0)))), 40),
}


@built
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("transposed", [False, True])
def test_native_maps_give_what_maps_give(name: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    change, size = MAPS[name]
    mapped = MatrixMap.of(change, size, CPU)
    assert mapped.native is not None
    one = change.apply_transposed if transposed else change.apply
    for count in (
        1,
        16,
        300,
    ):  # less than a strip of columns, one, several and a part of one; from 300 x 576 on two threads share
        w = draw(count, size, seed=3)
        found, turned = mapped.rows(w, transposed=transposed), mapped.columns(w.T, transposed=transposed).T
        torch.testing.assert_close(found, one(w), rtol=1e-5, atol=1e-5)
        assert torch.equal(found, turned)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert torch.equal(mapped.rows(w, transposed=transposed), found)
        assert torch.equal(mapped.columns(w.T, transposed=transposed).T, found)
        monkeypatch.undo()


def test_maps_that_native_code_does_not_know_map_by_themselves() -> None:
    gathered = torch.zeros(16, dtype=torch.int32)
    change = Chain((Scale(draw(16)), Reassembly(gathered, gathered)))
    mapped, w = MatrixMap.of(change, 16, CPU), draw(3, 16)
    assert mapped.native is None
    assert torch.equal(mapped.rows(w, transposed=False), change.apply(w))
    assert torch.equal(mapped.columns(w.T, transposed=True), change.apply_transposed(w).T)


@built
def test_no_wrong_array_reaches_a_map() -> None:
    library = native.library()
    steps = map_steps(MAPS["hadamard of 40"][0])
    one = library.MatrixMap(40, steps, "")
    x = draw(40, 40).numpy()
    wrong = [None, x.astype(np.float64), x[:, :39].copy(), x.T, x[None], x.reshape(-1), x[:0], "x"]
    for call in (one.rows, one.columns):
        call(x, np.empty_like(x), False, 1)
        for other in wrong:
            out = np.ones_like(x)
            for pair in ((other, out), (x, other)):
                with pytest.raises((TypeError, ValueError)):
                    call(*pair, False, 1)
            assert (out == 1).all()
        with pytest.raises(ValueError, match="another matrix than x"):
            call(x, x, False, 1)
        for threads in (0, -1, 1025, None, "2", 1.5):
            with pytest.raises((TypeError, ValueError)):
                call(x, np.empty_like(x), False, threads)
    for size, given in ((0, steps), (-1, steps), (41, steps), (2**31, steps), (40, []), (40, None), (40, [{}]), (40, steps[0])):
        with pytest.raises((TypeError, ValueError)):
            library.MatrixMap(size, given, "")
