"""Associative recall: which attention can look up what it has read? The paper's smallest test of spiky attention.

    python experiments/associative_recall.py --attention hedgehog --workers 2     one, three seeds
    python experiments/associative_recall.py --device cuda --workers 12           the whole table

A row lists key value key value ... => key, and the model must name that key's value. Every row draws its own map from
keys to values, so nothing can be learned by heart but the looking up: find where the key stood, and copy what stood
behind it. A model that cannot may still name some value of the row, which is right in `guess` of the rows.

Two questions. Does an attention learn it from scratch (`accuracy`)? And can it do what softmax has learned? For this a
trained softmax model of the same seed is converted: its attention swapped (`swapped`), the maps distilled, where there
are any (`distilled`), then everything finetuned (`converted`). So one attention alone trains softmax first, too.
"""

import json
import math
import multiprocessing
import os
import queue
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
import plot  # noqa: E402
from convert_gpt2 import imitate, maps_of, swap  # noqa: E402
from hedgehog import GPT, GPTConfig  # noqa: E402
from train_gpt import (  # noqa: E402
    TrainConfig, cli, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance, save_json)

KINDS = ("softmax", "hedgehog", "hedgehog_exp", "taylor", "t2r", "elu", "relu", "performer", "cosformer")
VARIANTS = {kind: dict(attention=kind) for kind in KINDS}
VARIANTS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}
PAPER = {"softmax": 100, "hedgehog": 100, "taylor": 100, "elu": 17.0, "performer": 17.0, "cosformer": 17.0}  # percent
RESULTS = ("guess", "accuracy", "swapped", "distilled", "converted")
NUMBERS = (*RESULTS, "loss", "kl", "seconds")  # of which a row of means has the means


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
    out: str = opt("experiments/results/associative_recall.json", "the rows; the figure goes beside it")

    def __post_init__(self):
        if self.length < 4 or self.length % 2 or self.vocabulary < 4 or self.vocabulary % 2:
            raise ValueError("--length and --vocabulary must be even and at least 4, got "
                             f"{self.length} and {self.vocabulary}")
        if min(self.seeds, self.steps, self.workers, self.distill_steps, self.finetune_steps) < 1:
            raise ValueError("--seeds, --steps, --workers, --distill-steps and --finetune-steps must be at least 1")


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


def train(model, schedule, draw, batch_size, backward):
    """`backward(x, y)` leaves the gradients and returns the loss, the last of which is returned."""
    optimizer = make_optimizer(model, schedule, next(model.parameters()).device)
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule) * group["lr_scale"]
        loss = backward(*draw(batch_size))
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def taylor(q, k, v):
    """Taylor attention by its weights 1 + s + s^2 / 2, s = q.k / sqrt(D): the sums of its 1 + D + D^2 features, which
    for rows this short are a hundred times the work. (B, H, T, D) -> (B, H, T, D)"""
    s = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    w = (1 + s + s * s / 2).tril()
    return w @ v / w.sum(dim=-1, keepdim=True)


def by_weights(model):
    """The GPT with `taylor` in place of its Taylor features, if it has them; the same function."""
    for block in model.transformer.h:
        if block.attn.linear is not None and block.attn.linear.map_q.kind == "taylor":
            block.attn.linear.forward = taylor
    return model


def run(job, config):
    """Train a model from scratch, and convert the softmax model that is given. -> the row, the model from scratch."""
    (name, seed, teacher), device = job, pick_device(config.device, "float32")[0]
    if config.workers > 1:
        torch.set_num_threads(max(1, os.cpu_count() // config.workers))
    generator, began = torch.Generator(device).manual_seed(seed), time.perf_counter()
    draw = partial(make_rows, length=config.length, vocabulary=config.vocabulary, generator=generator)
    test = draw(config.test_rows)
    row = dict(attention=name, seed=seed, guess=guess(*test))

    def answer(x, y):  # of `model`, which is looked up at the call
        loss = F.cross_entropy(model(x)[0][:, -1], y)
        loss.backward()
        return loss

    def imitation(x, y):  # sends gradients to the maps alone
        cross_entropy, entropy = imitate(model, x, nullcontext(), learn=True).mean(dim=0)
        return cross_entropy - entropy

    schedule = TrainConfig(lr=config.lr, steps=config.steps, warmup=config.warmup, weight_decay=0.1, beta2=0.99)
    torch.manual_seed(seed)
    # An output matrix of its own, so that the embeddings can begin larger than GPT-2's, and logits do not.
    model = GPT(GPTConfig(config.length, config.vocabulary + 1, config.n_layer, config.n_head, config.n_embd,
                          tie_head=False, **VARIANTS[name])).to(device)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        torch.nn.init.normal_(embedding.weight, std=config.embedding_std)
    by_weights(model)
    row["loss"] = train(model, replace(schedule, map_lr_scale=config.map_lr_scale), draw, config.batch_size, answer)
    row["accuracy"], scratch = accuracy(model, *test), model
    if teacher:
        model = swap(teacher, SimpleNamespace(block_size=0, seed=seed, maps="", **VARIANTS[name])).to(device)
        by_weights(model)
        row["swapped"] = accuracy(model, *test)
        if maps_of(model):
            distill = replace(schedule, lr=config.distill_lr, steps=config.distill_steps, warmup=0, weight_decay=0.0)
            row["kl"] = train(model, distill, draw, config.batch_size, imitation)         # nats, mean of the layers
            row["distilled"] = accuracy(model, *test)
        finetune = replace(schedule, lr=config.finetune_lr, steps=config.finetune_steps,
                           warmup=config.finetune_steps // 20)
        train(model, finetune, draw, config.batch_size, answer)
        row["converted"] = accuracy(model, *test)
    return row | dict(seconds=time.perf_counter() - began), scratch.cpu()


def with_means(rows):
    """The rows and one more an attention, with `seed` = "mean"; in the order of VARIANTS."""
    out = []
    for name in VARIANTS:
        mine = sorted((row for row in rows if row["attention"] == name), key=lambda row: row["seed"])
        if mine:
            means = {key: sum(row[key] for row in mine) / len(mine) for key in NUMBERS if key in mine[0]}
            out += [*mine, mine[0] | means | dict(seed="mean")]
    return out


def main(config):
    machine = ("attention", "seeds", "device", "workers", "out")
    setting = {key: value for key, value in asdict(config).items() if key not in machine}
    out, about = Path(config.out), setting | provenance(pick_device(config.device, "float32")[0])
    rows = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in rows if row["seed"] != "mean" and setting.items() <= row.items()]
    done = {(row["attention"], row["seed"]) for row in rows}                              # by a run that was stopped
    names = list(VARIANTS) if config.attention == "all" else [config.attention]
    wanted = [(name, seed) for name in names for seed in range(config.seeds) if (name, seed) not in done]
    teachers = sorted({seed for name, seed in wanted})
    out.parent.mkdir(parents=True, exist_ok=True)
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
    plot.draw(plot.associative_recall, out)


if __name__ == "__main__":
    cli(lambda: main(parse_config(RecallConfig)))
