"""From text to batches: nothing lost, nothing seen twice in an epoch, nothing made twice, nothing half written."""

import errno
import gzip
import json
import os
import time

import numpy
import pytest
import torch
from pretraining import MODEL, killed_while, micro, refused, write_corpus

from subspace_optim.pretrain import data, sources, tokenizer
from subspace_optim.pretrain.config import UserError, resolve
from subspace_optim.pretrain.files import new_directory, write_text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBSPACE_OPTIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_for(*paths, **more):
    return resolve(
        {"data": tuple(map(str, paths)), "vocab_size": 400, "seq_len": 16, "hidden": 32, "intermediate": 48, **more}
    )


def quiet(line):
    pass


def texts(source):
    """Each split's documents, put together from their pieces."""
    found, parts = {False: [], True: []}, {False: "", True: ""}
    for piece in source.pieces():
        parts[piece.held_out] += piece.text
        if piece.ends_document:
            found[piece.held_out].append(parts[piece.held_out])
            parts[piece.held_out] = ""
    assert parts == {False: "", True: ""}
    return found


def tokens_of(corpus, split):
    return numpy.fromfile(corpus.folder / f"{split}.bin", numpy.uint16 if corpus.itemsize == 2 else numpy.uint32)


@pytest.mark.parametrize("length", [*range(1, 40), 255, 256, 257, 1000])
def test_shuffled_is_a_permutation(length):
    for key in (0, 1, 2**63):
        assert sorted(data.shuffled(index, length, key) for index in range(length)) == list(range(length))


def test_shuffled_leaves_no_order():
    order = torch.tensor([data.shuffled(index, 5000, 7) for index in range(5000)], dtype=torch.float64)
    place = torch.arange(5000, dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([order, place]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([order[:-1], order[1:]]))[0, 1]) < 0.05


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (7, 7), (5, 8), (64, 16), (1, 2)])
def test_every_epoch_reads_every_window_once(tmp_path, count, batch_size):
    numpy.arange(count * 4 + 1, dtype=numpy.uint16).tofile(tmp_path / "t.bin")
    batches = data.Batches(data.Windows(tmp_path / "t.bin", numpy.uint16, 4, 2**16), batch_size, seed=3)
    seen = [index for _ in range(3 * count) for index in batches.next_indices()]
    epochs = [seen[start : start + count] for start in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 7:
        assert epochs[0] != epochs[1] != epochs[2]


def test_position_resumes_exactly_and_the_seed_decides(tmp_path):
    numpy.arange(401, dtype=numpy.uint16).tofile(tmp_path / "t.bin")
    windows = data.Windows(tmp_path / "t.bin", numpy.uint16, 4, 2**16)
    one, other = data.Batches(windows, 7, seed=1), data.Batches(windows, 7, seed=1)
    for _ in range(31):
        one.next()
    other.epoch, other.cursor = one.epoch, one.cursor
    assert one.epoch == 2
    assert torch.equal(one.next(), other.next())
    assert data.Batches(windows, 50, seed=1).next_indices() != data.Batches(windows, 50, seed=2).next_indices()


def test_windows_predict_each_token_once(tmp_path):
    stream = numpy.random.default_rng(0).integers(0, 60_000, 1000).astype(numpy.uint16)
    stream.tofile(tmp_path / "t.bin")
    windows = data.Windows(tmp_path / "t.bin", numpy.uint16, 9, 2**16)
    rows = windows.read(range(len(windows)))
    assert len(windows) == 111 and rows.dtype == torch.int64
    assert rows[:, 1:].flatten().tolist() == stream[1:].tolist()
    assert rows[:, :-1].flatten().tolist() == stream[:-1].tolist()


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (45, 5), (10**9, 111)])
def test_held_out_windows_are_spread_and_distinct(tmp_path, tokens, expected):
    numpy.zeros(1000, numpy.uint16).tofile(tmp_path / "t.bin")
    chosen = data.Windows(tmp_path / "t.bin", numpy.uint16, 9, 2**16).spread(tokens)
    assert len(chosen) == expected == len(set(chosen)) and max(chosen) < 111
    if expected == 5:
        assert numpy.diff(chosen).min() >= 22


def test_tokens_that_do_not_exist_are_refused(tmp_path):
    """A cache that was damaged within: an embedding on a GPU would end the process on such a number, without a word."""
    numpy.arange(40, dtype=numpy.uint16).tofile(tmp_path / "t.bin")
    windows = data.Windows(tmp_path / "t.bin", numpy.uint16, 9, 30)
    assert windows.read([0, 1]).max() == 18
    with pytest.raises(UserError, match=r"t.bin: is damaged: it holds token 36 and the vocabulary ends at 29; remove "):
        windows.read([0, 3])


def test_tokens_hold_the_text_and_nothing_else(tmp_path, cache):
    corpus = data.prepare(config_for(write_corpus(tmp_path / "email")), quiet)
    source = sources.open_source((str(tmp_path / "email"),), "text")
    encoder = tokenizer.load_tokenizer("bpe", source, 400, cache, quiet)
    for held_out, split in enumerate(data.SPLITS):
        stream = tokens_of(corpus, split).tolist()
        documents, document = [], []
        for token in stream:
            if token == corpus.end_id:
                documents.append(encoder._backend.decode(document))
                document = []
            else:
                document.append(token)
        assert document == []
        assert documents == texts(source)[bool(held_out)]
        assert corpus.tokens[split] == len(stream) > 500


def test_files_are_split_by_name_and_stay_where_they_are(tmp_path):
    folder = write_corpus(tmp_path / "email")
    held_out = set(sources.open_source((str(folder),), "text")._held_out)
    names = {path.name for path in folder.rglob("*.py")}
    assert held_out and len(held_out) < len(names) / 3
    expected = {name for name in names if sources.fraction(name) < sources.HELD_OUT}
    assert held_out == (expected or {min(names, key=sources.fraction)})
    (folder / "zz_new.py").write_text("x = 1\n")
    again = set(sources.open_source((str(folder),), "text")._held_out)
    assert again - {"zz_new.py"} <= held_out


def test_few_files_hold_out_their_last_part(tmp_path):
    text = "".join(f"line {number} of a long file\n" for number in range(20_000))
    (tmp_path / "one.txt").write_text(text)
    found = texts(sources.open_source((str(tmp_path / "one.txt"),), "text"))
    assert found[False][0] + found[True][0] == text
    assert 0.045 < len(found[True][0]) / len(text) < 0.055
    assert found[True][0].startswith("line ")


def test_a_file_larger_than_a_piece_comes_in_pieces_with_every_character_whole(tmp_path):
    text = "ü€𝄞" * 400_000  # one line of 3.6 MB, whose characters straddle every boundary
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    pieces = list(sources.open_source((str(tmp_path / "one.txt"),), "text").pieces())
    assert "".join(piece.text for piece in pieces).count("�") <= 2  # where the held-out part begins
    longest = max(len(piece.text.encode()) for piece in pieces)
    assert longest <= 2 * sources._PIECE + 4
    assert len(pieces) > 3
    held_out = sum(len(piece.text) for piece in pieces if piece.held_out)
    assert 0.02 < held_out / len(text) < 0.06


def test_jsonl_is_split_by_line(tmp_path):
    rows = [{"body": f"document {number}\nwith two lines"} for number in range(400)]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    for name in ("a.jsonl", "b.jsonl.gz"):
        found = texts(sources.open_source((str(tmp_path / name),), "body"))
        assert sorted(found[False] + found[True]) == sorted(row["body"] for row in rows)
        assert 5 <= len(found[True]) <= 40


def test_the_standard_library_is_the_default_corpus():
    source = sources.open_source((), "text")
    names = [file.name for file in source.files]
    assert len(names) > 300 and "argparse.py" in names and "email/message.py" in names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    held_out = sum(file.path.stat().st_size for file in source.files if file.name in source._held_out)
    assert 0.01 < held_out / sum(file.path.stat().st_size for file in source.files) < 0.12


def test_a_prepared_corpus_is_used_again(tmp_path, cache, monkeypatch):
    config = config_for(write_corpus(tmp_path / "email"))
    first = data.prepare(config, quiet)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}

    def never(*arguments):
        raise AssertionError("made twice")

    monkeypatch.setattr(tokenizer, "train_bpe", never)
    monkeypatch.setattr(data, "_write_tokens", never)
    assert data.prepare(config, quiet) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == written
    with pytest.raises(AssertionError, match="made twice"):
        data.prepare(config_for(tmp_path / "email", vocab_size=401), quiet)
    with (tmp_path / "email" / "message.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(AssertionError, match="made twice"):
        data.prepare(config, quiet)


@pytest.mark.parametrize("damage", ["truncate", "remove", "garble", "shape", "tokenizer"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, damage):
    config = config_for(write_corpus(tmp_path / "email"))
    first = data.prepare(config, quiet)
    before = tokens_of(first, "train").tolist()
    if damage == "truncate":
        os.truncate(first.folder / "train.bin", 100)
    elif damage == "remove":
        (first.folder / "validation.bin").unlink()
    elif damage == "garble":
        (first.folder / "corpus.json").write_text("{")
    elif damage == "shape":
        facts = {"vocab_size": 400, "end_id": 0, "itemsize": 2, "tokens": {"train": 3}}
        (first.folder / "corpus.json").write_text(json.dumps(facts))
    else:
        next(cache.glob("bpe-*.json")).write_text("{")
    again = data.prepare(config, quiet)
    assert again == first and tokens_of(again, "train").tolist() == before


def test_a_vocabulary_beyond_16_bits_is_kept_whole(tmp_path, cache):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": 0} | {f"w{number}": number + 1 for number in range(70_000)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "one.txt").write_text("".join(f"w{number * 7 % 70_000}\n" for number in range(70_000)))
    corpus = data.prepare(config_for(tmp_path / "one.txt", tokenizer=str(tmp_path / "tokenizer.json")), quiet)
    assert corpus.itemsize == 4 and corpus.vocab_size == 70_001
    read = corpus.windows("train", 16).read([0, 1]).flatten().tolist()
    assert read[:16] == [number * 7 % 70_000 + 1 for number in range(16)]
    assert tokens_of(corpus, "train").max() > 1 << 16


def test_a_tokenizer_of_transformers_is_read_from_its_folder(tmp_path, cache):
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.train_bpe(iter(["some text to train on " * 50]), 300)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(tmp_path / "mine")
    loaded = tokenizer.load_tokenizer(str(tmp_path / "mine"), None, 0, cache, quiet)
    assert loaded.end_id == 0 and loaded.size == backend.get_vocab_size()
    assert loaded.encode(["some text"]) == [backend.encode("some text").ids]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ("--data", "no such file or folder")),
        (lambda path: path.mkdir(), ("--data", "holds no UTF-8 text")),
        (lambda path: path.write_bytes(b"\x89PNG\0\0\xff"), ("--data", "not UTF-8 text")),
        (lambda path: path.write_bytes("caf\xe9 ".encode("latin-1") * 9), ("--data", "not UTF-8 text")),
        (lambda path: path.write_text("three words only"), ("--seq-len 16", "more --data")),
        (lambda path: path.write_text(""), ("--data", "no text to train on")),
    ],
    ids=["missing", "empty folder", "binary", "latin-1", "too short", "empty file"],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, cache, capsys, make, words):
    make(tmp_path / "text")
    refused(capsys, micro(tmp_path / "text", tmp_path / "out"), *words)
    assert not list(tmp_path.glob("out/checkpoints/*"))


def test_a_compressed_file_holds_out_its_last_part(tmp_path):
    text = "".join(f"line {number}\n" for number in range(2000))
    with gzip.open(tmp_path / "one.txt.gz", "wt") as file:
        file.write(text)
    found = texts(sources.open_source((str(tmp_path / "one.txt.gz"),), "text"))
    assert found[False][0] + found[True][0] == text
    assert 0.045 < len(found[True][0]) / len(text) < 0.055


def test_half_a_character_and_a_name_that_is_not_utf_8_are_no_reason_to_stop(tmp_path, cache):
    """JSON may hold half of a surrogate pair, and a file system any bytes."""
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "w") as file:
        file.write('{"text": "some words \\ud800 and more"}\n' * 300)
    corpus = data.prepare(config_for(tmp_path), quiet)
    assert corpus.tokens["train"] > 1000


def test_what_cannot_be_read_is_not_left_out(tmp_path, cache, capsys, monkeypatch):
    """A folder within the corpus, and compressed bytes that are none."""
    folder = write_corpus(tmp_path / "email")
    scan = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("mime"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(capsys, micro(folder, tmp_path / "out"), f"--data {folder / 'mime'}: cannot be read (Permission denied)")
    broken = bytearray(gzip.compress(b"".join(b"line %d\n" % number for number in range(20_000))))
    broken[len(broken) // 2 :] = b"\xff" * (len(broken) // 2)
    (tmp_path / "one.txt.gz").write_bytes(broken)
    refused(capsys, micro(tmp_path / "one.txt.gz", tmp_path / "out"), "one.txt.gz: cannot be read")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"content": "x"}', ("--text-key text", "line 3", "content")),
        ("[1]", ("--text-key text", "line 3")),
        ("{", ("--data", "line 3", "is not JSON")),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, cache, capsys, line, words):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n' + line + "\n")
    refused(capsys, micro(tmp_path / "a.jsonl", tmp_path / "out"), *words)


def test_a_batch_larger_than_the_data_is_refused(tmp_path, cache, capsys):
    corpus = write_corpus(tmp_path / "email")
    refused(capsys, micro(corpus, tmp_path / "out", "--batch-size", 10**6), "--batch-size 1000000", "smaller")


def test_a_bad_tokenizer_is_refused(tmp_path, cache, capsys):
    corpus = write_corpus(tmp_path / "email")
    (tmp_path / "bad.json").write_text("{}")
    refused(capsys, micro(corpus, tmp_path / "out", "--tokenizer", tmp_path / "bad.json"), "--tokenizer", "bad.json")


def test_a_dataset_streams_through_datasets(tmp_path, cache):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"text": f"row {number} holds a few words of its own, such as {number * 7919}"} for number in range(500)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = data.prepare(config_for(f"hf:{folder}", steps=20, batch_size=4, eval_tokens=64), quiet)
    assert corpus.tokens == {"train": 20 * 4 * 16 + 1, "validation": 65}


def test_no_network_is_said_at_once(tmp_path, cache, capsys, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    begin = time.monotonic()
    arguments = ["pretrain", "--data", "hf:allenai/c4:en", "--out", str(tmp_path / "out"), *MODEL]
    refused(capsys, arguments, "--data hf:allenai/c4:en", "127.0.0.1", "--data PATH")
    assert time.monotonic() - begin < 20


_WRITER = """
    for number in itertools.count(time.monotonic_ns()):
        write_text(folder / "one.json", str(number) * 10_000 + "end")
        with new_directory(folder / f"many-{number}") as partial:
            for name in "abc":
                (partial / name).write_bytes(b"x" * 300_000)
"""


def test_a_kill_at_any_instant_leaves_whole_files(tmp_path):
    killed_while(_WRITER, tmp_path, tuple(0.05 + 0.0037 * number for number in range(20)))
    assert (tmp_path / "one.json").read_text().endswith("end")
    folders = list(tmp_path.glob("many-*"))
    assert len(folders) > 20
    for folder in folders:
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == dict.fromkeys("abc", 300_000)
    write_text(tmp_path / "last.json", "x")
    with new_directory(tmp_path / "last"):
        pass
    assert not list(tmp_path.glob(".partial-*")), "what the killed left behind is swept away"


def test_two_that_make_the_same_folder_both_succeed(tmp_path):
    with new_directory(tmp_path / "target") as ours:
        (ours / "a").write_text("ours")
        with new_directory(tmp_path / "target") as theirs:
            (theirs / "a").write_text("theirs")
    assert (tmp_path / "target" / "a").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def fail():
        with new_directory(tmp_path / "target") as partial:
            (partial / "a").write_text("x")
            raise UserError("no")

    with pytest.raises(UserError):
        fail()
    assert list(tmp_path.iterdir()) == []
