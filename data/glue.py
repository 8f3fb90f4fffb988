"""GLUE's tasks: their files, downloaded if they are not there, their rows in batches, and their measures."""

import math
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.prepare import download
from train_gpt import write_atomically

try:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import f1_score, matthews_corrcoef
    missing = ""
except ImportError as e:
    missing = e.name

# Not tried by us. MRPC's are the original files, 4,076 rows to learn from and 1,725 for the test.
ARCHIVES = "https://dl.fbaipublicfiles.com/glue/data/{}.zip"
MRPC = "https://dl.fbaipublicfiles.com/senteval/senteval_data/{}"


class Task(NamedTuple):
    folder: str
    text: tuple  # the columns of the sentence or of the two sentences
    label: str  # the column of the answer
    labels: tuple = ("0", "1")  # the answers, in the order that the hub's finetuned models have; (): a number
    metrics: tuple = ("accuracy",)  # the score is the first, or the mean of two correlations
    splits: tuple = ("dev.tsv",)  # whose answers are public, and are reported
    archive: str = ""  # if it is not the folder's name


PAIR, ENTAILED = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", metrics=("matthews",)),
    "sst2": Task("SST-2", ("sentence",), "label"),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", metrics=("f1", "accuracy")),
    "stsb": Task("STS-B", PAIR, "score", (), ("pearson", "spearman")),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", metrics=("f1", "accuracy"), archive="QQP-clean"),
    "mnli": Task("MNLI", PAIR, "gold_label", ("entailment", "neutral", "contradiction"),
                 splits=("dev_matched.tsv", "dev_mismatched.tsv")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILED, archive="QNLIv2"),
    "rte": Task("RTE", PAIR, "label", ENTAILED),
    "wnli": Task("WNLI", PAIR, "label"),
}


def find_files(task, data):
    """(training file, reported files) in the folder `data`. MRPC's may be GLUE's train.tsv or the original ones."""
    about = TASKS[task]
    folder = Path(data) / about.folder
    files = [folder / name for name in ("train.tsv", *about.splits)]
    if task == "mrpc" and not all(path.exists() for path in files):
        files = [folder / f"msr_paraphrase_{split}.txt" for split in ("train", "test")]
    lacking = [path for path in files if not path.exists()]
    if lacking:
        tqdm.write(f"{lacking[0]} is not there: downloading {about.folder}")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fetch(task, folder, lacking)
        finally:  # a download that brought nothing leaves no folder
            for path in made:
                with suppress(OSError):
                    path.rmdir()
    return files[0], files[1:]


def fetch(task, folder, lacking):
    """Download the files that are lacking in the task's folder."""
    about = TASKS[task]
    remedy = f"get {about.folder} elsewhere and put its files into {folder}, or name another folder with --data"
    if task == "mrpc":
        for path in lacking:
            download([MRPC.format(path.name)], path, lambda part: b"Quality" in part.read_bytes()[:20], remedy)
        return
    archive = folder.with_name(f"{about.archive or about.folder}.zip")
    if not archive.exists():
        download([ARCHIVES.format(archive.stem)], archive, zipfile.is_zipfile, remedy)
    try:
        with zipfile.ZipFile(archive) as z:
            for path in lacking:
                content = z.read(f"{about.folder}/{path.name}")
                write_atomically(path, lambda f, content=content: f.write(content))
    except (zipfile.BadZipFile, KeyError) as e:
        raise ValueError(f"{archive} is damaged or another archive ({e}): delete it and run this again") from e


def read_rows(task, path):
    """[((sentence, ...), answer), ...] of a TSV file. Rows without all columns are left out, a few in each hundred."""
    about, rows = TASKS[task], []
    with open(path, encoding="utf-8-sig", newline="\n") as f:  # -sig: the original MRPC begins with a mark
        lines = [line.rstrip("\r\n").split("\t") for line in f if line.strip()]           # a quote is a quote
    if task == "cola":  # no header: source, label, star, sentence; or without the source: sentence, label
        columns = (3, 1) if lines and len(lines[0]) >= 4 else (0, 1)
    else:
        try:
            columns = [lines[0].index(name) for name in (*about.text, about.label)]
        except (IndexError, ValueError):
            raise ValueError(f"{path} must begin with a header that has the columns "
                             f"{', '.join((*about.text, about.label))}: get GLUE's file again") from None
        lines = lines[1:]
    for line in lines:
        try:
            *text, answer = (line[column] for column in columns)
            rows.append((tuple(text), about.labels.index(answer) if about.labels else float(answer)))
        except (IndexError, ValueError):
            pass
    if len(rows) < 0.97 * len(lines) or not rows:
        raise ValueError(f"{path}: {len(rows)} of {len(lines)} rows have the columns and answers of {about.folder}: "
                         "get GLUE's file again (answers of its test.tsv are secret)")
    if len(rows) < len(lines):
        tqdm.write(f"{path}: {len(lines) - len(rows)} of {len(lines)} rows lack a column and are left out")
    return rows


def measure(task, predicted, answers):
    """{"score": ..., and each of the task's metrics} of two arrays. A correlation with a constant is 0."""
    def correlation(function):
        constant = min(np.ptp(predicted), np.ptp(answers)) == 0
        return 0.0 if constant else function(predicted, answers)[0]

    functions = dict(accuracy=lambda: (predicted == answers).mean(), f1=lambda: f1_score(answers, predicted),
                     matthews=lambda: matthews_corrcoef(answers, predicted),
                     pearson=lambda: correlation(pearsonr), spearman=lambda: correlation(spearmanr))
    found = {name: float(functions[name]()) for name in TASKS[task].metrics}
    return dict(score=sum(found.values()) / 2 if task == "stsb" else found[TASKS[task].metrics[0]], **found)


class Batches:
    """The rows of a task for a BERT: tokenized once, padded a batch at a time."""

    def __init__(self, task, rows, tokenizer, max_length, batch_size, device):
        sentences = [list(column) for column in zip(*(text for text, _ in rows))]         # one list, or two
        encoded = tokenizer(*sentences, truncation=True, max_length=max_length)
        self.rows = [dict(zip(encoded, values), labels=label) for *values, (_, label) in zip(*encoded.values(), rows)]
        self.lengths = np.array([len(row["input_ids"]) for row in self.rows])
        self.pad = partial(tokenizer.pad, pad_to_multiple_of=8, return_tensors="pt")
        self.task, self.batch_size, self.device = task, batch_size, device

    def __len__(self):
        return math.ceil(len(self.rows) / self.batch_size)

    def draw(self, rng=None):
        """Yield inputs, with labels, of about the same length. With a generator of numpy they are composed anew."""
        noise = rng.uniform(0.8, 1.25, len(self.rows)) if rng else 1
        order = np.argsort(self.lengths * noise, kind="stable")
        parts = np.split(order, range(self.batch_size, len(order), self.batch_size))
        if rng:
            rng.shuffle(parts)
        for part in parts:
            yield self.pad([self.rows[i] for i in part]).to(self.device)


def load_batches(task, data, limit, **options):
    """Batches to learn from, held-out ones (a tenth of those rows, at most 2,000) and reported ones, always the same.

    limit: use so many rows of every file, 0: all. options: of Batches.
    """
    def read(path):
        rows = read_rows(task, path)
        return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit or None]]

    train, reported = find_files(task, data)
    rows = read(train)
    n = min(2000, math.ceil(len(rows) / 10))
    if n == len(rows):
        raise ValueError(f"{train}: {n} rows are too few to hold one out: raise --limit")
    parts = rows[n:], rows[:n], [row for path in reported for row in read(path)]
    return [Batches(task, part, **options) for part in parts]
