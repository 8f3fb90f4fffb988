"""One run of associative_recall.py: the task's rows, a model that learns to answer them, a softmax model converted.

`run` returns what was measured, a row of the results; `with_means` adds the means over seeds.
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from convert_gpt2 import imitate, maps_of, swap
from hedgehog import GPT, GPTConfig
from train_gpt import TrainConfig, learning_rate, make_optimizer, pick_device

KINDS = ("softmax", "hedgehog", "hedgehog_exp", "taylor", "t2r", "elu", "relu", "performer", "cosformer")
VARIANTS = {kind: dict(attention=kind) for kind in KINDS}
VARIANTS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}
# W starts at D^(1/4), D = 64, where the first attention is as peaked as softmax's (hedgehog.FeatureMap says why).
VARIANTS |= {f"{kind} W=2.8": dict(attention=kind, map_scale=64 ** 0.25) for kind in ("hedgehog", "hedgehog_exp")}
RESULTS = ("guess", "accuracy", "swapped", "distilled", "converted")
NUMBERS = (*RESULTS, "loss", "kl", "seconds")  # of which a row of means has the means


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
