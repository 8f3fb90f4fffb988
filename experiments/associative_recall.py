"""Associative recall: which attention can look up what it has read? The paper's smallest test of spiky attention.

    python experiments/associative_recall.py --attention hedgehog --workers 2     one, three seeds
    python experiments/associative_recall.py --device cuda --workers 12           the whole table

The rows of --out are kept, those of other settings refused: a run that was stopped goes on.

A row lists key value key value ... => key, and the model must name that key's value. Every row draws its own map from
keys to values, so nothing can be learned by heart but the looking up: find where the key stood, and copy what stood
behind it. A model that cannot may still name some value of the row, which is right in `guess` of the rows.

Two questions. Does an attention learn it from scratch (`accuracy`)? And can it do what softmax has learned? For this a
trained softmax model of the same seed is converted: its attention swapped (`swapped`), the maps distilled, where there
are any (`distilled`), then everything finetuned (`converted`). So one attention alone trains softmax first, too.

Here are the command line, the table and its figure; the task itself, and one run, are in recall_task.py.
"""

import json
import math
import multiprocessing
import queue
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

from common import GREY, color, draw_if_possible, figure, ready, rows_so_far, save
from recall_task import RESULTS, VARIANTS, run, with_means
from tqdm import tqdm

from train_gpt import cli, opt, parse_config, pick_device, provenance, save_json

PAPER = {"softmax": 100, "hedgehog": 100, "taylor": 100, "elu": 17.0, "performer": 17.0, "cosformer": 17.0}  # percent


@dataclass
class RecallConfig:
    attention: str = opt("all", "which one", ("all", *VARIANTS))
    seeds: int = opt(3, "runs of each: seeds 0, 1, ...")
    # the task
    vocabulary: int = opt(40, "tokens, the first half keys, the others values; => is one more")
    length: int = opt(32, "tokens a row, an even number")
    test_rows: int = opt(2000, "rows of the test; every step of the training draws its own")
    # model and optimisation: chosen so that softmax solves the task, without a look at the others
    n_layer: int = opt(2, "layers")
    n_head: int = opt(1, "heads a layer")
    n_embd: int = opt(64, "model width")
    embedding_std: float = opt(0.2, "of the first embeddings; with GPT-2's 0.02 softmax needs many more steps")
    steps: int = opt(2000, "optimizer steps")
    batch_size: int = opt(64, "rows a step")
    lr: float = opt(1e-3, "peak learning rate")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps, times --lr")
    warmup: int = opt(100, "steps of linear warm-up; a cosine to a tenth of --lr follows")
    # conversion
    distill_steps: int = opt(300, "steps in which the maps learn softmax's weights, all else frozen")
    distill_lr: float = opt(1e-2, "their learning rate, which falls to a tenth; no weight decay")
    finetune_steps: int = opt(500, "steps of everything, after that; a twentieth is warm-up")
    finetune_lr: float = opt(3e-4, "their peak learning rate")
    # machine
    device: str = opt("cpu", "where to run; the steps are so small that a GPU is idle most of the time",
                      ("auto", "cuda", "mps", "cpu"))
    workers: int = opt(1, "runs at once, each a process")
    out: str = opt("runs/associative_recall.json", "the rows; the figure goes beside it")

    def __post_init__(self):
        if self.length < 4 or self.length % 2 or self.vocabulary < 4 or self.vocabulary % 2:
            raise ValueError("--length and --vocabulary must be even and at least 4, got "
                             f"{self.length} and {self.vocabulary}")
        if min(self.seeds, self.steps, self.workers, self.distill_steps, self.finetune_steps) < 1:
            raise ValueError("--seeds, --steps, --workers, --distill-steps and --finetune-steps must be at least 1")


def draw(path):
    """Both questions: from scratch in pale bars, converted in full ones."""
    rows = json.loads(path.read_text())
    means = {row["attention"]: row for row in rows if row["seed"] == "mean"}
    names, said = list(means), {}
    fig, [[ax]] = figure(height=1.5 + 0.45 * len(names))
    for key, label, offset, alpha in (("accuracy", "from scratch", -0.2, 0.5),
                                      ("converted", "converted from softmax", 0.2, 1)):
        for name, row in means.items():
            if key in row:
                y = names.index(name) + offset
                seeds = [100 * r[key] for r in rows if r["attention"] == name and r["seed"] != "mean"]
                ax.barh(y, 100 * row[key], 0.38, color=color(name), alpha=alpha)
                ax.plot(seeds, [y] * len(seeds), "o", color="#4a5058", markersize=4, markerfacecolor="#e6e8eb")
                ax.text(108, y, f"{100 * row[key]:.0f}", ha="right", va="center")  # where it crosses no line
                said.setdefault(name, []).append(f"{100 * row[key]:.0f} % {label}")
        ax.barh(0, 0, color=GREY, alpha=alpha, label=label)
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(0, 101, 20))
    ax.invert_yaxis()
    ax.set_xlim(0, 109)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("accuracy, % (mean; dots: seeds)")
    fig.legend(loc="outside lower center", ncols=2)
    name = "hedgehog" if "hedgehog" in names else names[-1]
    save(fig, path.with_suffix(".png"), f"Associative recall by {name}: {', '.join(said[name])}")


def main(config):
    machine = ("attention", "seeds", "device", "workers", "out")
    setting = {key: value for key, value in asdict(config).items() if key not in machine}
    out, about = ready(config.out), setting | provenance(pick_device(config.device, "float32")[0])
    rows = [row for row in rows_so_far(out, setting) if row["seed"] != "mean"]
    done = {(row["attention"], row["seed"]) for row in rows}                              # by a run that was stopped
    names = list(VARIANTS) if config.attention == "all" else [config.attention]
    wanted = [(name, seed) for name in names for seed in range(config.seeds) if (name, seed) not in done]
    if not wanted:
        print(f"every row is in {out} already: choose another --out to run them again")
    teachers = sorted({seed for name, seed in wanted})
    context = multiprocessing.get_context("spawn").Pool(config.workers) if config.workers > 1 else nullcontext()
    trained = queue.SimpleQueue()                                                         # (seed, softmax model)

    def jobs():
        yield from (("softmax", seed, None) for seed in teachers)
        for _ in teachers:
            seed, teacher = trained.get()                                                 # waits for the next
            yield from ((name, seed, teacher) for name, s in wanted if s == seed and name != "softmax")

    with context as pool, tqdm(total=len(teachers) + sum(name != "softmax" for name, _ in wanted), unit="run",
                               disable=None) as bar:
        try:
            for row, model in (pool.imap_unordered if pool else map)(partial(run, config=config), jobs()):
                if row["attention"] == "softmax":
                    trained.put((row["seed"], model))
                if (row["attention"], row["seed"]) in wanted:
                    rows.append(row | about)
                    save_json(out, with_means(rows))
                tqdm.write(f"{row['attention']:13} seed {row['seed']}: " + ", ".join(
                    f"{key} {100 * row[key]:.1f} %" for key in RESULTS if key in row) + f", {row['seconds']:.0f} s")
                bar.update()
        except BaseException:
            for seed in teachers:
                trained.put((seed, None))  # or the pool would wait for `jobs`, and it for a softmax, for ever
            raise
    print(f"{'%':13}" + "".join(f"{key:>11}" for key in (*RESULTS, "paper")))
    for row in with_means(rows):
        if row["seed"] == "mean":
            numbers = [100 * row.get(key, math.nan) for key in RESULTS] + [PAPER.get(row["attention"], math.nan)]
            print(f"{row['attention']:13}" + "".join(f"{x:11.1f}" for x in numbers).replace("nan", "  -"))
    draw_if_possible(draw, out)


if __name__ == "__main__":
    cli(lambda: main(parse_config(RecallConfig)))
