"""Files that are there completely or not at all, and what is said of one that cannot be written."""

import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from harness.runtime import faults
from harness.runtime.neighbours import alive

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The system's errors for a disk that is full, or full for this user or file."""

NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
"""The system's errors where a file system has no hard links."""


class NotWritten(OSError):
    """A file that cannot be written. `strerror` is why, for a full disk with the bytes to write and those free."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


@contextmanager
def writing(file: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn an error of the system, while `nbytes` are written to `file`, into NotWritten. FileExistsError stays."""
    try:
        yield
    except (NotWritten, FileExistsError):
        raise
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise NotWritten(number, _reason(number, error, file, nbytes), str(file)) from error


def _system_error(error: Exception) -> int | None:
    """The number of the system's error. Libraries in Rust raise errors of their own, with the number in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _reason(number: int, error: Exception, file: Path, nbytes: int | None) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or os.strerror(number)
    if number not in NO_ROOM:
        return reason
    figures = [] if nbytes is None else [f"{nbytes:,} bytes to write"]
    with suppress(OSError):
        place = next(each for each in (file, *file.parents) if each.is_dir())
        figures.append(f"{shutil.disk_usage(place).free:,} free")
    return "; ".join([os.strerror(number), ", ".join(figures)])


@contextmanager
def whole(
    file: Path, nbytes: int | None = None, place: Callable[[Path, Path], None] | None = None
) -> Iterator[Path]:
    """Yield a path beside `file` to write to; at the end it replaces `file`, on disk. An error leaves `file` as it was.

    `nbytes` are to be written, where that is known. `place` gives the path the name of `file`; the default is `move`.
    Raises NotWritten.
    """
    partial = part_of(file)
    with writing(file, nbytes):  # outside: what is free counts without the part that was written
        try:
            faults.at(f"write {file.name}", nbytes or 0)
            yield partial
            flush(partial)
            (place or move)(partial, file)
        finally:
            with suppress(OSError):  # where nothing can be deleted, the first error says more
                partial.unlink(missing_ok=True)


def part_of(target: Path) -> Path:
    """A new name beside `target` for a part of it. It says which process writes it, for `sweep`."""
    return target.with_name(f".{target.name}.{os.getpid()}@{socket.gethostname()}.{uuid4().hex[:8]}.partial")


def sweep(directory: Path) -> None:
    """Delete from `directory` what processes of this host were writing when they were killed. What a living process
    writes stays, and what one of another host may be writing.
    """
    for part in directory.glob(".*.partial"):
        writer = re.search(r"\.(\d+)@(.+)\.[0-9a-f]{8}\.partial$", part.name)
        if writer and writer[2] == socket.gethostname() and not alive(int(writer[1])):
            with suppress(OSError):
                shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def folder(path: Path) -> None:
    """Make the directory `path`, if it is not there. Raises NotWritten, also for a link: it leads elsewhere."""
    with writing(path):
        if path.is_symlink():
            raise OSError(
                errno.ELOOP, f"{path.name} is a link, and a run writes nothing outside its directory"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def put(file: Path, content: str | bytes) -> None:
    """Write `content` to `file`, completely or not at all. Raises NotWritten."""
    data = content.encode() if isinstance(content, str) else content
    with whole(file, len(data)) as partial:
        partial.write_bytes(data)


def create(file: Path, content: str) -> None:
    """Write `content` to `file`, completely or not at all: of several processes that try, one succeeds.

    Raises FileExistsError where there is such a file, and NotWritten.
    """
    data = content.encode()
    with whole(file, len(data), _link) as partial:
        partial.write_bytes(data)


def _link(partial: Path, file: Path) -> None:
    """Give `partial` the name `file` too, unless there is such a file. Raises OSError."""
    try:
        os.link(partial, file)
    except OSError as error:
        if partial.stat().st_nlink == 2:  # a network disk may report an error for what it has done
            return
        if error.errno not in NO_LINKS:
            raise
        with file.open("xb") as stream:
            stream.write(partial.read_bytes())
    _flush_directory(file.parent)


def move(partial: Path, target: Path) -> None:
    """Rename a file or a directory, on disk, and check that it is there: a network disk may lose a rename, or report an
    error for one that it has done. Raises OSError.
    """
    before = _sizes(partial)
    try:
        os.replace(partial, target)
        faults.at(f"renamed {target.name}")
    except OSError:
        if os.path.lexists(partial) or _sizes(target) != before:
            raise
    _flush_directory(target.parent)
    if os.path.lexists(partial) or _sizes(target) != before:
        raise OSError(errno.EIO, "the disk lost its rename: what is there is not what was written")


def _sizes(path: Path) -> dict[str, int]:
    """The bytes of each file at `path`, or in it."""
    files = [each for each in (path, *path.rglob("*")) if each.is_file()]
    return {str(each.relative_to(path)): each.stat().st_size for each in files}


def digest(file: Path) -> str:
    """The SHA-256 of `file`. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(file: Path) -> None:
    """Wait until `file` is on disk. Raises OSError."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_directory(directory: Path) -> None:
    """Wait until the names in `directory` are on disk. Not every file system can do that."""
    with suppress(OSError):
        number = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
