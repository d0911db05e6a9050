"""A file is there completely, or as it was; and who cannot write says which file, how much of it, and what is free."""

import errno
import os
import pickle
import re
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.runtime import faults
from harness.runtime.files import NotWritten, create, folder, move, part_of, put, sweep, whole, writing


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, int], None]], None]:
    """A function that opens the door for one test."""
    return lambda act: monkeypatch.setattr(faults, "inject", act)


def limited(act: Callable[[], object], nbytes: int = 1000) -> str:
    """What `act` says in a process that can write no file of more than `nbytes`."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        said = "it could be written"
        try:
            act()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    put(file, "first\n")
    put(file, "zweite \N{LATIN SMALL LETTER U WITH DIAERESIS}\n")
    assert file.read_text(encoding="utf-8") == "zweite \N{LATIN SMALL LETTER U WITH DIAERESIS}\n"
    assert [*tmp_path.iterdir()] == [file]


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    put(file, "first")
    with pytest.raises(KeyError), whole(file) as partial:  # noqa: PT012
        partial.write_text("half")
        raise KeyError("half")
    assert file.read_text() == "first"
    assert [*tmp_path.iterdir()] == [file]


def test_where_nobody_can_write_it_is_an_oserror_with_the_file_and_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "absent" / "file.txt"
    with pytest.raises(NotWritten) as raised:
        put(file, "text")
    assert str(raised.value) == f"{file}: No such file or directory"
    assert raised.value.errno == errno.ENOENT


@pytest.mark.parametrize("write", ["text", "tensors"])
def test_a_disk_that_is_full_in_the_middle_leaves_the_old_file_and_says_the_bytes(
    tmp_path: Path, write: str
) -> None:
    file, tensors = tmp_path / "file", {"weights": torch.zeros(2000, dtype=torch.uint8)}

    def act() -> None:
        if write == "text":
            put(file, "x" * 2000)
        else:
            with whole(file, 2000) as partial:
                save_file(tensors, partial)

    put(file, "whole")
    said = limited(act)
    reason = f"{os.strerror(errno.EFBIG)}; 2,000 bytes to write, "
    assert re.fullmatch(rf"NotWritten: {re.escape(f'{file}: {reason}')}[\d,]+ free", said), said
    assert file.read_text() == "whole"
    assert [*tmp_path.iterdir()] == [file]


def test_the_error_crosses_processes(tmp_path: Path) -> None:
    with pytest.raises(NotWritten) as raised, writing(tmp_path / "file", 5):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.errno) == (str(raised.value), errno.ENOSPC)
    assert "; 5 bytes to write, " in str(again)


def test_an_error_that_is_not_the_system_s_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of luck"), writing(tmp_path / "file"):
        raise ValueError("out of luck")


def test_of_all_that_create_a_file_at_once_one_does(tmp_path: Path) -> None:
    begins, starts = os.pipe()
    children = []
    for number in range(8):
        if (child := os.fork()) == 0:
            os.close(starts)
            os.read(begins, 1)  # all begin when it closes
            try:
                create(tmp_path / "file", str(number) * 1000)
            except FileExistsError:
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(starts)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, *[1] * 7]
    assert (tmp_path / "file").read_text() == str(codes.index(0)) * 1000
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize("after", [True, False], ids=["done", "not-done"])
def test_a_link_is_what_the_disk_has_and_not_what_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """A network disk whose answer is lost asks twice, and hears that the file is there already."""
    link = os.link

    def asked_twice(source: Path, target: Path) -> None:
        if after:
            link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", asked_twice)
    if after:
        create(tmp_path / "file", "text")
        assert (tmp_path / "file").read_text() == "text"
    else:
        with pytest.raises(FileExistsError):
            create(tmp_path / "file", "text")


def test_where_there_are_no_links_a_file_is_created_once_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    create(tmp_path / "file", "first")
    with pytest.raises(FileExistsError):
        create(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_rename_that_the_disk_loses_is_noticed(
    tmp_path: Path, kind: str, inject: Callable[[Callable[[str, int], None]], None]
) -> None:
    partial, target = tmp_path / "partial", tmp_path / "target"
    if kind == "directory":
        partial.mkdir()
    (partial / "inside" if kind == "directory" else partial).write_text("text")
    inject(lambda point, number: os.rename(target, tmp_path / "lost"))
    with pytest.raises(OSError, match="the disk lost its rename"):
        move(partial, target)


def test_a_rename_that_is_done_is_done_whatever_the_disk_answers(
    tmp_path: Path, inject: Callable[[Callable[[str, int], None]], None]
) -> None:
    def stale(point: str, number: int) -> None:
        if point == "renamed file":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    inject(stale)
    put(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def killed_while_it_writes(write: Callable[[], object]) -> None:
    """Let `write` be killed at the end of its writing, in a process of its own."""
    if (child := os.fork()) == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
            write()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_process_left_half_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    killed_while_it_writes(lambda: put(tmp_path / "record.json", "text"))
    (stale,) = tmp_path.iterdir()
    directory = Path(str(stale).replace("record.json", "step-00000001"))
    directory.mkdir()
    (directory / "rank").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").touch()
    Path(str(stale).replace("record.json", "planted")).symlink_to(outside)
    mine, own = part_of(tmp_path / "record.json"), tmp_path / ".notes.partial"
    elsewhere = Path(str(stale).replace(f"@{socket.gethostname()}.", "@another-host."))
    for each in (mine, own, elsewhere):
        each.touch()
    sweep(tmp_path)
    assert {*tmp_path.iterdir()} == {mine, own, elsewhere, outside}
    assert [*outside.iterdir()] == [outside / "mine"]


def test_a_folder_is_made_once_and_is_neither_a_link_nor_a_file(tmp_path: Path) -> None:
    for _ in range(2):
        folder(tmp_path / "run/trace")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(
        NotWritten, match="link: link is a link, and a run writes nothing outside its directory"
    ):
        folder(tmp_path / "link")
    with pytest.raises(NotWritten, match="file: Not a directory"):
        folder(tmp_path / "file")
