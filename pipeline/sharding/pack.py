"""A shard's tar and its index."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence

from pipeline.dataset.info import INDEX_VERSION


def pack(samples: Sequence[tuple[str, int, bytes]]) -> tuple[bytes, str]:
    """A tar of (key, label, JPEG) samples, KEY.cls then KEY.jpg in the order given, and its index for DALI.

    USTAR with no times and owners: equal samples give equal bytes, and no member needs a second header.
    """
    parts: list[bytes] = []
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    end = 0
    for key, label, jpeg in samples:
        line = []
        for extension, data in (("cls", str(label).encode()), ("jpg", jpeg)):
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            member.mode = 0o644
            padding = bytes(-len(data) % tarfile.BLOCKSIZE)
            # Not addfile, which copies the member and sends its data through a file.
            parts += (member.tobuf(tarfile.USTAR_FORMAT), data, padding)
            line.append(f"{extension} {end + tarfile.BLOCKSIZE} {len(data)} {member.name}")
            end += tarfile.BLOCKSIZE + len(data) + len(padding)
        lines.append(" ".join(line))
    zeros = 2 * tarfile.BLOCKSIZE
    parts.append(bytes(zeros + -(end + zeros) % tarfile.RECORDSIZE))
    return b"".join(parts), "\n".join(lines) + "\n"
