"""What the experiments share: how their figures look, and a trained softmax model with its linear students.

Import this module before those of the root folder, which it puts on the path: they are no installed package.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:  # the numbers are there without it
    plt = None

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from convert_gpt2 import ConvertConfig, distill, find_text, load_teacher, maps_of, stage_config, swap  # noqa: E402
from hedgehog import attention_weights  # noqa: E402
from train_gpt import MAY_CHANGE_ON_RESUME, HelpFormatter, load_checkpoint, pick_device  # noqa: E402

RESULTS = HERE / "results"


# ---------------------------------------------------------------------------------------------------------------------
# Figures. Colours and text are mid-tones on a transparent background, to be read on a white page and on a dark one;
# shown 880 pixels wide, the text is as large as the page's


GREY, COLORS = "#7f8791", ("#d9822b", "#4a8fe0", "#3da35d", "#c25b9f", "#8a78d6", "#b59a2a", "#3aa6a6", "#d0605e")
STYLE = {"font.size": 12, "axes.titlesize": 12.5, "figure.dpi": 120, "savefig.transparent": True,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "grid.color": GREY,
         "legend.frameon": False, "legend.labelcolor": GREY, "lines.linewidth": 2,
         "figure.constrained_layout.use": True,
         **{key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
                                  "ytick.color")}}


def figure(rows=1, columns=1, height=3.6, **options):
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(8.8, height), squeeze=False, **options)


def save(fig, path, title):
    fig.suptitle(title, color=GREY, fontsize=min(13.5, 1000 / len(title)), fontweight="bold")  # as wide as the figure
    fig.savefig(path, pil_kwargs=dict(optimize=True))
    plt.close(fig)
    print(f"{path}: {title}")


def color(name):
    """Orange for what learns to imitate softmax, grey for softmax, blue for what it is compared with."""
    return GREY if name.startswith("softmax") else COLORS[0] if name.startswith("hedgehog") else COLORS[1]


def bars(ax, names, values, label, form="{:.2f}", colors=None):
    drawn = ax.barh(names, values, color=colors or [color(name) for name in names])
    ax.bar_label(drawn, [form.format(v) for v in values], padding=4, color=GREY)
    ax.invert_yaxis()
    ax.margins(x=0.16)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(label)


def draw_if_possible(draw, path):
    """draw(path), or a word on what is missing: an experiment ends with it."""
    if plt is None:
        print(f"{path} is written, its figure is not: pip install -r requirements-experiments.txt")
    else:
        draw(path)


# ---------------------------------------------------------------------------------------------------------------------
# A softmax model, its linear students, and what they attend to; `config` is what `students_parser` reads, or
# attention_properties.PropertiesConfig


def students_parser(doc, maps, distill_lr, out):
    """The flags that `teacher_and_text` and `student` need; `doc` is the script's, the others are its defaults."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=HelpFormatter)
    parser.set_defaults(seed=0)
    add = parser.add_argument
    add("teacher", nargs="?", default="", metavar="CHECKPOINT",
        help="softmax run of train_gpt.py; runs/tiny-softmax if it is left out")
    add("--data", default="", help="folder made by data/prepare.py; empty: data/pydoc, made on the fly")
    add("--maps", default=maps, help="distilled maps are read from here, or made and kept here")
    add("--distill-steps", type=int, default=400, help="optimizer steps of a distillation")
    add("--distill-lr", type=float, default=distill_lr, help="its peak learning rate")
    add("--compile", action="store_true", help="torch.compile its loss: for long contexts on a GPU")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    add("--out", default=out, help="the results; the figure goes beside it")
    return parser


def teacher_and_text(config):
    """(softmax GPT in eval mode on its device, the text, device): as convert_gpt2.py finds them."""
    device = pick_device(config.device, "float32")[0]
    convert = ConvertConfig(teacher=config.teacher, data=config.data, device=config.device)
    teacher, tokenizer = load_teacher(convert)
    return teacher.to(device).eval(), find_text(stage_config(convert, teacher, "distilled"), teacher, tokenizer), device


def student(teacher, data, config, device, block_size=None, change=None, **options):
    """The teacher with linear attention, as `change` leaves it. Its maps are distilled now, unless an earlier call has
    kept them."""
    options = dict(distill_steps=config.distill_steps, distill_lr=config.distill_lr, seed=config.seed,
                   compile=config.compile) | options
    convert = ConvertConfig(teacher=config.teacher, data=config.data, out=config.maps, resume=True, **options)
    torch.manual_seed(config.seed)                                                        # performer draws its w_i
    model = swap(teacher, convert).to(device).eval()
    if change:
        change(model)
    if convert.distill_steps and maps_of(model):
        stage = stage_config(convert, model, "distilled", steps=convert.distill_steps, accum=1, lr=convert.distill_lr,
                             batch_size=convert.distill_batch_size, weight_decay=0.0,
                             block_size=block_size or teacher.config.block_size)
        if stage.resume:
            saved = load_checkpoint(Path(stage.out) / "last.pt")["config"].items()
            other = [f"{k}={v}" for k, v in saved if k not in MAY_CHANGE_ON_RESUME and getattr(stage, k) != v]
            if other:
                raise ValueError(f"maps in {stage.out} were distilled with {', '.join(other)}: choose another --maps")
        distill(model, data, stage, device, nullcontext(), tqdm.write)
    return model


@torch.no_grad()
def read(teacher, idx):
    """What softmax attention compares while the teacher reads idx (B, T): a list of q, k (B, H, T, D), one a layer."""
    gpt, layers = teacher.transformer, []
    x = gpt.wte(idx) + gpt.wpe(torch.arange(idx.shape[1], device=idx.device))             # (B, T, C)
    for block in gpt.h:
        layers.append(block.attn.split_heads(block.ln_1(x))[:2])
        x = block(x)
    return layers


def scores(q, k):
    """q.k / sqrt(D), (B, H, T, T), -inf for the future."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)


@torch.no_grad()
def weights(model, layer, q, k):
    """The (B, H, T, T) attention weights of one layer of a linear model, or of softmax where model is None."""
    if model is None:
        return scores(q, k).softmax(dim=-1)
    maps = model.transformer.h[layer].attn.linear
    return attention_weights(maps.map_q(q, is_query=True), maps.map_k(k))
