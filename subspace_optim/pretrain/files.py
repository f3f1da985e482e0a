"""Writing files so that a kill at any instant leaves either the old one or the new one, never half of one."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from subspace_optim.pretrain.config import UserError

_MARK = (
    f".partial-{platform.node()}-"  # a shared disk may hold the work of other machines, whose processes we cannot see
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Fill a hidden directory beside ``target``, then give it its name in one move.

    If another process finished the same target first, theirs stays and ours is dropped.

    Args:
        target: The directory to be.

    Yields:
        The directory to write in. Nothing is left of it if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    partial = _partial(target)
    partial.mkdir()
    try:
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a whole text file in one move.

    Args:
        target: The file to be; replaced if it is there.
        text: Its contents.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    sync(target.parent)


def claim(folder: Path) -> TextIO | None:
    """Keep other processes out of a folder until this file is closed, or the process ends in whatever way.

    A file system that has no locks keeps nobody out.

    Args:
        folder: The directory, made if it is not there.

    Returns:
        The file that holds the lock; None where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks
        pass
    return file


def sweep(directory: Path) -> None:
    """Remove what killed processes left half written.

    Args:
        directory: Where to look; leftovers of processes that still run are kept.
    """
    for path in directory.glob(f"{_MARK}*"):
        owner = path.name.removeprefix(_MARK).partition("-")[0]
        if owner.isdigit() and not _runs(int(owner)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    return target.parent / f"{_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def no_room(error: BaseException | None) -> bool:
    """Whether an error says that the disk, the quota or the file size limit is used up.

    Args:
        error: What was raised; its causes are looked at too, as libraries wrap them.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def storage_errors(what: str, path: Path, mend: str) -> Iterator[None]:
    """Turn the system's refusals to write into one clear line.

    Args:
        what: The option or thing that is being written.
        path: Where.
        mend: What the person can do.

    Raises:
        UserError: The disk is full or the path cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if no_room(error):
            free = shutil.disk_usage(_existing(path)).free
            raise UserError(f"{what} {path}: no room to write ({free / 2**20:.0f} MiB free); {mend}") from error
        if isinstance(error, OSError):
            raise UserError(f"{what} {path}: cannot be written ({error.strerror or error}); {mend}") from error
        raise


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
