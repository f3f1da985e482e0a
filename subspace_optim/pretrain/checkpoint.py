"""Checkpoints: written whole or not at all, checked before they are trusted, the last few kept."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from subspace_optim.pretrain.config import UserError
from subspace_optim.pretrain.files import new_directory, storage_errors

FOLDER = "checkpoints"
_PREFIX = "step-"
_BLOCK = 1 << 24


class _Checksummed(io.RawIOBase):
    """A file that knows the checksum of what went into it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.crc32 = 0
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._file.write(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()
        super().close()


def save(run: Path, step: int, state: dict[str, Any], facts: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, then drop the oldest ones, and any of later steps that the run was taken back behind.

    Args:
        run: The directory of the run.
        step: Steps done, which names the checkpoint.
        state: What ``torch.load`` will give back: tensors, numbers, strings, and dicts and lists of them.
        facts: What can be read without torch: the options and the corpus.
        keep: How many checkpoints stay.

    Returns:
        The checkpoint.

    Raises:
        UserError: The disk is full or cannot be written; earlier checkpoints are untouched.
    """
    target = run / FOLDER / f"{_PREFIX}{step:08d}"
    with storage_errors("--out", run, "free some space or lower --keep; earlier checkpoints are safe"):
        if target.exists():
            shutil.rmtree(target)
        with new_directory(target) as partial:
            file = _Checksummed(partial / "state.pt")
            try:
                torch.save(state, cast(IO[bytes], file))
                file.flush()
            finally:
                file.close()
            meta = {"step": step, "crc32": file.crc32, "bytes": file.bytes, **facts}
            (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        past = [path for path in checkpoints(run) if step_of(path) <= step]
        for path in checkpoints(run):
            if path not in past[:keep]:
                shutil.rmtree(path, ignore_errors=True)
    return target


def checkpoints(run: Path) -> Iterator[Path]:
    """The checkpoints of a run, newest first; a folder that a person has named is none.

    Args:
        run: The directory of the run.
    """
    yield from sorted((path for path in (run / FOLDER).glob(f"{_PREFIX}*") if _digits(path).isdecimal()), reverse=True)


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint, by its name; 0 where that does not tell."""
    digits = _digits(checkpoint)
    return int(digits) if digits.isdecimal() else 0


def _digits(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(_PREFIX)


def facts_of(checkpoint: Path) -> dict[str, Any] | None:
    """What was saved beside a checkpoint, or None where it cannot be read.

    Args:
        checkpoint: The directory of the checkpoint.
    """
    try:
        facts = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def load(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint after checking that every byte is as it was written.

    Args:
        checkpoint: The directory of the checkpoint.

    Returns:
        The state and the facts that were saved.

    Raises:
        UserError: It is damaged.
    """
    try:
        facts = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
        path = checkpoint / "state.pt"
        crc32 = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                crc32 = zlib.crc32(block, crc32)
        if path.stat().st_size != facts["bytes"] or crc32 != facts["crc32"]:
            raise UserError(f"{path}: is not as it was written (truncated or changed)")
        return torch.load(path, map_location="cpu"), facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint}: cannot be read ({error})") from error


def load_newest(named: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The newest good checkpoint of a run, or the one that was named.

    Args:
        named: The directory of a run, or of one checkpoint in it.
        warn: Told of each damaged checkpoint that is passed over.

    Returns:
        The checkpoint, its state and its facts.

    Raises:
        UserError: There is none, or none is good.
    """
    if (named / "meta.json").exists() or named.name.startswith(_PREFIX):
        chosen = named.resolve()
        if chosen.parent.name != FOLDER:
            raise UserError(
                f"--resume {named}: is a checkpoint outside of a run; put it into RUN/{FOLDER}, where it goes on"
            )
        try:
            return chosen, *load(chosen)
        except UserError as error:
            raise UserError(f"{error}; {way_on(chosen)}") from error
    found = list(checkpoints(named))
    if not found:
        raise UserError(f"--resume {named}: holds no checkpoint; leave --resume out to start a run")
    for checkpoint in found:
        loaded = _load_or_warn(checkpoint, warn)
        if loaded is not None:
            return checkpoint, *loaded
    raise UserError(f"--resume {named}: none of its {len(found)} checkpoints can be read; start again with --overwrite")


def way_on(checkpoint: Path) -> str:
    """What a person can do where a checkpoint is of no use.

    Args:
        checkpoint: The directory of the checkpoint.
    """
    older = next((path for path in checkpoints(checkpoint.parent.parent) if path.name < checkpoint.name), None)
    if older is None:
        return "start again with --overwrite"
    return f"go on from the one before it by --resume {shlex.quote(str(older))}"


def _load_or_warn(checkpoint: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    try:
        return load(checkpoint)
    except UserError as error:
        warn(f"{error}; falling back to the checkpoint before it")
        return None
