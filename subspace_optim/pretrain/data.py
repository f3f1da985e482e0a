"""From a corpus to batches: a token stream on disk, cached and mapped into memory, read in shuffled windows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from subspace_optim.pretrain.config import RunConfig, UserError, cache_root
from subspace_optim.pretrain.display import count
from subspace_optim.pretrain.files import new_directory, storage_errors
from subspace_optim.pretrain.sources import HubSource, Piece, open_source
from subspace_optim.pretrain.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenised corpus on disk."""

    folder: Path
    key: str
    vocab_size: int
    end_id: int
    itemsize: int
    tokens: dict[str, int]

    def windows(self, split: str, seq_len: int) -> Windows:
        """The windows of one split.

        Args:
            split: "train" or "validation".
            seq_len: Tokens that each window predicts.
        """
        dtype = numpy.uint16 if self.itemsize == 2 else numpy.uint32
        return Windows(self.folder / f"{split}.bin", dtype, seq_len, self.vocab_size)


def prepare(config: RunConfig, say: Callable[[str], None]) -> Corpus:
    """Tokenise the corpus of a run, or find it in the cache.

    Args:
        config: The run; a dataset of the hub is read as far as its steps need.
        say: Told what is going on.

    Raises:
        UserError: The corpus cannot be read or is too small for the run, or the cache cannot be written.
    """
    cache = cache_root()
    source = open_source(config.data, config.text_key)
    tokenizer = load_tokenizer(config.tokenizer, source, config.vocab_size, cache, say)
    limits = dict.fromkeys(SPLITS, 0)
    if isinstance(source, HubSource):
        limits = {"train": config.steps * config.tokens_per_step + 1, "validation": config.eval_tokens + 1}
    identity = f"tokens 1 {source.identity} {tokenizer.identity} {tokenizer.end_id} {sorted(limits.items())}"
    key = blake2b(identity.encode(), digest_size=16).hexdigest()
    folder = cache / f"tokens-{key}"
    corpus = _cached(folder, key)
    if corpus is None:
        say(f"tokenising the corpus (once; then cached in {cache})")
        with storage_errors("the cache", cache, "free some space, or point SUBSPACE_OPTIM_CACHE elsewhere"):
            shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
            with new_directory(folder) as partial:
                _write_tokens(partial, source.pieces(), tokenizer, limits)
            corpus = _cached(folder, key)
    if corpus is None:
        raise UserError(f"the cache {folder}: was damaged while it was written; remove it and try again")
    _check_size(corpus, config)
    return corpus


def _cached(folder: Path, key: str) -> Corpus | None:
    try:
        corpus = Corpus(folder=folder, key=key, **json.loads((folder / "corpus.json").read_text(encoding="utf-8")))
        sizes = {split: (folder / f"{split}.bin").stat().st_size for split in SPLITS}
        whole = sizes == {split: corpus.tokens[split] * corpus.itemsize for split in SPLITS}
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return corpus if whole else None


def _write_tokens(folder: Path, pieces: Iterator[Piece], tokenizer: Tokenizer, limits: dict[str, int]) -> None:
    dtype = numpy.dtype(numpy.uint16 if tokenizer.size <= 1 << 16 else numpy.uint32)
    written = dict.fromkeys(SPLITS, 0)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        files: dict[str, BinaryIO] = {"train": train, "validation": validation}
        for batch in _batches_of(pieces):
            for piece, ids in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                split = SPLITS[piece.held_out]
                tokens = [*ids, tokenizer.end_id] if piece.ends_document else ids
                if limits[split]:
                    tokens = tokens[: limits[split] - written[split]]
                files[split].write(numpy.asarray(tokens, dtype).tobytes())
                written[split] += len(tokens)
            if all(limits[split] and written[split] >= limits[split] for split in SPLITS):
                break
    facts = {"vocab_size": tokenizer.size, "end_id": tokenizer.end_id, "itemsize": dtype.itemsize, "tokens": written}
    (folder / "corpus.json").write_text(json.dumps(facts), encoding="utf-8")


def _batches_of(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_size(corpus: Corpus, config: RunConfig) -> None:
    windows = {split: max(0, corpus.tokens[split] - 1) // config.seq_len for split in SPLITS}
    if not windows["train"] or not windows["validation"]:
        empty = SPLITS[bool(windows["train"])]
        raise UserError(
            f"--seq-len {config.seq_len}: the {empty} text has only {corpus.tokens[empty]} tokens; "
            "give a shorter --seq-len or more --data"
        )
    wanted = config.batch_size * config.accumulate
    if wanted > windows["train"]:
        raise UserError(
            f"--batch-size {config.batch_size}: one update takes {wanted} windows of {config.seq_len} tokens and the "
            f"training text has {windows['train']} ({count(corpus.tokens['train'])} tokens); "
            "give a smaller --batch-size, --accumulate or --seq-len, or more --data"
        )


class Windows:
    """Windows of equal length over a token stream that is mapped, not read, into memory.

    Each window holds one token more than it predicts, so that every token of the stream but the first is predicted
    exactly once.
    """

    def __init__(self, path: Path, dtype: type[numpy.unsignedinteger], seq_len: int, vocab_size: int) -> None:
        self._path = path
        self._tokens = numpy.memmap(path, dtype, mode="r")
        self._vocab_size = vocab_size
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.seq_len

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The windows with these numbers.

        Args:
            indices: Numbers of windows.

        Returns:
            Token ids, one row of ``seq_len + 1`` per window.

        Raises:
            UserError: The file does not hold what was written.
        """
        starts = [index * self.seq_len for index in indices]
        rows = numpy.stack([self._tokens[start : start + self.seq_len + 1] for start in starts])
        if rows.max() >= self._vocab_size:  # an embedding would end the process, on a GPU without a word
            raise UserError(
                f"the cache {self._path}: is damaged: it holds token {rows.max()} and the vocabulary ends at "
                f"{self._vocab_size - 1}; remove {self._path.parent}, and it is made anew"
            )
        return torch.from_numpy(rows.astype(numpy.int64))

    def spread(self, tokens: int) -> list[int]:
        """Numbers of windows that lie evenly over the stream and hold about so many tokens.

        Args:
            tokens: How many are wanted; all there are if that is less.
        """
        wanted = min(len(self), max(1, tokens // self.seq_len))
        return [index * len(self) // wanted for index in range(wanted)]


class Batches:
    """Windows in an order that is shuffled anew each epoch and depends on the seed alone.

    The position is the pair (epoch, cursor): the order is computed, not drawn, so a resumed run goes on exactly where
    the first one stopped, and no permutation of a large corpus is kept in memory.
    """

    def __init__(self, windows: Windows, batch_size: int, seed: int) -> None:
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 0
        self.cursor = 0

    def next_indices(self) -> list[int]:
        """Numbers of the windows of the next batch; a batch may end one epoch and begin the next."""
        indices = []
        for _ in range(self._batch_size):
            indices.append(shuffled(self.cursor, len(self._windows), mix(self._seed, self.epoch)))
            self.cursor += 1
            if self.cursor == len(self._windows):
                self.epoch, self.cursor = self.epoch + 1, 0
        return indices

    def next(self) -> torch.Tensor:
        """The next batch of windows."""
        return self._windows.read(self.next_indices())


def mix(value: int, key: int) -> int:
    """Scramble a number under a key to 64 bits (splitmix64)."""
    word = (value + (key + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return word ^ word >> 31


def shuffled(index: int, length: int, key: int) -> int:
    """Where ``index`` goes in the permutation of ``range(length)`` that belongs to a key.

    A Feistel network permutes the next power of four; numbers that fall outside the range walk on until they are in.

    Args:
        index: A number in ``range(length)``.
        length: How many numbers are permuted.
        key: Which permutation.
    """
    half = max(1, (length.bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (mix(right, key + turn) & mask)
        index = left << half | right
        if index < length:
            return index
