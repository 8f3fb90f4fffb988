"""Turn text into token files for train_gpt.py.

    python data/prepare.py book.txt notes.txt.xz --tokenizer gpt2      your own text, into data/book/
    python data/prepare.py pydoc                                       the Python reference, no download
    python data/prepare.py wikitext103                                 WikiText-103, downloads 190 MB

A folder gets train.bin, valid.bin (and test.bin), which are little-endian uint16 tokens without a header, and
meta.json, which says how they were made. Several files are one text, as `cat` would join them. Text is UTF-8; a byte
order mark at the start of a file is dropped, because an editor put it there and no author wrote it. Everything is
streamed: memory does not grow with the text. Nothing is added to the text and nothing removed: no end-of-text token.
"""
import argparse
import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                # Windows: no locks
    fcntl = None

CHUNK = 1 << 20                                    # bytes read at once, and characters in a piece to tokenize
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)      # past that, Python's interpreter lock sets the pace
SPLITS = ("train", "valid", "test")
KINDS = {                                          # by how a file begins that is not UTF-8
    b"\xfd7zX": "is compressed: let its name end in .xz", b"\x1f\x8b": "is compressed: let its name end in .gz",
    b"BZh": "is compressed: let its name end in .bz2", b"PK\3\4": "is a zip or an office document: give the text in it",
    b"\xff\xfe": "is UTF-16: convert it first with iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "is UTF-16: convert it first with iconv -f utf-16 -t utf-8"}
DECOMPRESSORS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}

# Neither was tried by us; both were reported alive in mid-2026. The zip's own sha256 is not known to us, but these are:
# the published test file, and the counts of GPT-2 tokens in the whole files, no end-of-text token, no detokenizer.
WIKITEXT103_MIRRORS = (
    "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
    "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
)
WIKITEXT103_MEMBERS = {split: f"wikitext-103-raw/wiki.{split}.raw" for split in SPLITS}
WIKITEXT103_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
WIKITEXT103_GPT2_TOKENS = {"train": 117_920_140, "valid": 249_887, "test": 286_221}

USER_AGENT = {"User-Agent": "hedgehog-prepare/1.0"}   # the first mirror refuses Python's own name


class InputError(ValueError):
    """What the user gave cannot be used; the message says what to do about it."""


# ---------------------------------------------------------------- tokenizers

class ByteTokenizer:
    name, vocab_size, unit = "bytes", 256, "byte"

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, tokens):
        return bytes(tokens)


class GPT2Tokenizer:
    name, vocab_size, unit = "gpt2", 50257, "GPT-2 token"

    def __init__(self):
        try:
            # Imported here, so that bytes work without it.
            import tiktoken
            self.encoding = tiktoken.get_encoding("gpt2")
        except ImportError:
            raise InputError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from None
        except (OSError, ValueError) as error:     # no network, or what came is not the vocabulary
            raise InputError(
                "the GPT-2 vocabulary cannot be reached. On a machine with a network run\n"
                """  TIKTOKEN_CACHE_DIR=gpt2_vocabulary python -c "import tiktoken; tiktoken.get_encoding('gpt2')"\n"""
                "then copy the folder gpt2_vocabulary here and set the environment variable TIKTOKEN_CACHE_DIR to its "
                "path. It holds two files, 6d1cbeee0f20b3d9449abfede4726ed8212e3aee (vocab.bpe) and "
                f"6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 (encoder.json). The cause was: {error}") from error

    def encode(self, text):
        return self.encoding.encode_ordinary(text)     # "<|endoftext|>" in a text is text

    def decode_bytes(self, tokens):
        return self.encoding.decode_bytes(tokens)


TOKENIZERS = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}


def load_tokenizer(name):
    if name not in TOKENIZERS:
        raise InputError(f"unknown tokenizer {name!r}: choose from {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


# ---------------------------------------------------------------- text, as a stream

@dataclass(frozen=True)
class Text:
    name: str                                      # for messages
    open: Callable[[], BinaryIO]                   # called twice: once to check and measure, once to tokenize


def text_file(path):
    return Text(str(path), partial(DECOMPRESSORS.get(path.suffix.lower(), open), path, "rb"))


def read(texts):
    """Yield the characters of all texts, about a megabyte at a time."""
    for text in texts:
        decoder, offset, head = codecs.getincrementaldecoder("utf-8")(), 0, b""
        try:
            with text.open() as stream:
                while chunk := stream.read(CHUNK):
                    head = head or chunk[:4]
                    characters = decoder.decode(chunk)
                    yield characters.removeprefix("\ufeff") if offset == 0 else characters
                    offset += len(chunk)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            position = offset - len(decoder.getstate()[0]) + error.start
            kind = next((kind for magic, kind in KINDS.items() if head.startswith(magic)), "is not UTF-8: convert it "
                        "first, for instance with iconv -f latin1 -t utf-8")
            raise InputError(f"{text.name} {kind} (as UTF-8 it breaks at byte {position})") from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(f"{text.name} cannot be read, it may be damaged or cut short ({error}): "
                             f"get the file again") from error


def measure(texts):
    """(bytes, characters) of the whole; a bad file is found here, before anything is written."""
    n_bytes = n_characters = 0
    with tqdm(desc="check", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for text in texts:
            bytes_before = n_bytes
            for characters in read([text]):
                n_characters += len(characters)
                n_bytes += len(characters.encode())
                bar.update(n_bytes - bar.n)
            if n_bytes == bytes_before:
                raise InputError(f"{text.name} is empty: leave it out, or check that it was saved")
    return n_bytes, n_characters


def split_at_line_end(chunks, position):
    """Cut a stream after the first line that ends past `position`. The first part must be read before the second."""
    rest = []

    def first():
        start = 0
        for chunk in chunks:
            end = chunk.find("\n", max(0, position - start)) + 1
            if end:
                rest.append(chunk[end:])
                yield chunk[:end]
                return
            yield chunk
            start += len(chunk)

    def second():
        yield from rest
        yield from chunks

    return first(), second()


def pieces(chunks, size=CHUNK):
    """Regroup a stream into pieces whose tokens, one piece after another, are the tokens of the whole text.

    GPT-2 splits text into words before it merges: a word is an optional space and a run without whitespace, or a run
    of whitespace. So no token ever crosses from a non-space to the whitespace after it, and nothing after that point
    changes a word before it. Python's \\S excludes all that GPT-2 calls whitespace, and these four both call so.
    A text without such a point for a whole piece (base64, a long blank) is cut anywhere instead of being collected
    without bound: only the few tokens that touch this cut differ, and a word that it halves counts as two.
    """
    last_word_end, buffer = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL), ""
    for chunk in chunks:
        buffer += chunk
        if len(buffer) >= size:
            match = last_word_end.match(buffer)
            cut = match.end() if match else len(buffer)
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


# ---------------------------------------------------------------- tokens, into a folder

@contextmanager
def lock_folder(out, wait=False):
    """Hold the folder: two runs that write to one would spoil each other without a word. On one machine, that is."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if fcntl:
            stack.callback(os.close, folder := os.open(out, os.O_RDONLY))
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise InputError(f"another run is writing to {out}: wait for it, or choose another --out") from None
                print(f"another run is writing to {out}: waiting for it", file=sys.stderr)
                fcntl.flock(folder, fcntl.LOCK_EX)
            except OSError:                        # a file system without locks
                pass
        yield


def encode_piece(tokenizer, text):
    return np.array(tokenizer.encode(text), "<u2"), len(text.encode()), len(text.split()), text.count("\n")


def map_in_order(pool, function, items, in_flight):
    """Like pool.map, which would read the whole text into its queue first."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def prepare(texts, out_dir, tokenizer, sources=(), valid_fraction=0.1, workers=DEFAULT_WORKERS, expected_tokens=None):
    """Tokenize {"train": [Text, ...], "valid": ..., "test": ...} into out_dir and return what meta.json holds.

    Without "valid", the last `valid_fraction` of the training text, from the next line end on, is the validation split.
    A failure or Ctrl-C leaves an earlier folder as it was.
    """
    out_dir = Path(out_dir)
    sizes = {split: measure(texts[split]) for split in texts}
    streams = {split: read(texts[split]) for split in texts}
    if "valid" not in texts:
        position = int(sizes["train"][1] * (1 - valid_fraction))
        streams["train"], streams["valid"] = split_at_line_end(streams["train"], position)

    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "unit": tokenizer.unit,
            "tokens": {}, "bytes": {}, "words": {}, "lines": {}, "sha256": {}, "sources": list(sources)}
    with (lock_folder(out_dir, wait=True),
          tempfile.TemporaryDirectory(prefix=".prepare-", dir=out_dir) as temporary,
          tqdm(desc="tokenize", total=sum(n for n, _ in sizes.values()), unit="B", unit_scale=True,
               disable=None) as bar,
          ThreadPoolExecutor(workers) as pool):    # threads are enough: tiktoken releases the interpreter lock
        for folder in out_dir.glob(".prepare-*"):
            if not folder.samefile(temporary):     # of a run that was killed
                shutil.rmtree(folder)
        for split in sorted(streams, key=SPLITS.index):
            counts, digest, name = np.zeros(4, np.int64), hashlib.sha256(), f"{split}.bin"
            with open(Path(temporary, name), "wb") as file:
                for tokens, *n in map_in_order(
                        pool, partial(encode_piece, tokenizer), pieces(streams[split]), in_flight=2 * workers):
                    file.write(tokens)
                    digest.update(tokens)
                    counts += len(tokens), *n
                    bar.update(n[0])
            for key, count in zip(("tokens", "bytes", "words", "lines"), counts.tolist()):
                meta[key][split] = count
            meta["sha256"][name] = digest.hexdigest()
            if counts[0] < 2:                      # one token to read and one to predict
                raise InputError(f"the {split} split has {counts[0]} tokens, too few to use: give more text, a "
                                 f"--valid-fraction that leaves a line end on both sides, or --valid FILE")
        if expected_tokens and meta["tokens"] != expected_tokens:
            raise InputError(f"token counts {meta['tokens']} differ from the published {expected_tokens}: "
                             f"this is another version of the text")
        Path(temporary, "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

        # Stopped between here and the end, the folder has no meta.json rather than one of other tokens.
        (out_dir / "meta.json").unlink(missing_ok=True)
        for split in SPLITS:
            if split in streams:
                os.replace(Path(temporary, f"{split}.bin"), out_dir / f"{split}.bin")
            else:
                (out_dir / f"{split}.bin").unlink(missing_ok=True)
        os.replace(Path(temporary, "meta.json"), out_dir / "meta.json")
    return meta


# ---------------------------------------------------------------- where text comes from

def sha256(stream):
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def source(path):
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise InputError(f"{path} is not a file that can be read: check the path")
    with open(path, "rb") as file:
        return {"name": path.name, "sha256": sha256(file)}


def prepare_files(files, out_dir, tokenizer, **options):
    """files: {"train": [Path, ...], "valid": ..., "test": ...}"""
    sources = [source(path) for paths in files.values() for path in paths]
    texts = {split: [text_file(path) for path in paths] for split, paths in files.items()}
    return prepare(texts, out_dir, tokenizer, sources, **options)


def prepare_pydoc(out_dir, tokenizer=None, **options):
    """The reference behind Python's help(): about 465 kB of English that every CPython has."""
    from pydoc_data.topics import topics

    data = "\n\n".join(topics[key] for key in sorted(topics)).encode()
    sources = [{"name": f"pydoc_data.topics of Python {platform.python_version()}", "sha256": sha256(io.BytesIO(data))}]
    text = Text("pydoc_data.topics", partial(io.BytesIO, data))
    return prepare({"train": [text]}, out_dir, tokenizer or load_tokenizer("bytes"), sources, **options)


class NotDelivered(Exception):
    """Why a mirror did not deliver. An OSError, in contrast, is of this machine: no space, or no rights."""


def receive(url, start):
    """One request for the file from byte `start` on. Yield where the answer begins and the file's size, then bytes."""
    request = urllib.request.Request(url, headers=USER_AGENT | ({"Range": f"bytes={start}-"} if start else {}))
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            if response.headers.get_content_type() == "text/html":
                raise NotDelivered("what came is a web page: this network may ask for a login in a browser")
            if response.status != 206:             # the server ignores Range and sends everything
                start = 0
            length = response.headers["Content-Length"]
            yield start, start + int(length) if length else None
            while chunk := response.read(1 << 16):
                yield chunk
    except (OSError, HTTPException, ValueError) as error:      # ValueError: of a header that makes no sense
        if start and getattr(error, "code", None) == 416:      # nothing from there on: what is here is all, or too much
            yield start, start
        else:
            raise NotDelivered(error) from error


def size(path):
    return path.stat().st_size if path.exists() else 0


def fetch(url, part, is_whole):
    """Complete `part` and return the file's path. As long as each request brings something, and anew only once."""
    restarted = False
    while True:
        before = size(part)
        try:
            chunks = receive(url, before)
            start, total = next(chunks)
            # What comes in place of the rest may be anything: the part is kept until that has proved whole.
            path = part if start == before else part.with_suffix(".new.part")
            with (open(path, "ab" if start else "wb") as file,
                  tqdm(desc=urllib.parse.urlsplit(url).hostname, initial=start, total=total, unit="B",
                       unit_scale=True, disable=None) as bar):
                for chunk in chunks:
                    file.write(chunk)
                    bar.update(len(chunk))
            if total and size(path) < total:       # http.client reports a cut connection as an ordinary end
                raise NotDelivered(f"connection cut at {size(path):,} of {total:,} bytes")
            if is_whole(path):
                return path
            path.unlink()                          # or every later run would continue it
            raise NotDelivered("what came is another file, or a damaged one")
        except NotDelivered:
            if before and not part.exists() and not restarted:
                restarted = True
            elif size(part) <= before:
                raise


def download(mirrors, path, is_whole, remedy):
    """The file at one of the urls, as `path`. is_whole(part) says whether a part is all of it, and as it should be."""
    failures = []
    with lock_folder(path.parent, wait=True):
        for url in mirrors:
            if path.exists():                      # brought by the run that was waited for
                break
            # A part file for each mirror: nobody promises that their files are the same bytes.
            part = path.with_name(f"{path.name}.{urllib.parse.urlsplit(url).netloc.replace(':', '-')}.part")
            try:
                os.replace(fetch(url, part, is_whole), path)
                break
            except NotDelivered as error:
                failures.append(f"{url}: {error}")
        else:
            raise InputError(f"no mirror delivered {path.name} ({'; '.join(failures)}). Run this again to continue, or "
                             f"{remedy}")
        for part in path.parent.glob(f"{path.name}.*.part"):
            part.unlink()


def wikitext103_fault(zip_path):
    """What is wrong with the zip, or None."""
    try:
        with zipfile.ZipFile(zip_path) as archive:             # which checks the CRC of what is read to its end
            digests = {split: sha256(archive.open(member)) for split, member in WIKITEXT103_MEMBERS.items()}
    except Exception as error:                     # a damaged zip raises ten types of them
        return f"is damaged or another archive ({error})"
    if digests["test"] != WIKITEXT103_TEST_SHA256:
        return f"holds a wiki.test.raw that is not the published one (its sha256 is {digests['test']})"
    return None


def prepare_wikitext103(out_dir, tokenizer, given_zip=None, **options):
    """tokenizer: its name, so that a machine without a network is told of all that it lacks at once."""
    zip_path = given_zip or Path(out_dir, "wikitext-103-raw-v1.zip")
    elsewhere = f"get {WIKITEXT103_MIRRORS[0]} elsewhere and put it at {zip_path} or name it with --zip FILE"
    try:
        tokenizer = load_tokenizer(tokenizer)
    except InputError as error:
        if zip_path.exists():
            raise
        raise InputError(f"{error}\nThe text is not here either: without a network, {elsewhere}") from error
    fault = None
    if given_zip or zip_path.exists():
        fault = wikitext103_fault(zip_path)
    else:                                          # checked as it comes
        download(WIKITEXT103_MIRRORS, zip_path, lambda part: not wikitext103_fault(part), elsewhere)
    zip_source = source(zip_path)
    print(f"{zip_path}: sha256 {zip_source['sha256']}")
    expected_tokens = WIKITEXT103_GPT2_TOKENS if tokenizer.name == "gpt2" else None
    try:
        if fault:
            raise InputError(f"{zip_path} {fault}")
        with zipfile.ZipFile(zip_path) as archive:
            texts = {split: [Text(f"{member} in {zip_path}", partial(archive.open, member))]
                     for split, member in WIKITEXT103_MEMBERS.items()}
            return prepare(texts, out_dir, tokenizer, [zip_source], expected_tokens=expected_tokens, **options)
    except InputError as error:
        remedy = "give another --zip" if given_zip else f"delete {zip_path} and run this again"
        raise InputError(f"{error}: {remedy}") from error


# ---------------------------------------------------------------- command line

def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="FILE", help="UTF-8 text, plain or .xz, .gz, .bz2; or the word "
                        "pydoc or wikitext103 (a file of that name: ./pydoc)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, help="default: gpt2 for wikitext103, otherwise bytes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: data/ and the first file's name without "
                        "its suffixes")
    parser.add_argument("--valid", type=Path, metavar="FILE", help="validation text; default: the end of the text")
    parser.add_argument("--test", type=Path, metavar="FILE", help="test text; default: none")
    parser.add_argument("--valid-fraction", type=float, metavar="F", help="how much of the text is for validation "
                        "when there is no --valid (default: 0.1)")
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS, metavar="N",
                        help="threads that tokenize (default: %(default)s)")
    parser.add_argument("--zip", type=Path, metavar="FILE", help="wikitext103: this zip instead of a download")
    config = parser.parse_args(arguments)

    if config.valid_fraction is None:
        config.valid_fraction = 0.1
    elif config.valid or config.texts == ["wikitext103"]:
        parser.error("the validation text is given: leave out --valid-fraction")
    if not 0 < config.valid_fraction < 1:
        parser.error("--valid-fraction must lie between 0 and 1")
    if config.workers < 1:
        parser.error("--workers must be at least 1")
    config.built_in = config.texts[0] if config.texts[0] in ("pydoc", "wikitext103") else None
    if config.built_in and len(config.texts) > 1:
        parser.error(f"{config.built_in} is prepared alone, without other files")
    if config.built_in and (config.valid or config.test):
        parser.error(f"{config.built_in} has its own splits: leave out --valid and --test")
    if config.zip and config.built_in != "wikitext103":
        parser.error("--zip goes with wikitext103 only")
    config.tokenizer = config.tokenizer or ("gpt2" if config.built_in == "wikitext103" else "bytes")
    config.out = config.out or Path("data", Path(config.texts[0]).name.split(".")[0] or "text")
    return config


def main(arguments=None):
    config = parse(arguments)
    options = {"workers": config.workers, "valid_fraction": config.valid_fraction}
    try:
        if config.built_in == "wikitext103":
            meta = prepare_wikitext103(config.out, config.tokenizer, config.zip, **options)
        elif config.built_in == "pydoc":
            meta = prepare_pydoc(config.out, load_tokenizer(config.tokenizer), **options)
        else:
            files = {"train": [Path(name) for name in config.texts], "valid": [config.valid], "test": [config.test]}
            files = {split: paths for split, paths in files.items() if paths[0]}
            meta = prepare_files(files, config.out, load_tokenizer(config.tokenizer), **options)
    except InputError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:                       # no space, no permission, or --out is a file
        print(f"prepare.py: cannot write to {config.out} ({error}): make room there or name another place with --out; "
              f"what was there before is untouched", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted; what was there before is untouched", file=sys.stderr)
        return 130
    for split, count in meta["tokens"].items():
        print(f"{split}: {count:,} {meta['unit']}s, {meta['bytes'][split]:,} bytes, {meta['words'][split]:,} words, "
              f"{meta['lines'][split]:,} lines")
    print(f"wrote {config.out}; train on it with: python train_gpt.py --data {config.out} "
          f"--out runs/{Path(config.out).name}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # as Ctrl-C does, leave nothing half done
    sys.exit(main())
