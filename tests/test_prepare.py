"""data/prepare.py: pieces keep the tokens, a failure keeps the old folder, a download survives a bad network."""
import bz2
import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import prepare

PROSE = "".join(f"Line {i}: the hedgehog , it 's said , knows one thing — and knows it well .\n" for i in range(200))
NASTY = ("  two  spaces\n\n\nblank lines \n \n mixed \t\t tabs\r\nwindows\r\n\r\n  end  \n"
         "no-break\u00a0space\u00a0 and ideographic\u3000\u3000 spaces\u2028line separator \u0085next line\n"
         "unit\x1fseparators \x1c \x1d\x1c are no whitespace to GPT-2 \x1c\n zero\u200bwidth\u200b \ufeff mark\n"
         "it's we'll they'VE 's 'll ' s  's\n 1234 567,8 ... !!!   ??\n語 漢字。\n漢字 \u3000 é́ 👩‍👩‍👧  👧\n"
         "<|endoftext|> <|endoftext|>\n            indented = code\n\ttab\n trailing   ")


class WordTokenizer:
    """Splits as GPT-2 does and calls each word a token, so that the test needs no vocabulary."""
    name, vocab_size, unit = "gpt2", 65536, "word"
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"   # Python's \s has \x1c-\x1f besides
    word = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+"
                      fr"| ?(?:[^{space}\w]|_)+|[{space}]+(?![^{space}])|[{space}]+")

    def encode(self, text):
        return [int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") for word in self.word.findall(text)]


def gpt2_vocabulary_is_here():
    """Looks for tiktoken's two files rather than trying: without a network a try can take minutes."""
    cache = (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
             or Path(tempfile.gettempdir(), "data-gym-cache"))
    names = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    return all(Path(cache, name).is_file() for name in names)


needs_gpt2 = pytest.mark.skipif(not gpt2_vocabulary_is_here(),
                                reason="the GPT-2 vocabulary is not in TIKTOKEN_CACHE_DIR")


def tokens_of(folder, split):
    return np.fromfile(folder / f"{split}.bin", "<u2")


def contents_of(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(PROSE)
    return path


# ---------------------------------------------------------------- what a prepared folder holds

def test_the_two_splits_together_are_the_text_and_meet_at_a_line_end(book, tmp_path):
    assert prepare.main([str(book), "--out", str(tmp_path / "out"), "--valid-fraction", "0.2"]) == 0
    train, valid = (bytes(tokens_of(tmp_path / "out", split).tolist()) for split in ("train", "valid"))
    assert train + valid == PROSE.encode()
    assert train.endswith(b"\n")
    assert abs(len(valid) / len(PROSE.encode()) - 0.2) < 0.01


def test_meta_json_tells_how_the_tokens_were_made(book, tmp_path):
    out = tmp_path / "out"
    prepare.main([str(book), "--test", str(book), "--out", str(out)])
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["unit"]) == ("bytes", 256, "byte")
    assert meta["tokens"] == meta["bytes"] == {s: len(tokens_of(out, s)) for s in ("train", "valid", "test")}
    assert meta["words"]["test"] == meta["words"]["train"] + meta["words"]["valid"] == len(PROSE.split())
    assert meta["lines"]["test"] == meta["lines"]["train"] + meta["lines"]["valid"] == PROSE.count("\n")
    assert meta["sha256"]["test.bin"] == hashlib.sha256((out / "test.bin").read_bytes()).hexdigest()
    assert meta["sources"] == [{"name": "book.txt", "sha256": hashlib.sha256(PROSE.encode()).hexdigest()}] * 2


def test_the_default_folder_is_named_after_the_first_file(book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(["book.txt"]) == 0
    assert sorted(contents_of(tmp_path / "data" / "book")) == ["meta.json", "train.bin", "valid.bin"]


def test_compressed_files_are_read_one_after_another_as_one_text(tmp_path):
    parts = [PROSE[:5000].encode(), PROSE[5000:9000].encode(), PROSE[9000:].encode()]
    files = [tmp_path / "a.txt.xz", tmp_path / "b.GZ", tmp_path / "c.bz2"]
    for path, part, module in zip(files, parts, (lzma, gzip, bz2)):
        path.write_bytes(module.compress(part))
    prepare.main([*map(str, files), "--out", str(tmp_path / "out")])
    tokens = np.concatenate([tokens_of(tmp_path / "out", split) for split in ("train", "valid")])
    assert bytes(tokens.tolist()) == PROSE.encode()


def test_validation_and_test_files_become_their_own_splits(book, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("another text\n")
    prepare.main([str(book), "--valid", str(other), "--test", str(other), "--out", str(tmp_path / "out")])
    assert bytes(tokens_of(tmp_path / "out", "train").tolist()) == PROSE.encode()
    assert bytes(tokens_of(tmp_path / "out", "valid").tolist()) == b"another text\n"
    assert bytes(tokens_of(tmp_path / "out", "test").tolist()) == b"another text\n"


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path):
    text = tmp_path / "windows.txt"
    text.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    prepare.main([str(text), "--valid", str(text), "--out", str(tmp_path / "out")])
    assert bytes(tokens_of(tmp_path / "out", "train").tolist()) == b"one\r\ntwo\r\n"


def test_characters_that_straddle_two_reads_survive(book, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 7)
    assert "".join(prepare.read([prepare.text_file(book)])) == PROSE


def test_the_python_reference_needs_no_file(tmp_path):
    meta = prepare.prepare_pydoc(tmp_path)
    total = sum(meta["tokens"].values())
    assert total > 300_000
    assert 0.09 < meta["tokens"]["valid"] / total <= 0.1
    assert b"assert" in bytes(tokens_of(tmp_path, "train").tolist())


# ---------------------------------------------------------------- pieces and their order

def texts_with_awkward_whitespace():
    rng = random.Random(0)
    alphabet = "aé語1.,' '  \n\n\t\r\u00a0\u3000\u0085\x1c\x1f\u2028_s"
    return [NASTY, NASTY * 3] + ["".join(rng.choices(alphabet, k=400)) for _ in range(30)]


def assert_pieces_keep_the_tokens(tokenizer):
    n_pieces = 0
    for text in texts_with_awkward_whitespace():
        whole = tokenizer.encode(text)
        for size in (20, 33, 100):
            chunks = [text[i:i + 9] for i in range(0, len(text), 9)]
            parts = list(prepare.pieces(chunks, size))
            if any(not re.search(r"\S[ \t\r\n]", part + after[:1]) for part, after in pairwise(parts)):
                continue                           # cut in a run without a word end: promised to differ
            n_pieces += len(parts)
            assert "".join(parts) == text
            assert [token for part in parts for token in tokenizer.encode(part)] == whole
    assert n_pieces > 500


def test_tokens_of_the_pieces_are_the_tokens_of_the_whole():
    assert_pieces_keep_the_tokens(WordTokenizer())


@needs_gpt2
def test_gpt2_tokens_of_the_pieces_are_the_tokens_of_the_whole():
    assert_pieces_keep_the_tokens(prepare.load_tokenizer("gpt2"))


@pytest.mark.parametrize("run", ["a" * 1000, " " * 1000, "\n" * 1000])
def test_a_long_run_without_a_word_end_is_cut_and_not_collected(run):
    parts = list(prepare.pieces([run[i:i + 10] for i in range(0, 1000, 10)], size=50))
    assert "".join(parts) == run
    assert max(map(len, parts)) <= 60


def test_results_keep_their_order_when_later_pieces_finish_first():
    with ThreadPoolExecutor(4) as pool:
        slow_first = prepare.map_in_order(pool, lambda i: time.sleep(0.02 * (i % 3 == 0)) or i, range(30), in_flight=8)
        assert list(slow_first) == list(range(30))


def test_no_more_pieces_are_read_than_are_in_flight():
    read = []
    with ThreadPoolExecutor(2) as pool:
        results = prepare.map_in_order(pool, abs, (read.append(i) or i for i in range(100)), in_flight=4)
        for done, _ in enumerate(results):
            assert len(read) <= done + 4


# ---------------------------------------------------------------- tokenizers

def test_bytes_round_trip():
    tokenizer = prepare.load_tokenizer("bytes")
    assert tokenizer.decode_bytes(tokenizer.encode(NASTY)) == NASTY.encode()


@needs_gpt2
def test_gpt2_gives_the_published_ids_and_reads_special_tokens_as_text():
    tokenizer = prepare.load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert 50256 not in tokenizer.encode(NASTY)
    assert tokenizer.decode_bytes(tokenizer.encode(NASTY)) == NASTY.encode()


def test_an_unknown_tokenizer_is_told_the_choices(book, capsys):
    with pytest.raises(ValueError, match="choose from bytes, gpt2"):
        prepare.load_tokenizer("gpt3")
    with pytest.raises(SystemExit, match="2"):
        prepare.main([str(book), "--tokenizer", "gpt3"])
    assert "bytes" in capsys.readouterr().err


@pytest.fixture
def no_vocabulary(monkeypatch):
    def get_encoding(name):
        raise ConnectionError("Name or service not known")
    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=get_encoding))


def test_wikitext103_without_a_network_tells_of_the_vocabulary_and_the_zip_at_once(no_vocabulary, tmp_path, capsys):
    path = tmp_path / "wikitext-103-raw-v1.zip"
    for there in (False, True):
        assert prepare_wikitext103(tmp_path) == 2
        message = capsys.readouterr().err
        assert "TIKTOKEN_CACHE_DIR" in message
        assert (f"get {prepare.WIKITEXT103_MIRRORS[0]} elsewhere and put it at {path}" in message) == (not there)
        path.touch()


def test_an_unreachable_vocabulary_says_which_files_to_put_where(no_vocabulary, book, tmp_path, capsys):
    assert prepare.main([str(book), "--tokenizer", "gpt2", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for url_end in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{url_end}"
        assert f"{hashlib.sha1(url.encode()).hexdigest()} ({url_end})" in message
    assert "TIKTOKEN_CACHE_DIR" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "not a file"),
    ("empty.txt", b"", "is empty"),
    ("latin1.txt", b"a line\n" * 10 + b"caf\xe9 au lait\n", "-f latin1 -t utf-8 (as UTF-8 it breaks at byte 73)"),
    ("half.txt", b"a line\n" * 10 + "é".encode()[:1], "-f latin1 -t utf-8 (as UTF-8 it breaks at byte 70)"),
    ("xz.txt", lzma.compress(PROSE.encode()), "let its name end in .xz"),
    ("gz", gzip.compress(PROSE.encode()), "let its name end in .gz"),
    ("bz2.txt", bz2.compress(PROSE.encode()), "let its name end in .bz2"),
    ("archive.zip", b"PK\3\4\x14\0\0\0\x08\0\xff", "give the text in it"),
    ("windows.txt", PROSE.encode("utf-16"), "iconv -f utf-16 -t utf-8"),
    ("big-endian.txt", b"\xfe\xff" + PROSE.encode("utf-16-be"), "iconv -f utf-16 -t utf-8"),
    ("cut.xz", lzma.compress(PROSE.encode())[:-40], "get the file again"),
    ("wrong.xz", b"not compressed at all\n", "get the file again"),
    ("cut.gz", gzip.compress(PROSE.encode())[:-20], "get the file again"),
    ("wrong.bz2", b"not compressed at all\n", "get the file again"),
    ("one-line.txt", b"no line end", "the valid split has 0 tokens"),
])
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_a_bad_file_is_named_and_the_earlier_folder_survives(
        name, content, message, chunk, book, tmp_path, monkeypatch, capsys):
    out, bad = tmp_path / "out", tmp_path / name
    prepare.main([str(book), "--out", str(out)])
    before = contents_of(out)
    if content is not None:
        bad.write_bytes(content)
    monkeypatch.setattr(prepare, "CHUNK", chunk)
    assert prepare.main([str(bad), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert name in error or "split" in error
    assert "Traceback" not in error
    assert contents_of(out) == before


@pytest.mark.parametrize("flags, message", [
    (["pydoc", "more.txt"], "alone"),
    (["wikitext103", "--valid", "mine.txt"], "own splits"),
    (["mine.txt", "--zip", "wikitext.zip"], "wikitext103 only"),
    (["mine.txt", "--valid-fraction", "1"], "between 0 and 1"),
    (["wikitext103", "--valid-fraction", "0.1"], "leave out --valid-fraction"),
    (["mine.txt", "--valid", "mine.txt", "--valid-fraction", "0.2"], "leave out --valid-fraction"),
    (["mine.txt", "--workers", "0"], "at least 1"),
])
def test_flags_that_would_be_ignored_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("failure, code, message", [
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
    (KeyboardInterrupt(), 130, "untouched"),
])
def test_a_failure_halfway_keeps_the_earlier_folder_and_leaves_nothing_behind(
        failure, code, message, book, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    prepare.main([str(book), "--out", str(out)])
    before = contents_of(out)

    class FailsInTheValidationSplit(prepare.ByteTokenizer):
        def encode(self, text):
            if "Line 199" in text:
                raise failure
            return super().encode(text.upper())
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name: FailsInTheValidationSplit())
    assert prepare.main([str(book), "--out", str(out)]) == code
    assert message in capsys.readouterr().err
    assert contents_of(out) == before


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_leaves_nothing_behind_and_what_kill_9_left_goes_with_the_next_run(tmp_path):
    long, out, left = tmp_path / "long.txt", tmp_path / "out", set()
    long.write_text(PROSE * 2000)                  # 30 MB, which take seconds
    for number, code in (signal.SIGKILL, -9), (signal.SIGTERM, 130):
        run = subprocess.Popen([sys.executable, prepare.__file__, long, "--out", out], stderr=subprocess.DEVNULL)
        wait_for(lambda: (now := set(out.glob("*"))) and not now & left)
        left = set(out.glob("*"))
        run.send_signal(number)
        assert run.wait() == code
    assert not contents_of(out)


def test_a_second_run_in_the_same_folder_waits_for_the_first(book, tmp_path, capsys):
    out = tmp_path / "out"
    with ThreadPoolExecutor(1) as pool:
        with prepare.lock_folder(out):
            second, heard = pool.submit(prepare.main, [str(book), "--out", str(out)]), []
            wait_for(lambda: second.done() or heard.append(capsys.readouterr().err) or "waiting" in heard[-1])
            assert not second.done() and not contents_of(out)
        assert second.result() == 0


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(book, capsys):
    assert prepare.main([str(book), "--out", str(book)]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_test_split_of_an_earlier_text_does_not_stay(book, tmp_path):
    out = tmp_path / "out"
    prepare.main([str(book), "--test", str(book), "--out", str(out)])
    prepare.main([str(book), "--out", str(out)])
    assert sorted(contents_of(out)) == ["meta.json", "train.bin", "valid.bin"]


# ---------------------------------------------------------------- WikiText-103, from a server on this machine

PAGE = b"<html>Log in to this network.</html>"
SPLIT_TEXTS = {split: PROSE + f"the {split} split\n" for split in prepare.SPLITS}


def made_zip(texts=SPLIT_TEXTS):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:    # stored, so that it is long enough to be cut
        for split, text in texts.items():
            # ZipInfo has a fixed date: the clock's would make two zips differ when a second passes between them.
            archive.writestr(zipfile.ZipInfo(f"wikitext-103-raw/wiki.{split}.raw"), text)
    return data.getvalue()


class Mirror(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers["Range"], self.headers["User-Agent"]))
        content = server.files.get(self.path)
        if self.headers["Range"] and server.answer_to_range:
            content = server.answer_to_range
        if isinstance(content, str):
            content = 302, {"Location": content}, b""
        if isinstance(content, tuple):
            self.send_response(content[0])
            for header in content[1].items():
                self.send_header(*header)
            self.end_headers()
            return self.wfile.write(content[2])
        if content is None:
            return self.send_error(404)
        start = 0
        if self.headers["Range"] and server.honours_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:start + server.cuts.pop(0)] if server.cuts else content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.files, server.requests, server.cuts, server.honours_range = {"/wikitext.zip": made_zip()}, [], [], True
    server.answer_to_range = None
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(prepare, "WIKITEXT103_MIRRORS", (f"{server.address}/wikitext.zip",))
    monkeypatch.setattr(prepare, "WIKITEXT103_TEST_SHA256", hashlib.sha256(SPLIT_TEXTS["test"].encode()).hexdigest())
    monkeypatch.setattr(prepare, "WIKITEXT103_GPT2_TOKENS",
                        {split: len(WordTokenizer().encode(text)) for split, text in SPLIT_TEXTS.items()})
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name: WordTokenizer())
    yield server
    server.shutdown()
    server.server_close()


def prepare_wikitext103(out, *flags):
    return prepare.main(["wikitext103", "--out", str(out), *flags])


def part_of(mirror, out):
    return out / f"wikitext-103-raw-v1.zip.127.0.0.1-{mirror.server_port}.part"


def test_wikitext103_is_downloaded_checked_and_tokenized(mirror, tmp_path, capsys):
    assert prepare_wikitext103(tmp_path) == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["tokens"] == prepare.WIKITEXT103_GPT2_TOKENS
    assert tokens_of(tmp_path, "train").tolist() == WordTokenizer().encode(SPLIT_TEXTS["train"])
    zip_sha256 = hashlib.sha256(made_zip()).hexdigest()
    assert meta["sources"] == [{"name": "wikitext-103-raw-v1.zip", "sha256": zip_sha256}]
    assert zip_sha256 in capsys.readouterr().out
    assert not mirror.requests[0][2].startswith("Python")
    assert sorted(contents_of(tmp_path)) == ["meta.json", "test.bin", "train.bin", "valid.bin",
                                             "wikitext-103-raw-v1.zip"]


def test_a_zip_that_is_there_is_not_downloaded_again(mirror, tmp_path):
    assert prepare_wikitext103(tmp_path) == prepare_wikitext103(tmp_path) == 0
    assert len(mirror.requests) == 1


def test_a_cut_download_continues_where_it_stopped(mirror, tmp_path):
    mirror.cuts = [5000, 7000]
    assert prepare_wikitext103(tmp_path) == 0
    assert [sent_range for _, sent_range, _ in mirror.requests] == [None, "bytes=5000-", "bytes=12000-"]
    assert (tmp_path / "wikitext-103-raw-v1.zip").read_bytes() == made_zip()


def test_a_mirror_that_redirects_is_followed_with_the_range_and_the_name(mirror, tmp_path, monkeypatch):
    mirror.files["/resolve"] = f"{mirror.address}/wikitext.zip"  # as Hugging Face does, to its file servers
    monkeypatch.setattr(prepare, "WIKITEXT103_MIRRORS", (f"{mirror.address}/resolve",))
    mirror.cuts = [5000]
    assert prepare_wikitext103(tmp_path) == 0
    assert [(path, sent) for path, sent, _ in mirror.requests] == [
        ("/resolve", None), ("/wikitext.zip", None), ("/resolve", "bytes=5000-"), ("/wikitext.zip", "bytes=5000-")]
    assert {agent for *_, agent in mirror.requests} == {prepare.USER_AGENT["User-Agent"]}


def test_a_download_continues_in_the_next_run(mirror, tmp_path):
    mirror.cuts = [5000, 0]
    assert prepare_wikitext103(tmp_path) == 2
    assert prepare_wikitext103(tmp_path) == 0
    assert mirror.requests[-1][1] == "bytes=5000-"


def test_a_server_that_ignores_range_starts_the_file_again(mirror, tmp_path):
    mirror.cuts, mirror.honours_range = [5000], False
    assert prepare_wikitext103(tmp_path) == 0
    assert (tmp_path / "wikitext-103-raw-v1.zip").read_bytes() == made_zip()
    assert not list(tmp_path.glob("*.part"))


def test_a_part_longer_than_the_file_starts_again(mirror, tmp_path):
    part_of(mirror, tmp_path).write_bytes(b"x" * 1_000_000)
    assert prepare_wikitext103(tmp_path) == 0


def test_a_part_that_was_whole_already_is_used(mirror, tmp_path):
    part_of(mirror, tmp_path).write_bytes(made_zip())
    assert prepare_wikitext103(tmp_path) == 0
    assert [sent_range for _, sent_range, _ in mirror.requests] == [f"bytes={len(made_zip())}-"]


def test_a_part_of_another_version_of_the_file_starts_again(mirror, tmp_path):
    part_of(mirror, tmp_path).write_bytes(made_zip({**SPLIT_TEXTS, "train": PROSE.upper()})[:5000])
    assert prepare_wikitext103(tmp_path) == 0
    assert [sent_range for _, sent_range, _ in mirror.requests] == ["bytes=5000-", None]


@pytest.mark.parametrize("headers", [{"Content-Type": "text/html; charset=utf-8"}, {}])
@pytest.mark.parametrize("page", [PAGE, PAGE * 1000])
def test_a_login_page_in_place_of_the_rest_does_not_cost_the_part(headers, page, mirror, tmp_path, capsys):
    part = part_of(mirror, tmp_path)
    part.write_bytes(made_zip()[:20_000])
    mirror.answer_to_range = 200, headers | {"Content-Length": str(len(page))}, page
    assert prepare_wikitext103(tmp_path) == 2
    assert ("web page" if headers else "another file") in capsys.readouterr().err
    assert contents_of(tmp_path) == {part.name: made_zip()[:20_000]}
    mirror.answer_to_range = None
    assert prepare_wikitext103(tmp_path) == 0
    assert mirror.requests[-1][1] == "bytes=20000-"
    assert not list(tmp_path.glob("*.part"))


def test_a_server_that_cuts_and_refuses_to_continue_is_given_up(mirror, tmp_path):
    mirror.cuts, mirror.answer_to_range = [5000] * 9, (416, {}, b"")
    assert prepare_wikitext103(tmp_path) == 2
    assert [sent_range for _, sent_range, _ in mirror.requests] == [None, "bytes=5000-"] * 2


def test_two_downloads_to_one_place_are_one(mirror, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(prepare_wikitext103, [tmp_path] * 2)) == [0, 0]
    assert len(mirror.requests) == 1


def test_a_place_that_cannot_be_written_to_is_not_the_mirrors_fault(mirror, tmp_path, capsys):
    part_of(mirror, tmp_path).mkdir()
    assert prepare_wikitext103(tmp_path) == 2
    assert "cannot write to" in capsys.readouterr().err


def encrypted(data):
    """Says so, which is what Python looks at."""
    return data.replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1").replace(b"PK\3\4\x14\0\0", b"PK\3\4\x14\0\1")


def with_method_99(data):
    return data.replace(b"PK\1\2\x14\3\x14\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x63")


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1:]


BAD_ZIPS = {
    "another test split": (made_zip({**SPLIT_TEXTS, "test": PROSE}), "not the published one"),
    "a lacking split": (made_zip({"test": SPLIT_TEXTS["test"]}), "another archive"),
    "a damaged training split": (flipped(made_zip(), 5000), "Bad CRC-32 for file 'wikitext-103-raw/wiki.train.raw'"),
    "a damaged test split": (flipped(made_zip(), made_zip().index(b"the test split")), "is damaged"),
    "encrypted": (encrypted(made_zip()), "is encrypted"),
    "another method": (with_method_99(made_zip()), "compression"),
    "no zip": (b"not a zip", "is damaged"),
}


@pytest.mark.parametrize("bad", [
    *(pytest.param(data, id=name) for name, (data, _) in BAD_ZIPS.items()), (416, {}, b""), "http://[nowhere",
    (200, {"Content-Length": "much", "Content-Type": "text/html"}, PAGE), (206, {"Content-Length": "1, 2"}, b"zip")])
def test_the_second_mirror_serves_when_the_first_sends_anything_else(bad, mirror, tmp_path, monkeypatch):
    mirror.files["/bad"] = bad
    urls = ("http://127.0.0.1:9/refused.zip", *(f"{mirror.address}/{name}" for name in ("gone", "bad", "wikitext.zip")))
    monkeypatch.setattr(prepare, "WIKITEXT103_MIRRORS", urls)
    assert prepare_wikitext103(tmp_path) == 0
    assert [path for path, _, _ in mirror.requests] == ["/gone", "/bad", "/wikitext.zip"]
    assert (tmp_path / "wikitext-103-raw-v1.zip").read_bytes() == made_zip()


def test_without_a_network_the_message_says_which_file_to_put_where(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "WIKITEXT103_MIRRORS", ("http://127.0.0.1:9/refused.zip",))
    assert prepare_wikitext103(tmp_path) == 2
    message = capsys.readouterr().err
    assert f"put it at {tmp_path / 'wikitext-103-raw-v1.zip'}" in message
    assert "--zip FILE" in message
    (tmp_path / "wikitext-103-raw-v1.zip").write_bytes(made_zip())
    assert prepare_wikitext103(tmp_path) == 0


@pytest.mark.parametrize("data, message", [
    *BAD_ZIPS.values(), (made_zip({**SPLIT_TEXTS, "train": PROSE}), "differ from the published")])
@pytest.mark.parametrize("given", [True, False])
def test_a_bad_zip_in_place_is_refused_and_nothing_is_written(data, message, given, mirror, tmp_path, capsys):
    out = tmp_path / "out"
    path = tmp_path / "copy.zip" if given else out / "wikitext-103-raw-v1.zip"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert prepare_wikitext103(out, *(["--zip", str(path)] if given else [])) == 2
    error = capsys.readouterr().err
    assert message in error and ("give another --zip" if given else f"delete {path} and run this again") in error
    assert not out.exists() or set(contents_of(out)) <= {path.name}
    assert mirror.requests == []
