"""Associative recall: which attention can look up what it has read? The paper's smallest test of spiky attention.

    python experiments/associative_recall.py --attention hedgehog             three seeds of one
    python experiments/associative_recall.py --device cuda --workers 8        the whole table

A row lists key value key value ... => key, and the model must name that key's value. Every row draws its own map from
keys to values, so nothing can be learned by heart but the looking up: find where the key stood, and copy what stood
behind it. A model that cannot may still name some value of the row, which is right in `guess` of the rows.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm, trange

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
import plot  # noqa: E402
from hedgehog import GPT, GPTConfig  # noqa: E402
from train_gpt import (  # noqa: E402
    TrainConfig, cli, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance, save_json)

KINDS = ("softmax", "hedgehog", "hedgehog_exp", "taylor", "t2r", "elu", "relu", "performer", "cosformer")
VARIANTS = {kind: dict(attention=kind) for kind in KINDS}
VARIANTS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}
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
    steps: int = opt(3000, "optimizer steps")
    batch_size: int = opt(64, "rows a step")
    lr: float = opt(1e-3, "peak learning rate")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps, times --lr")
    warmup: int = opt(100, "steps of linear warm-up; a cosine to a tenth of --lr follows")
    weight_decay: float = opt(0.1, "on matrices only")
    beta2: float = opt(0.99, "AdamW's second moment")
    clip: float = opt(1.0, "largest norm of the gradient")
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


def run(job, config):
    """Train one model on the last token of fresh rows, test it on others. -> its row of the results."""
    name, seed = job
    device, _, _ = pick_device(config.device, "float32")
    if config.workers > 1:
        torch.set_num_threads(max(1, os.cpu_count() // config.workers))
    task = (config.length, config.vocabulary, torch.Generator(device).manual_seed(seed))
    test = make_rows(config.test_rows, *task)
    torch.manual_seed(seed)
    # An output matrix of its own, so that the embeddings can begin larger than GPT-2's, and logits do not.
    model = GPT(GPTConfig(config.length, config.vocabulary + 1, config.n_layer, config.n_head, config.n_embd,
                          tie_head=False, **VARIANTS[name])).to(device)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        torch.nn.init.normal_(embedding.weight, std=config.embedding_std)
    schedule = TrainConfig(lr=config.lr, steps=config.steps, warmup=config.warmup, map_lr_scale=config.map_lr_scale,
                           weight_decay=config.weight_decay, beta2=config.beta2)
    optimizer, start, loss = make_optimizer(model, schedule, device), time.perf_counter(), torch.tensor(torch.nan)
    bar = trange(config.steps, desc=f"{name}, seed {seed}", disable=True if config.workers > 1 else None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule) * group["lr_scale"]
        x, y = make_rows(config.batch_size, *task)
        loss = F.cross_entropy(model(x)[0][:, -1], y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return dict(attention=name, seed=seed, accuracy=accuracy(model, *test), guess=guess(*test), loss=loss.item(),
                seconds=time.perf_counter() - start)


def main(config):
    names = list(VARIANTS) if config.attention == "all" else [config.attention]
    device, _, _ = pick_device(config.device, "float32")
    out = Path(config.out)
    setting = {k: v for k, v in asdict(config).items() if k not in ("attention", "seeds", "device", "workers", "out")}
    about = setting | provenance(device)
    rows = json.loads(out.read_text()) if out.exists() else []
    rows = [row for row in rows if row["attention"] not in names and setting.items() <= row.items()]
    jobs, spawn = list(itertools.product(names, range(config.seeds))), multiprocessing.get_context("spawn")
    out.parent.mkdir(parents=True, exist_ok=True)
    with spawn.Pool(config.workers) if config.workers > 1 else nullcontext() as pool:
        results = (pool.imap if pool else map)(partial(run, config=config), jobs)
        for row in tqdm(results, total=len(jobs), unit="run", disable=None if pool else True):
            mine = [r for r in rows if r["attention"] == row["attention"] and r["seed"] != "mean"] + [row]
            mean = dict(attention=row["attention"], seed="mean", accuracy=sum(r["accuracy"] for r in mine) / len(mine))
            rows = [r for r in rows if (r["attention"], r["seed"]) != (row["attention"], "mean")]
            rows += [dict(r, **about) for r in (row, mean)]
            save_json(out, rows)                                                          # a stopped run keeps its rows
            tqdm.write(f"{row['attention']:13} seed {row['seed']}: {100 * row['accuracy']:5.1f} % "
                       f"(guessing: {100 * row['guess']:.1f} %), {row['seconds']:.0f} s")
    print("\n".join(f"{row['attention']:13} {100 * row['accuracy']:5.1f} %   paper {PAPER.get(row['attention'], '-')}"
                    for row in rows if row["seed"] == "mean"))
    plot.draw(plot.associative_recall, out)


if __name__ == "__main__":
    cli(lambda: main(parse_config(RecallConfig)))
