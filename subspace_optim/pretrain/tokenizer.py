"""From text to token ids: a byte-level BPE trained on the corpus and cached, or any tokenizer by name or path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from subspace_optim.pretrain.config import UserError
from subspace_optim.pretrain.files import storage_errors, write_text
from subspace_optim.pretrain.sources import Source, hub_trouble

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END = "<|endoftext|>"
_END_NAMES = (END, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_TRAINING_CHARACTERS = 64 << 20


class Tokenizer:
    """A fast tokenizer, the id that ends a document, and a fingerprint for the cache."""

    def __init__(self, backend: Backend, end_id: int) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.end_id = end_id
        self.size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self.identity = blake2b(backend.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with nothing added.

        Args:
            texts: Any strings; the work is spread over the cores.
        """
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def load_tokenizer(name: str, source: Source, vocab_size: int, cache: Path, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names.

    Args:
        name: ``bpe`` to train one on the corpus, a ``tokenizer.json``, a folder, or a name on the Hugging Face hub.
        source: The corpus that a BPE is trained on.
        vocab_size: Size of a BPE that is trained.
        cache: Where trained ones are kept.
        say: Told what is going on.

    Raises:
        UserError: The tokenizer cannot be loaded or has no token that ends a document.
    """
    if name == "bpe":
        return _trained(source, vocab_size, cache, say)
    import tokenizers

    try:
        path = Path(name).expanduser()
        if path.is_file():
            backend = tokenizers.Tokenizer.from_file(str(path))
            end_id = _end_id(backend)
        else:
            from transformers import AutoTokenizer

            trouble = None if path.is_dir() else hub_trouble()
            # Without a network a tokenizer that was downloaded before is still good.
            loaded = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name, local_files_only=bool(trouble))
            backend, end_id = loaded.backend_tokenizer, loaded.eos_token_id
    except Exception as error:  # the libraries raise anything from OSError to a bare Exception here
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--tokenizer {name}: cannot be loaded ({reason}); give bpe, a tokenizer.json, a folder or a name"
        ) from error
    if end_id is None:
        raise UserError(f"--tokenizer {name}: has no token that ends a text (one of {', '.join(_END_NAMES)})")
    return Tokenizer(backend, end_id)


def _end_id(backend: Backend) -> int | None:
    found = (backend.token_to_id(name) for name in _END_NAMES)
    return next((token for token in found if token is not None), None)


def _trained(source: Source, vocab_size: int, cache: Path, say: Callable[[str], None]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    key = blake2b(f"bpe 1 {source.identity} {vocab_size}".encode(), digest_size=16).hexdigest()
    path = cache / f"bpe-{key}.json"
    if path.exists():
        try:
            return Tokenizer(Backend.from_file(str(path)), 0)
        except Exception:  # what tokenizers raises for a damaged file; it is made again below
            say(f"the cached tokenizer {path} is damaged; training it again")
    say(f"training a BPE of {vocab_size} tokens on the corpus (once; then cached in {cache})")
    backend = train_bpe(_training_text(source), vocab_size)
    with storage_errors("the cache", cache, "free some space, or point SUBSPACE_OPTIM_CACHE elsewhere"):
        write_text(path, backend.to_str())
    return Tokenizer(backend, 0)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Backend:
    """Train a byte-level BPE; the token that ends a document has id 0.

    Args:
        texts: What to train on.
        vocab_size: Tokens to end up with; fewer if the text does not hold that many pairs.

    Raises:
        UserError: There is no text.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    first = next(texts, None)
    if first is None:
        raise UserError("--data: holds no text to train on")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(chain([first], texts), trainer)
    return backend


def _training_text(source: Source) -> Iterator[str]:
    left = _TRAINING_CHARACTERS
    for piece in source.pieces():
        if piece.held_out or not piece.text:
            continue
        yield piece.text
        left -= len(piece.text)
        if left <= 0:
            return
