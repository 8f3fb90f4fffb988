"""What the experiments share: how their figures look, where their rows go, and which a run goes on from.

Import this module before those of the root folder, which it puts on the path: they are no installed package.
"""

import hashlib
import json
import re
import shutil
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:  # the numbers are there without it
    plt = None

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from train_gpt import flag  # noqa: E402

RESULTS = HERE / "results"


# ---------------------------------------------------------------------------------------------------------------------
# Figures. Colours and text are mid-tones on a transparent background, of a contrast of 3.3 to 5.7 (text 4.2) to a white
# page and to a dark one; shown 880 pixels wide, the text is as large as the page's


GREY, COLORS = "#747c86", ("#c97420", "#4a8fe0", "#2f9450", "#c25b9f", "#8a78d6", "#a08618", "#2b9494", "#d0605e")
STYLE = {"font.size": 12, "axes.titlesize": 12.5, "figure.dpi": 120, "savefig.transparent": True,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "grid.color": GREY,
         "legend.frameon": False, "legend.labelcolor": GREY, "lines.linewidth": 2,
         "figure.constrained_layout.use": True, "figure.constrained_layout.h_pad": 0.06,
         **{key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
                                  "ytick.color")}}


def figure(rows=1, columns=1, height=3.6, **options):
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(8.8, height), squeeze=False, **options)


def digest(fig, title):
    """Of the words and numbers that are shown. The pixels differ between versions of matplotlib, these do not."""
    shown = [title]
    for ax in fig.axes:
        shown += [ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), [text.get_text() for text in ax.texts]]
        shown += [(line.get_label(), line.get_xydata()) for line in ax.lines]
        shown += [np.array(bar.get_bbox()) for bar in ax.patches] + [image.get_array() for image in ax.images]
    rounded = json.dumps(shown, default=lambda array: [f"{x:.6g}" for x in np.ma.filled(array, np.nan).flat])
    return hashlib.sha256(rounded.encode()).hexdigest()


def save(fig, path, title):
    lines = -(-len(title) // 82)  # of 82 characters one in 12 points is as wide as the figure
    fits = (textwrap.wrap(title, width, break_on_hyphens=False) for width in range(len(title) // lines, 1 + len(title)))
    wrapped = next(wrap for wrap in fits if len(wrap) <= lines)  # the narrowest: no line is left with a word alone
    fig.suptitle("\n".join(wrapped), color=GREY, fontweight="bold",
                 fontsize=min(13.5, 1000 / max(len(line) for line in wrapped)))
    fig.savefig(path, metadata={"Digest": digest(fig, title)}, pil_kwargs=dict(optimize=True))
    plt.close(fig)
    print(f"{path}: {title}")


def color(name):
    """Orange for what learns to imitate softmax, grey for softmax, blue for what it is compared with."""
    return GREY if name.startswith("softmax") else COLORS[0] if name.startswith("hedgehog") else COLORS[1]


def bars(ax, names, values, label, form="{:.2f}", colors=None):
    """Bars, and their values in a column on the right, where they cross no line."""
    ax.barh(names, values, color=colors or [color(name) for name in names])
    for y, value in enumerate(values):
        ax.annotate(form.format(value), (1, y), (48, 0), ("axes fraction", "data"), "offset points", ha="right",
                    va="center", color=GREY)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(label)


def draw_if_possible(draw, path):
    """draw(path), or a word on what is missing: an experiment ends with it."""
    if plt is None:
        print(f"{path} is written, its figure is not: pip install -r requirements-experiments.txt")
    else:
        draw(path)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def ready(out):
    """--out as a Path whose folder is there and can be written. ValueError if not: before the work, not at its end."""
    out = Path(out)
    if out.suffix != ".json":
        raise ValueError(f"--out {out} must end in .json: it is a file of rows, written as JSON")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as e:
        raise ValueError(f"cannot write --out {out}: choose another, or mend its permissions ({e})") from None
    return out


def read_rows(path):
    """The rows of a file, none if it is not there. ValueError if it holds anything else."""
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
    except ValueError:  # of JSON, or of a text at all
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no table of rows: choose another, or mend the path")
    return rows


def rows_so_far(path, settings, concerned=lambda row: True, **were):
    """The rows that an earlier run left in path. ValueError if those concerned are of other settings: a table holds one
    setting. `were`: what newer settings are in rows that do not name them."""
    rows = read_rows(path)
    settings = json.loads(json.dumps(settings))  # tuples are lists in a file
    found = {f"{flag(k)} {row.get(k, were.get(k))}": flag(k) for k, v in settings.items() for row in rows
             if concerned(row) and row.get(k, were.get(k)) != v}
    if found:
        raise ValueError(f"{path} holds rows made with {', '.join(found)}: give the same "
                         f"{', '.join(dict.fromkeys(found.values()))}, or choose another --out")
    return rows


def copy_curves(curves, folder):
    """Of {name: log.csv} every one to the folder, which is made now, or ValueError and none: what is refused leaves no
    trace."""
    lost = [str(log) for log in curves.values() if not log.exists()]
    if lost:
        raise ValueError(f"missing: {', '.join(lost)}: finish the conversion or the run, or mend the folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, log in curves.items():
        shutil.copy(log, folder / f"{name}.csv")


def with_names(command):
    """A command line with the names of absolute paths alone: the folders of one machine are of no use on another."""
    return re.sub(r"(?<!\S)/\S*/", "", command)


@contextmanager
def or_say(sentence):
    """ValueError with the sentence, and behind it the reason in brackets, for whatever a damaged model makes of
    transformers, which reads it here."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{sentence} ({(str(e).strip() or repr(e)).splitlines()[0]})") from e
