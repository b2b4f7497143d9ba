"""Philox4x32-10, vectorised: random words as a pure function of a counter and a key.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). numpy's own Philox walks one
stream; a plan needs the words of any set of samples at once, so the ten rounds are written over arrays here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_LOW = np.uint64(_WORD)
_HALF = np.uint64(32)


def philox(index: NDArray[np.int64], counter: tuple[int, int, int], seed: int) -> NDArray[np.uint64]:
    """Four 32-bit words for each index.

    Args:
        index: int64 [n], each in [0, 2^32): the first word of the counter.
        counter: the other three words of the counter, each in [0, 2^32).
        seed: the key, in [0, 2^64).

    Returns:
        uint64 [4, n] with values below 2^32.
    """
    c0 = index.astype(np.uint64)
    c1, c2, c3 = (np.full_like(c0, word) for word in counter)
    key0, key1 = seed & _WORD, seed >> 32
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _HALF) ^ c1 ^ np.uint64(key0)
        c2 = (product0 >> _HALF) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return np.stack([c0, c1, c2, c3])
