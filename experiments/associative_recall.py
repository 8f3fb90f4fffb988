"""Associative recall: which attention can look up what it has read? The paper's smallest test of spiky attention.

    python experiments/associative_recall.py                                 every attention, three seeds each
    python experiments/associative_recall.py --attention hedgehog            this one

A row lists key value key value ... => key, and the model must name that key's value. Every row draws its own map from
keys to values, so that nothing can be learned by heart but the act of looking up: find where the key stood, and copy
what stood behind it. That takes attention rows with nearly all their weight on one token.
"""

import dataclasses
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import trange

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
import plot  # noqa: E402
from hedgehog import GPT, GPTConfig  # noqa: E402
from train_gpt import (  # noqa: E402
    cli, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance, save_json)

KINDS = ("softmax", "hedgehog", "hedgehog_exp", "taylor", "t2r", "elu", "relu", "performer", "cosformer")
VARIANTS = {name: dict(attention=name) for name in KINDS}
VARIANTS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}


@dataclass
class RecallConfig:
    attention: str = opt("all", "which one, or all", ("all", *VARIANTS))
    seeds: int = opt(3, "runs of each, with seeds 0, 1, ...")
    vocabulary: int = opt(40, "tokens: the first half are keys, the second half values (=> is one more)")
    length: int = opt(32, "tokens a row, an even number")
    train_rows: int = opt(10000, "rows to learn from, again and again; 0: fresh rows at every step")
    test_rows: int = opt(2000, "fresh rows to be tested on")
    n_layer: int = opt(2, "layers")
    n_head: int = opt(1, "heads a layer")
    n_embd: int = opt(32, "model width")
    tie_head: bool = opt(False, "one matrix for the embedding and the output")
    steps: int = opt(4000, "optimizer steps")
    batch_size: int = opt(256, "rows a step")
    lr: float = opt(2e-3, "peak learning rate")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps, times --lr")
    warmup: int = opt(100, "steps of linear warm-up; a cosine to a tenth of --lr follows")
    weight_decay: float = opt(0.1, "on matrices only")
    beta2: float = opt(0.99, "AdamW's second moment")
    clip: float = opt(1.0, "largest norm of the gradient")
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    workers: int = opt(1, "runs at once, each in a process of its own: a GPU has room for a dozen")
    out: str = opt("experiments/results/associative_recall.json", "the rows; the figure goes beside it")


def make_rows(n, length, vocabulary, generator):
    """(rows (n, length) of key value ... => key, their answers (n,)). Keys are below vocabulary / 2, values above."""
    n_keys, n_pairs, draw = vocabulary // 2, length // 2 - 1, dict(generator=generator, device=generator.device)
    value_of = torch.randint(n_keys, vocabulary, (n, n_keys), **draw)                     # each row's own map
    keys = torch.randint(n_keys, (n, n_pairs), **draw)                                    # pairs repeat
    asked = keys.gather(1, torch.randint(n_pairs, (n, 1), **draw))                        # it has occurred
    pairs = torch.stack((keys, value_of.gather(1, keys)), dim=-1).flatten(1)
    return torch.cat((pairs, torch.full_like(asked, vocabulary), asked), dim=1), value_of.gather(1, asked)[:, 0]


def run(config, name, seed):
    """Train one model: its accuracy on rows that it has not seen, between 0 and 1, and the seconds it took."""
    device, start = pick_device(config.device, "float32")[0], time.perf_counter()
    if config.workers > 1:
        torch.set_num_threads(1)
    generator = torch.Generator(device).manual_seed(seed)
    test_x, test_y = make_rows(config.test_rows, config.length, config.vocabulary, generator)
    train_x, train_y = make_rows(config.train_rows or 1, config.length, config.vocabulary, generator)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(config.length, config.vocabulary + 1, config.n_layer, config.n_head, config.n_embd,
                          tie_head=config.tie_head, segment_size=0, **VARIANTS[name])).to(device)
    optimizer = make_optimizer(model, config, device)
    with trange(config.steps, desc=f"{name}, seed {seed}", disable=True if config.workers > 1 else None) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config) * group["lr_scale"]
            if config.train_rows:
                some = torch.randint(config.train_rows, (config.batch_size,), generator=generator, device=device)
                x, y = train_x[some], train_y[some]
            else:
                x, y = make_rows(config.batch_size, config.length, config.vocabulary, generator)
            loss = F.cross_entropy(model(x)[0][:, -1], y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        right = model(test_x)[0][:, -1].argmax(dim=-1) == test_y
    return right.float().mean().item(), time.perf_counter() - start


def main(config):
    if config.length < 4 or config.length % 2:
        raise ValueError(f"--length must be even and at least 4, got {config.length}")
    names = list(VARIANTS) if config.attention == "all" else [config.attention]
    device, _, why = pick_device(config.device, "float32")
    about = dict(config=dataclasses.asdict(config), **provenance(device))
    rows = []
    print(f"chance is {2 / config.vocabulary:.3f}; on {why}")
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:    # CUDA cannot be forked
        submit = pool.submit if config.workers > 1 else lambda f, *x: SimpleNamespace(result=partial(f, *x))
        jobs = {name: [submit(run, config, name, seed) for seed in range(config.seeds)] for name in names}
        for name in names:
            accuracy, seconds = zip(*(job.result() for job in jobs[name]))
            rows += [dict(attention=name, seed=seed, accuracy=a, seconds=t, **about)
                     for seed, (a, t) in enumerate(zip(accuracy, seconds))]
            rows.append(dict(attention=name, seed="mean", accuracy=mean(accuracy), seconds=mean(seconds), **about))
            print(f"{name:14} {mean(accuracy):.3f}   {' '.join(f'{a:.3f}' for a in accuracy)}   "
                  f"{mean(seconds):.0f} s a seed", flush=True)
            save_json(Path(config.out), rows)
    plot.draw(plot.associative_recall, Path(config.out))


if __name__ == "__main__":
    cli(lambda: main(parse_config(RecallConfig)))
