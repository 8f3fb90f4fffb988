"""Associative recall: which attention can look up what it has read? The paper's smallest test of spiky attention.

    python experiments/associative_recall.py --attention hedgehog             three seeds of one
    python experiments/associative_recall.py --device cuda --workers 8        the whole table

A row lists key value key value ... => key, and the model must name that key's value. Every row draws its own map from
keys to values, so nothing can be learned by heart but the looking up: find where the key stood, and copy what stood
behind it. A model that cannot may still name some value of the row, which is right in `guess` of the rows.

Two questions: does an attention learn it from scratch, and can it do what softmax has learned? For the second a trained
softmax model is converted, as convert_gpt2.py does it: attention swapped, maps distilled, everything finetuned.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm, trange

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
import plot  # noqa: E402
from convert_gpt2 import imitate, maps_of  # noqa: E402
from hedgehog import GPT, GPTConfig  # noqa: E402
from train_gpt import (  # noqa: E402
    TrainConfig, cli, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance, save_json,
    write_atomically)

KINDS = ("softmax", "hedgehog", "hedgehog_exp", "taylor", "t2r", "elu", "relu", "performer", "cosformer")
VARIANTS = {kind: dict(attention=kind) for kind in KINDS}
VARIANTS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}
PAPER = {"softmax": 100, "hedgehog": 100, "taylor": 100, "elu": 17.0, "performer": 17.0, "cosformer": 17.0}  # percent


@dataclass
class RecallConfig:
    attention: str = opt("all", "which one", ("all", *VARIANTS))
    start: str = opt("both", "from scratch, or converted from a trained softmax model", ("both", "scratch", "softmax"))
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
    steps: int = opt(3000, "optimizer steps")
    batch_size: int = opt(64, "rows a step")
    lr: float = opt(1e-3, "peak learning rate")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps, times --lr")
    warmup: int = opt(100, "steps of linear warm-up; a cosine to a tenth of --lr follows")
    weight_decay: float = opt(0.1, "on matrices only")
    beta2: float = opt(0.99, "AdamW's second moment")
    clip: float = opt(1.0, "largest norm of the gradient")
    # conversion
    distill_steps: int = opt(300, "steps in which the maps learn softmax's weights, all else frozen")
    distill_lr: float = opt(1e-2, "their learning rate, which falls to a tenth; no weight decay")
    finetune_steps: int = opt(500, "steps of everything, after that")
    finetune_lr: float = opt(3e-4, "their peak learning rate")
    teachers: str = opt("runs/associative_recall", "trained softmax models are kept here")
    # machine
    device: str = opt("cpu", "where to run; the steps are so small that a GPU is idle most of the time",
                      ("auto", "cuda", "mps", "cpu"))
    workers: int = opt(1, "runs at once, each a process")
    out: str = opt("experiments/results/associative_recall.json", "the rows; the figure goes beside it")

    def __post_init__(self):
        if self.length < 4 or self.length % 2 or self.vocabulary < 4 or self.vocabulary % 2:
            raise ValueError("--length and --vocabulary must be even and at least 4, got "
                             f"{self.length} and {self.vocabulary}")


def make_rows(n, length, vocabulary, generator=None):
    """(rows (n, length) of key value ... => key, their answers (n,)). Keys are below vocabulary / 2, values above."""
    n_keys, n_pairs, device = vocabulary // 2, length // 2 - 1, generator.device if generator else None
    randint = partial(torch.randint, generator=generator, device=device)
    value_of = randint(n_keys, vocabulary, (n, n_keys))                                   # each row's own map
    keys = randint(n_keys, (n, n_pairs))                                                  # pairs repeat
    asked = keys.gather(1, randint(n_pairs, (n, 1)))                                      # it has occurred
    pairs = torch.stack((keys, value_of.gather(1, keys)), dim=-1).flatten(1)              # (n, 2 n_pairs)
    return torch.cat((pairs, torch.full_like(asked, vocabulary), asked), dim=1), value_of.gather(1, asked)[:, 0]


def guess(x, y):
    """Accuracy of naming the most frequent value of each row."""
    return (x[:, 1:-2:2].mode(dim=1).values == y).float().mean().item()


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x)[0][:, -1].argmax(dim=-1) == y).float().mean().item()


def settings(config, *without):
    """What the numbers depend on."""
    machine = ("attention", "start", "seeds", "device", "workers", "out", "teachers")
    return {k: v for k, v in asdict(config).items() if k not in machine and not k.startswith(without or "-")}


def new_model(name, seed, config, device):
    torch.manual_seed(seed)
    # An output matrix of its own, so that the embeddings can begin larger than GPT-2's, and logits do not.
    model = GPT(GPTConfig(config.length, config.vocabulary + 1, config.n_layer, config.n_head, config.n_embd,
                          tie_head=False, **VARIANTS[name])).to(device)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        torch.nn.init.normal_(embedding.weight, std=config.embedding_std)
    return model


def train(model, schedule, config, draw, say, backward):
    """`backward(model, x, y)` leaves the gradients and returns the loss, the last of which is returned."""
    optimizer, loss = make_optimizer(model, schedule, next(model.parameters()).device), torch.tensor(torch.nan)
    bar = trange(schedule.steps, desc=say, disable=True if config.workers > 1 else None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule) * group["lr_scale"]
        loss = backward(model, *draw(config.batch_size))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def answer(model, x, y):
    loss = F.cross_entropy(model(x)[0][:, -1], y)
    loss.backward()
    return loss


def imitation(model, x, y):
    return imitate(model, x, nullcontext(), learn=True)[:, 0].mean()


def teacher(seed, config, device):
    """The weights of the softmax model of this seed: kept, or trained now."""
    path, expected = Path(config.teachers) / f"softmax-{seed}.pt", settings(config, "distill", "finetune", "map_lr")
    kept = torch.load(path, map_location=device) if path.exists() else {}
    if kept.get("settings") != expected:
        run(("scratch", "softmax", seed), config)
        kept = torch.load(path, map_location=device)
    return kept["model"]


def run(job, config):
    """Train one model on the last token of fresh rows, or convert one, and test it on others. -> its row."""
    start, name, seed = job
    device, _, _ = pick_device(config.device, "float32")
    if config.workers > 1:
        torch.set_num_threads(max(1, os.cpu_count() // config.workers))
    weights = teacher(seed, config, device) if start == "softmax" else {}
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(make_rows, length=config.length, vocabulary=config.vocabulary, generator=generator)
    test, began, label = draw(config.test_rows), time.perf_counter(), f"{name}, seed {seed}"
    model, row = new_model(name, seed, config, device), dict(attention=name, seed=seed, guess=guess(*test))
    schedule = TrainConfig(lr=config.lr, steps=config.steps, warmup=config.warmup, map_lr_scale=config.map_lr_scale,
                           weight_decay=config.weight_decay, beta2=config.beta2)
    if weights:
        model.load_state_dict(weights, strict=False)                                      # all but the maps
        row |= dict(attention=f"{name}, converted", swapped=accuracy(model, *test))
        if maps_of(model):
            model.requires_grad_(False)
            for p in maps_of(model).values():
                p.requires_grad_(True)
            distill = replace(schedule, lr=config.distill_lr, steps=config.distill_steps, warmup=0, weight_decay=0.0)
            row["imitation_loss"] = train(model, distill, config, draw, f"{label}, distilling", imitation)
            row["distilled"] = accuracy(model, *test)
            model.requires_grad_(True)
        schedule = replace(schedule, lr=config.finetune_lr, steps=config.finetune_steps)
    row["loss"] = train(model, schedule, config, draw, label, answer)
    if name == "softmax":
        kept = dict(model=model.state_dict(), settings=settings(config, "distill", "finetune", "map_lr"))
        path = Path(config.teachers) / f"softmax-{seed}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda f: torch.save(kept, f))
    return row | dict(accuracy=accuracy(model, *test), seconds=time.perf_counter() - began)


def main(config):
    names = list(VARIANTS) if config.attention == "all" else [config.attention]
    starts = ("scratch", "softmax") if config.start == "both" else (config.start,)
    jobs = [job for job in itertools.product(starts, names, range(config.seeds)) if job[:2] != ("softmax", "softmax")]
    out, about = Path(config.out), settings(config) | provenance(pick_device(config.device, "float32")[0])
    again = {name if start == "scratch" else f"{name}, converted" for start, name, _ in jobs}
    rows = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in rows if row["attention"] not in again and settings(config).items() <= row.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(config.workers, maxtasksperchild=1) if config.workers > 1 else nullcontext() as pool:
        results = partial(pool.imap, chunksize=1) if pool else map
        for row in tqdm(results(partial(run, config=config), jobs), total=len(jobs), unit="run",
                        disable=None if pool else True):
            mine = [r for r in rows if r["attention"] == row["attention"] and r["seed"] != "mean"] + [row]
            mean = dict(attention=row["attention"], seed="mean", accuracy=sum(r["accuracy"] for r in mine) / len(mine))
            rows = [r for r in rows if (r["attention"], r["seed"]) != (row["attention"], "mean")]
            rows += [dict(r, **about) for r in (row, mean)]
            save_json(out, rows)                                                          # a stopped run keeps its rows
            tqdm.write(f"{row['attention']:23} seed {row['seed']}: {100 * row['accuracy']:5.1f} % "
                       f"(guessing: {100 * row['guess']:.1f} %), {row['seconds']:.0f} s")
    print("\n".join(f"{row['attention']:23} {100 * row['accuracy']:5.1f} %   paper "
                    f"{PAPER.get(row['attention'].removesuffix(', converted'), '-')}"
                    for row in rows if row["seed"] == "mean"))
    plot.draw(plot.associative_recall, out)


if __name__ == "__main__":
    cli(lambda: main(parse_config(RecallConfig)))
