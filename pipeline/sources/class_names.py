"""What the classes are called: ImageNet's thousand by their names, all others as their folders are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

# sha256 of the 1000 wnids of ILSVRC-2012, sorted, joined by line breaks. The lists that come with Caffe
# (synset_words.txt), with the devkit (by its ids) and with Keras (imagenet_class_index.json) agree on it.
_IMAGENET_WNIDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"


def is_imagenet(wnids: Sequence[str]) -> bool:
    """Whether sorted class names are exactly ILSVRC-2012's thousand wnids."""
    text = "\n".join(wnids).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest() == _IMAGENET_WNIDS


def names_of(wnids: Sequence[str]) -> tuple[str, ...]:
    """A name for each of the sorted class names, which is the same where no better one is known."""
    if not is_imagenet(wnids):
        return tuple(wnids)
    # Takes seconds to import, and only ImageNet itself needs it.
    from torchvision.models import AlexNet_Weights

    return tuple(str(name) for name in AlexNet_Weights.IMAGENET1K_V1.meta["categories"])
