"""A sample's key in a WebDataset, and its label: how they are read, and what an image is called in a set of ours."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.sources.names import is_wnid

IMAGE_COMPONENTS = ("jpg", "jpeg")  # Extensions of a sample's image; this program writes the first.
LABEL_COMPONENT = "cls"
# A USTAR member's name has 100 bytes; the rest is room for ".jpg" and what keeps two keys apart.
MAX_KEY = 80
MAX_DIGITS = 9  # Of a label.
_HASHED = 17  # "_" and 16 hexadecimal digits
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def split_name(name: str) -> tuple[str, str]:
    """A tar member's key and extension: in a WebDataset the extension begins at the first dot of the name's last part.

    >>> split_name("val.new/a.seg.png")
    ('val.new/a', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def label_number(text: bytes) -> int | None:
    """The label that a sample's .cls holds; None where its text is no number that a label may be."""
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) <= MAX_DIGITS else None


def key_of(wnid: str, name: str) -> str:
    """What an image of a class is called, before what makes it unique: it begins with its class.

    Args:
        name: the image's file name; a wnid at its end, as in Hugging Face's archives, does not count.
    """
    stem = stem_of(wnid, name)
    key = escape(stem if stem.startswith(wnid) else f"{wnid}_{stem}")
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - _HASHED]}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def stem_of(wnid: str, name: str) -> str:
    """An image's file name without extension and, where its class is a wnid, without that at its end."""
    stem = os.path.splitext(name)[0]
    return stem.removesuffix(f"_{wnid}") if stem.endswith(wnid) and is_wnid(wnid) else stem


def may_be_of(wnid: str, key: str) -> bool:
    """Whether a key can be of an image of that class: it begins with the class, as far as `key_of` keeps that."""
    return key.startswith(escape(wnid)[: MAX_KEY - _HASHED])


def escape(text: str) -> str:
    """Writes each character that is not [A-Za-z0-9_-] as _xHH for each of its UTF-8 bytes.

    A dot would end a WebDataset key and a space would break a line of DALI's index.
    """
    if _PLAIN.issuperset(text):
        return text
    return "".join(
        character
        if character in _PLAIN
        else "".join(f"_x{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
        for character in text
    )


def rename_equal(keys: Iterable[str], count: int, key: Callable[[int], str]) -> dict[int, str]:
    """New keys, with _2, _3, ... added, for those that were there before, case aside, by their places.

    So a shard unpacked on any disk keeps every file. Holds 64 bits of each key and no key.

    Args:
        keys: all of them, in order.
        count: how many there are.
        key: gives the one at a place again.
    """
    hashes = np.fromiter((key_hash(text) for text in keys), np.uint64, count)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    # Each place whose key an earlier one has; a new key may add the one whose own it is.
    again = np.sort(order[1:][ordered[1:] == ordered[:-1]]).tolist()
    queued = set(again)
    renamed: dict[int, str] = {}
    given: set[int] = set()
    following: dict[str, int] = {}

    def first_with(digest: int) -> int:
        """The first place whose own key has this hash; `count` if none has."""
        at = np.searchsorted(ordered, np.uint64(digest))
        return int(order[at]) if at < count and ordered[at] == digest else count

    while again:
        place = heapq.heappop(again)
        text = candidate = key(place)
        # Where the first one with a key was renamed, that key was given away before.
        while (digest := key_hash(candidate)) in given or (first := first_with(digest)) < place:
            following[text.lower()] = following.get(text.lower(), 1) + 1
            candidate = f"{text}_{following[text.lower()]}"
        if candidate != text:
            renamed[place] = candidate
        given.add(digest)
        # All others with this key are queued already, since they are not its first.
        if place < first < count and first not in queued:
            queued.add(first)
            heapq.heappush(again, first)
    return renamed


def key_hash(key: str) -> int:
    """64 bits of a key, lower case, to find one that is there twice."""
    return int.from_bytes(hashlib.blake2b(key.lower().encode(), digest_size=8).digest(), "little")
