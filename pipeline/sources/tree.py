"""What lies at a place: a folder, or a tar, read as the folder that it would unpack to; each once it is asked for."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import braceexpand
from pyarrow import fs

from pipeline.sources.file_table import FileTable, Holder
from pipeline.sources.files import LISTING_THREADS, UNREADABLE, URL_THREADS, SourceError, is_image_name, state_of
from pipeline.sources.names import is_tar_name, is_unread_archive
from pipeline.sources.tars import Member, Stretch, Window, members_in, table_of, whole
from pipeline.sources.webdatasets import SampleReader, Samples
from pipeline.storage import remote
from pipeline.storage.locations import child, is_http, is_url, parent, shown
from pipeline.storage.remote import Item

FORMS = "a folder of class folders, a tar or a folder of class tars, or a folder of WebDataset shards with their .cls"


@dataclasses.dataclass(frozen=True)
class Tree:
    """What lies in a folder or a tar itself."""

    where: str
    """As `shown`, continued inside the tar."""
    folder: str
    """Path or URL of the folder, or of the one that the tar lies in."""
    images: FileTable = dataclasses.field(default_factory=lambda: FileTable.joined([]))
    below: tuple[Branch, ...] = ()
    """The folders and tars in it, sorted by name."""
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How many files are none of these, by extension; hidden ones not counted."""
    archives: tuple[str, ...] = ()
    """The names of those that look like data."""
    samples: Samples | None = None
    """Of a WebDataset's shard, instead of images and folders."""
    is_tar: bool = False


@dataclasses.dataclass(eq=False)
class Branch:
    """A folder or tar in another, which is read once it is asked for."""

    name: str
    where: str
    is_tar: bool
    _read: Callable[[], Tree]
    kept: Tree | None = None
    """What lies in it, once that is known."""

    @property
    def stem(self) -> str:
        """Its name, a tar's without the extension."""
        return os.path.splitext(self.name)[0] if self.is_tar else self.name

    # Before Python 3.12, functools.cached_property reads one at a time, of all there are.
    @property
    def tree(self) -> Tree:
        """What lies in it.

        Raises:
            SourceError, OSError: if it cannot be read, or is no whole tar.
        """
        if self.kept is None:
            self.kept = self._read()
        return self.kept


def read_all(branches: Sequence[Branch]) -> Iterator[Tree]:
    """What lies in each, in their order, read in several threads."""
    with ThreadPoolExecutor(URL_THREADS if is_url(branches[0].where) else LISTING_THREADS) as pool:
        yield from pool.map(lambda branch: branch.tree, branches)


def read_place(location: str, flag: str) -> Tree:
    """What lies at a local path or URL, in which {000..146} stands for many tars.

    Raises:
        SourceError: if there is nothing, or no tar where only a tar will do.
        OSError: if it cannot be read.
    """
    if _is_pattern(location):
        tars = _expanded(location)
        branches = tuple(_tar_branch(name, tar) for name, tar in tars.items())
        return Tree(shown(location), parent(next(iter(tars.values()))), below=branches)
    if is_http(location) and not is_tar_name(location.partition("?")[0]):
        raise SourceError(
            f"{shown(location)} is no tar, and HTTP cannot list folders: give {flag} http://HOST/NAME.tar, "
            "or shards as http://HOST/NAME-{000000..000146}.tar"
        )
    kind = _kind(location)
    if kind == fs.FileType.NotFound:
        raise SourceError(f"{shown(location)} does not exist: give {flag} {FORMS}")
    # A pipe would be waited for without end.
    if kind == fs.FileType.Unknown:
        raise SourceError(f"{shown(location)} is neither a folder nor a file: give {flag} {FORMS}")
    return read_folder(location) if kind == fs.FileType.Directory else read_tar(whole(location))


def walk(location: str) -> Iterator[tuple[str, str]]:
    """The folders and files at a place, in a fixed order, each with what changes when it is another or written anew.

    That is empty for a file on a web server that does not tell. Nothing is read, and no tar looked into.

    Raises:
        OSError: if it cannot be looked at.
    """
    if not _is_pattern(location) and _kind(location) == fs.FileType.Directory:
        yield location, "folder"
        for item in sorted(_scan(location)):
            place = child(location, item.name)
            yield from walk(place) if item.folder else [(place, f"{item.size} {item.mtime_ns}")]
        return
    tars = list(_expanded(location).values()) if _is_pattern(location) else [location]
    with ThreadPoolExecutor(URL_THREADS) as pool:
        yield from zip(tars, pool.map(_version, tars), strict=True)


def _version(location: str) -> str:
    try:
        return remote.version(location) if is_url(location) else str(state_of(location))
    # A server on the web may forbid what it does not have.
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return "missing"


def _is_pattern(location: str) -> bool:
    return "{" in location and not (not is_url(location) and os.path.exists(location))


def _kind(location: str) -> fs.FileType:
    if is_url(location):
        return remote.kind(location)
    if os.path.isdir(location):
        return fs.FileType.Directory
    if os.path.isfile(location):
        return fs.FileType.File
    return fs.FileType.Unknown if os.path.exists(location) else fs.FileType.NotFound


def _expanded(pattern: str) -> dict[str, str]:
    """The locations of the tars that a pattern stands for, by name, sorted.

    Raises:
        SourceError: if two have one name, by which classes and splits are told.
    """
    tars: dict[str, str] = {}
    for tar in braceexpand.braceexpand(pattern):
        name = os.path.basename(shown(tar))
        if tars.setdefault(name, tar) != tar:
            raise SourceError(
                f"{shown(tars[name])} and {shown(tar)} have the same name: name the tars apart, as by links in a folder"
            )
    return dict(sorted(tars.items()))


def _tar_branch(name: str, location: str) -> Branch:
    return Branch(name, shown(location), True, lambda: read_tar(whole(location)))


# ---- Folders ----


def read_folder(location: str) -> Tree:
    """What lies in a folder on a disk or in an object store; hidden things are not looked at.

    Raises:
        SourceError: for a link that leads nowhere and may have led to a folder or tar. That of an image is listed.
        OSError: if the folder cannot be read.
    """
    images: list[tuple[str, int]] = []
    below, others = [], []
    for item in _scan(location):
        place = child(location, item.name)
        if item.folder:
            below.append(Branch(item.name, shown(place), False, functools.partial(read_folder, place)))
        elif item.size is not None and is_image_name(item.name):
            images.append((item.name, item.size))
        elif item.size == UNREADABLE:
            raise SourceError(f"{shown(place)} is a link that leads nowhere: repair or remove it")
        elif item.size is not None and is_tar_name(item.name):
            below.append(_tar_branch(item.name, place))
        else:
            others.append(item.name)
    table = FileTable.of(Holder(location), [name for name, _ in images], [size for _, size in images])
    return _tree(shown(location), location, table, below, others)


def _scan(folder: str) -> Iterator[Item]:
    """What lies in a folder; what cannot be reached has the size UNREADABLE."""
    items = remote.scan(folder) if is_url(folder) else _scan_disk(folder)
    return (item for item in items if not item.name.startswith("."))


def _scan_disk(folder: str) -> Iterator[Item]:
    with os.scandir(folder) as items:
        for item in items:
            try:
                is_folder = item.is_dir()
                status = None if is_folder else item.stat()
            except OSError:
                yield Item(item.name, False, UNREADABLE)
                continue
            # A pipe called x.jpg would be waited for without end.
            size = status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None
            yield Item(item.name, is_folder, size, 0 if status is None else status.st_mtime_ns)


def _tree(where: str, folder: str, images: FileTable, below: list[Branch], others: Iterable[str]) -> Tree:
    names = list(others)
    return Tree(
        where,
        folder,
        images,
        tuple(sorted(below, key=lambda branch: branch.name)),
        collections.Counter(os.path.splitext(name)[1].lower() for name in names),
        tuple(name for name in names if is_unread_archive(name)),
    )


# ---- Tars ----


class _Folder:
    """A folder in a tar."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.folders: dict[str, _Folder] = {}


def read_tar(tar: Stretch) -> Tree:
    """What a tar would unpack to, or a shard's samples.

    Raises:
        SourceError: if it is compressed, cut off or damaged, holds a link, or something twice; see `members_in`.
        OSError: if it cannot be read.
    """
    found = []
    samples = SampleReader(tar)
    with contextlib.closing(Window(tar)) as file:
        for member in members_in(file):
            if not member.hidden:
                samples.add(member, file)
                found.append(member)
    if samples.found:
        shard = samples.read(found)
        return Tree(tar.where, parent(tar.path), others=shard.others, samples=shard, is_tar=True)
    by_folder = collections.defaultdict(list)
    for member in found:
        by_folder[os.path.dirname(member.name)].append(member)
    root = _Folder()
    for path, members in by_folder.items():
        folder = root
        for name in path.split("/") if path else ():
            folder = folder.folders.setdefault(name, _Folder())
        folder.members = members
    return _tar_tree(tar, tar.where, root)


def _tar_tree(tar: Stretch, where: str, folder: _Folder) -> Tree:
    below = [
        Branch(name, f"{where}/{name}", False, functools.partial(_tar_tree, tar, f"{where}/{name}", inner))
        for name, inner in folder.folders.items()
    ]
    images, others = [], []
    seen: set[str] = set()
    for member in folder.members:
        # Unpacking would keep the last one alone.
        if member.base in seen:
            raise SourceError(f"{where} holds {member.base} twice: make it again with each file once")
        seen.add(member.base)
        if is_image_name(member.base):
            images.append(member)
        elif is_tar_name(member.base):
            inside = Stretch(tar.path, member.offset, member.size, f"{tar.inside}/{member.name}".lstrip("/"), tar.state)
            below.append(Branch(member.base, inside.where, True, functools.partial(read_tar, inside)))
        else:
            others.append(member.base)
    tree = _tree(where, parent(tar.path), table_of(tar, images), below, others)
    return dataclasses.replace(tree, is_tar=True)
