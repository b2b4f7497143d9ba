"""Equal images under different classes, as the placeholders are that a download leaves for dead links."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class EqualImages(NamedTuple):
    """Images that are each stored under another class, too."""

    images: int
    most: int
    """How often the most frequent one is stored."""
    classes: int
    """Under how many classes that one is."""
    example: int
    """The row of one of these."""


def equal_images(sizes: NDArray[np.uint32], checksums: NDArray[np.uint32], labels: NDArray[np.int32]) -> EqualImages:
    """Counts the stored images whose bytes, by size and CRC-32, are stored under several classes.

    Args:
        sizes, checksums, labels: [images] each.
    """
    digests = sizes.astype(np.uint64) << np.uint64(32) | checksums
    order = np.lexsort((labels, digests))
    digests, labels = digests[order], labels[order]
    first = np.flatnonzero(np.diff(digests, prepend=~digests[:1]))
    counts = np.diff(np.append(first, len(order)))
    # A new image or a new label begins at each of these.
    steps = np.diff(labels, prepend=labels[:1] - 1) != 0
    steps[first] = True
    classes = np.add.reduceat(steps, first, dtype=np.int64) if len(first) else first
    several = classes > 1
    if not several.any():
        return EqualImages(0, 0, 0, 0)
    most = int(np.argmax(np.where(several, counts, 0)))
    return EqualImages(int(counts[several].sum()), int(counts[most]), int(classes[most]), int(order[first[most]]))
