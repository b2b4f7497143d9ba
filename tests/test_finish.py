"""uint8 windows to the network's input, against numpy, and whose memory it is."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.finish import PIECE, SPARE, Finisher

CPU = torch.device("cpu")


def draw(n: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, 256, (n, 7, 5, 3), np.uint8)
    return windows, rng.random(n) < 0.5, rng.uniform(90, 130, (n, 3)).astype(np.float32)


@pytest.mark.parametrize("n", [1, PIECE - 1, PIECE, 3 * PIECE + 1])
def test_each_image_is_mirrored_and_shifted_by_its_own_numbers(n: int) -> None:
    windows, flips, means = draw(n, n)
    expected = windows.astype(np.float64)
    expected[flips] = expected[flips][:, :, ::-1]
    expected = (expected - means[:, None, None, :]).transpose(0, 3, 1, 2)
    got = Finisher(CPU, 1).finish(torch.from_numpy(windows).unbind(), flips, means)
    # Of larger images, as views, by several threads.
    wide = np.pad(windows, ((0, 0), (1, 2), (3, 4), (0, 0)))
    views = [torch.from_numpy(image)[1:-2, 3:-4] for image in wide]
    assert torch.equal(Finisher(CPU, 3).finish(views, flips, means), got)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    # Half of float32's last place at 256.
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=2**-16)


def test_memory_is_a_batchs_own_for_as_long_as_any_view_of_it_lives() -> None:
    finisher = Finisher(CPU, 2)
    kept, copies, places = [], [], set()
    for seed in range(2 * SPARE + 4):
        windows, flips, means = draw(PIECE + seed % 2, seed)
        batch = finisher.finish(torch.from_numpy(windows).unbind(), flips, means)
        places.add(batch.data_ptr())
        if seed % 2:
            kept.append(batch[1:3, 0].flip(1) if seed == 1 else batch[1:3, 0])
            copies.append(kept[-1].clone())
    del batch
    assert all(torch.equal(one, two) for one, two in zip(kept, copies, strict=True))
    # What was dropped was taken again.
    assert len(places) < 2 * SPARE + 4
    # What outlives its finisher stays too.
    del finisher
    assert all(torch.equal(one, two) for one, two in zip(kept, copies, strict=True))


def test_no_more_memory_is_kept_than_a_loop_needs() -> None:
    finisher = Finisher(CPU, 2)
    held = [finisher.finish(torch.from_numpy(w).unbind(), f, m) for w, f, m in (draw(3, s) for s in range(9))]
    places = {batch.data_ptr() for batch in held}
    assert len(places) == 9
    held.clear()
    windows, flips, means = draw(3, 0)
    again = [finisher.finish(torch.from_numpy(windows).unbind(), flips, means) for _ in range(9)]
    assert len(places & {batch.data_ptr() for batch in again}) >= SPARE
    assert len(finisher._spare) == 0
    again.clear()
    assert len(finisher._spare) == SPARE


def test_images_are_not_shared_out_among_torchs_threads_and_its_own_end_with_it() -> None:
    """OpenMP's threads belong to the thread that first asks for them, and so would be new ones here."""
    windows = np.zeros((4 * PIECE, 227, 227, 3), np.uint8)
    _, flips, means = draw(4 * PIECE, 0)
    found = []

    def finish() -> None:
        before, of_python = len(os.listdir("/proc/self/task")), threading.active_count()
        finisher = Finisher(CPU, 2)
        for _ in range(3):
            finisher.finish(torch.from_numpy(windows).unbind(), flips, means)
        found.append((len(os.listdir("/proc/self/task")) - before, torch.get_num_threads()))
        del finisher
        # The system may count a thread for a moment after its end.
        found.append((threading.active_count() - of_python, torch.get_num_threads()))

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        thread = threading.Thread(target=finish)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert found == [(2, 3), (0, 3)]
