"""Where the text comes from: the standard library, the user's files, or a dataset on the Hugging Face hub."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import socket
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from subspace_optim.pretrain.config import UserError

_Bytes = BinaryIO | gzip.GzipFile

HELD_OUT = 0.05
STDLIB = "stdlib"
_PIECE = 1 << 20
_NAMES = "surrogateescape"  # of files need not be UTF-8
_HASH_WHOLE_BELOW = 64 << 20
_SPLIT_BY_FILE_FROM = 16
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one document; a document longer than a piece comes as several."""

    text: str
    held_out: bool
    ends_document: bool


class Source(Protocol):
    """A corpus that can be read from front to back, again and again, within bounded memory."""

    @property
    def identity(self) -> str:
        """A fingerprint of the text and of the way it is split."""

    def pieces(self) -> Iterator[Piece]:
        """The text in a fixed order."""


def open_source(data: tuple[str, ...], text_key: str) -> Source:
    """Find the corpus that ``--data`` names.

    Args:
        data: Paths, or one ``hf:dataset[:config[:split]]``; empty for the standard library.
        text_key: The key of the text in jsonl lines and dataset rows.

    Raises:
        UserError: Something named is missing, empty, or not text.
    """
    if any(name.startswith("hf:") for name in data):
        if len(data) > 1:
            raise UserError(f"--data {' '.join(data)}: a dataset of the hub must be named alone")
        return HubSource(data[0], text_key)
    if not data or data == (STDLIB,):
        return FileSource(standard_library(), text_key)
    return FileSource([file for name in data for file in _files_under(Path(name).expanduser())], text_key)


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, by which things are held out."""
    return int.from_bytes(blake2b(name.encode(errors=_NAMES), digest_size=8).digest(), "big") / 2**64


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of the corpus and the name it is split and ordered by."""

    path: Path
    name: str

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object with a document in it."""
        return self.name.endswith((".jsonl", ".jsonl.gz"))

    def open(self) -> _Bytes:
        """Open for reading bytes, through gzip where the name says so."""
        try:
            return gzip.open(self.path) if self.name.endswith(".gz") else self.path.open("rb")
        except OSError as error:
            raise _unreadable(error) from error

    def size(self) -> int:
        """Bytes that reading it gives."""
        if not self.name.endswith(".gz"):
            return self.path.stat().st_size
        with self.open() as handle:
            return sum(map(len, iter(lambda: handle.read(_PIECE), b"")))


def standard_library() -> list[TextFile]:
    """The Python files of the running interpreter's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        TextFile(path, path.relative_to(root).as_posix())
        for path in _walk(root, skip=_SKIPPED_FOLDERS | _TEST_FOLDERS)
        if path.suffix == ".py"
    ]
    if not files:
        raise UserError(f"--data stdlib: no Python files in {root}; name text files of your own with --data PATH")
    return files


def _unreadable(error: OSError) -> UserError:
    return UserError(f"--data {error.filename}: cannot be read ({error.strerror})")


def _refuse(error: OSError) -> None:
    raise _unreadable(error) from error


def _walk(root: Path, skip: set[str]) -> Iterator[Path]:
    for folder, below, names in os.walk(root, onerror=_refuse):
        below[:] = sorted(name for name in below if name not in skip and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _files_under(root: Path) -> list[TextFile]:
    if root.is_file():
        file = TextFile(root, root.name)
        if not _is_text(file):
            raise UserError(f"--data {root}: is not UTF-8 text; name text files, folders of them, or .jsonl files")
        return [file]
    if not root.is_dir():
        raise UserError(f"--data {root}: no such file or folder")
    found = [TextFile(path, path.relative_to(root).as_posix()) for path in _walk(root, skip=_SKIPPED_FOLDERS)]
    files = [file for file in found if file.path.is_file() and _is_text(file)]
    if not files:
        raise UserError(f"--data {root}: holds no UTF-8 text files")
    return files


def _is_text(file: TextFile) -> bool:
    with file.open() as handle:
        try:
            head = handle.read(8192)
        except (OSError, EOFError, zlib.error):
            return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


class FileSource:
    """Text and jsonl files on this machine.

    What is held out is a matter of names, never of chance: whole files where there are enough of them, otherwise the
    last part of each file; and single lines of jsonl files.
    """

    def __init__(self, files: list[TextFile], text_key: str) -> None:
        self.files = files
        self.text_key = text_key
        whole = [file.name for file in files if not file.is_jsonl]
        self._by_file = len(whole) >= _SPLIT_BY_FILE_FROM
        self._held_out = {name for name in whole if self._by_file and fraction(name) < HELD_OUT}
        if self._by_file and not self._held_out:
            self._held_out = {min(whole, key=fraction)}

    @cached_property
    def identity(self) -> str:
        """A fingerprint of names and contents; of a large file, its path, size and time of change stand for them."""
        digest = blake2b(f"{self.text_key} {HELD_OUT}".encode(), digest_size=16)
        for file in self.files:
            status = file.path.stat()
            digest.update(f"\0{file.name}\0{status.st_size}\0".encode(errors=_NAMES))
            if status.st_size < _HASH_WHOLE_BELOW:
                with file.path.open("rb") as handle:
                    digest.update(handle.read())
            else:
                digest.update(f"{file.path.resolve()}\0{status.st_mtime_ns}".encode(errors=_NAMES))
        return digest.hexdigest()

    def pieces(self) -> Iterator[Piece]:
        """The text of every file, in order of the names given."""
        for file in self.files:
            with file.open() as handle:
                try:
                    yield from self._lines(file, handle) if file.is_jsonl else self._text(file, handle)
                except (OSError, EOFError, zlib.error) as error:
                    raise UserError(f"--data {file.path}: cannot be read ({error})") from error

    def _lines(self, file: TextFile, handle: _Bytes) -> Iterator[Piece]:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"--data {file.path}: line {number} is not JSON ({error})") from error
            yield Piece(
                _text_of(row, self.text_key, f"{file.path}: line {number}"), _line_held_out(file.name, number), True
            )

    def _text(self, file: TextFile, handle: _Bytes) -> Iterator[Piece]:
        if self._by_file:
            yield from _stretch(handle, None, file.name in self._held_out)
        else:
            size = file.size()
            kept = int(size * (1 - HELD_OUT))
            yield from _stretch(handle, kept, False, to_line_end=(size - kept) // 2)
            yield from _stretch(handle, None, True)


def _line_held_out(name: str, number: int) -> bool:
    return fraction(f"{name}:{number}") < HELD_OUT


def _text_of(row: Any, key: str, where: str) -> str:
    text = row.get(key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else "none, as it is not an object"
        raise UserError(f"--text-key {key}: no text under it at {where}; the keys there are {keys}")
    return text.encode(errors="replace").decode()  # JSON can name half a character, which is none


def _stretch(handle: _Bytes, length: int | None, held_out: bool, to_line_end: int = _PIECE) -> Iterator[Piece]:
    """Read ``length`` bytes, or all the rest, in pieces; each goes on to the end of its line unless that is far off."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    done = 0
    while length is None or done < length:
        block = handle.read(_PIECE if length is None else min(_PIECE, length - done))
        if not block:
            break
        block += handle.readline(to_line_end)
        done += len(block)
        yield Piece(decoder.decode(block), held_out, False)
    if done:
        yield Piece(decoder.decode(b"", final=True), held_out, True)


class HubSource:
    """Rows of a dataset on the Hugging Face hub, streamed; nothing but what is read is downloaded."""

    def __init__(self, name: str, text_key: str) -> None:
        self.name = name
        self.text_key = text_key
        self.identity = blake2b(f"{name} {text_key} {HELD_OUT}".encode(), digest_size=16).hexdigest()
        path, _, rest = name.removeprefix("hf:").partition(":")
        config, _, split = rest.partition(":")
        self._path, self._config, self._split = path, config or None, split or "train"
        if not path:
            raise UserError(f"--data {name}: names no dataset; write it as hf:allenai/c4:en")

    def pieces(self) -> Iterator[Piece]:
        """The text of every row, in the order of the dataset; one row in twenty is held out."""
        try:
            import datasets
        except ImportError as error:
            raise UserError(f"--data {self.name}: needs datasets; pip install 'subspace-optim[hf]'") from error
        if not Path(self._path).exists() and (trouble := hub_trouble()):
            raise UserError(
                f"--data {self.name}: the hub cannot be reached ({trouble}); "
                "try again where there is a network, or name files of your own with --data PATH"
            )
        try:
            rows = datasets.load_dataset(self._path, self._config, split=self._split, streaming=True)
            for number, row in enumerate(rows):
                text = _text_of(row, self.text_key, f"{self.name}: row {number}")
                yield Piece(text, _line_held_out(self.name, number), True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"--data {self.name}: cannot be streamed from the hub ({reason}); "
                "check the name and the network, or name files of your own with --data PATH"
            ) from error


def hub_trouble() -> str | None:
    """Why the Hugging Face hub cannot be reached, or None where it can.

    Asked first because its own libraries take a minute of retries to find out.
    """
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return None  # only the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError as error:
        return f"{address.hostname}: {error.strerror or error}"
    return None
