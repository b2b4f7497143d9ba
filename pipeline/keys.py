"""What an image is called in a shard set, in characters that every reader of tars takes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

# A USTAR member's name has 100 bytes; the rest is room for ".jpg" and what keeps two keys apart.
MAX_KEY = 80
_HASHED = 17  # "_" and 16 hexadecimal digits
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def key_of(wnid: str, name: str) -> str:
    """What an image of a class is called, before what makes it unique: it begins with its class.

    Args:
        name: the image's file name.
    """
    stem = os.path.splitext(name)[0]
    key = escape(stem if stem.startswith(wnid) else f"{wnid}_{stem}")
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - _HASHED]}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def may_be_of(wnid: str, key: str) -> bool:
    """Whether a key can be of an image of that class."""
    return key.startswith(escape(wnid)[: MAX_KEY - _HASHED])


def escape(text: str) -> str:
    """Writes each character that is not [A-Za-z0-9_-] as _xHH for each of its UTF-8 bytes.

    A dot would end a WebDataset key and a space would break a line of DALI's index.
    """
    return "".join(
        character
        if character in _PLAIN
        else "".join(f"_x{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
        for character in text
    )


def make_unique(keys: Iterable[str]) -> list[str]:
    """Adds _2, _3, ... to a key that was there before, case aside: a shard unpacked on any disk keeps every file."""
    taken: set[str] = set()
    following: dict[str, int] = {}
    unique = []
    for key in keys:
        candidate, folded = key, key.lower()
        while candidate.lower() in taken:
            following[folded] = following.get(folded, 1) + 1
            candidate = f"{key}_{following[folded]}"
        taken.add(candidate.lower())
        unique.append(candidate)
    return unique
