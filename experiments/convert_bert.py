"""Turn a finetuned BERT into a linear one, and see how much of its GLUE score survives. The paper's second regime.

    python experiments/convert_bert.py --task cola mrpc                          any BERT of the Hugging Face hub
    python experiments/convert_bert.py --model FOLDER --data FOLDER              one on disk, and GLUE's files on disk
    python experiments/convert_bert.py --task mrpc --limit 500 --seeds 0         a first look, minutes on a CPU

Three stages, for each task and seed: finetune softmax, which becomes the teacher; swap its attention and let the new
feature maps learn the teacher's attention weights on the task's own text; finetune again. Softmax is finetuned again
too. Every stage keeps the epoch that was best on a tenth of the training rows that nothing learns from, so the split
that is reported (GLUE's dev, MRPC's test if its original files are given) chooses nothing.

`swap(model)` is all that another program needs: it gives any transformers BERT this attention, and `restore(model)`
takes it away again.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
from data import glue  # noqa: E402
from hedgehog import FEATURE_MAPS, FeatureMap, linear_attention  # noqa: E402
from train_gpt import (  # noqa: E402
    cli, flag, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance,
    save_json, write_atomically)

try:
    import transformers
    from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention
    missing = glue.missing
except ImportError as e:
    missing = e.name

PAPER = {"hedgehog": 99.3, "t2r": 89}  # % of BERT's score recovered, mean over GLUE
UNDISTILLED = "-undistilled"
ATTENTIONS = ("softmax", *FEATURE_MAPS, *(kind + UNDISTILLED for kind in ("hedgehog", "hedgehog_exp", "t2r")))


@dataclass
class BertConfig:
    model: str = opt("google-bert/bert-base-uncased", "a BERT on the Hugging Face hub, or a folder with one")
    task: tuple = opt(("cola", "mrpc"), "of GLUE", tuple(glue.TASKS))
    data: str = opt("data/glue", "folder with CoLA/train.tsv and the like; what it lacks is downloaded into it")
    attentions: tuple = opt(("softmax", "hedgehog", "t2r", "elu", "hedgehog-undistilled"), "feature maps", ATTENTIONS)
    seeds: tuple = opt((0, 1, 2), "of the classifier, the order of the rows and dropout")
    limit: int = opt(0, "use so many rows of every split, drawn once and for all; 0: all")
    max_length: int = opt(128, "tokens at which a row is cut")
    batch_size: int = opt(32, "rows a step")
    # stage 0: finetune softmax
    teacher_epochs: int = opt(10, "most epochs of it; 0: the model is finetuned already")
    teacher_lr: float = opt(1e-4, "peak learning rate")
    # stage 1: the maps alone learn to imitate softmax's weights
    distill_epochs: int = opt(10, "most epochs of it; 0: no distillation")
    distill_lr: float = opt(1e-2, "peak learning rate")
    # stage 2: finetune with the new attention, and softmax as long
    epochs: int = opt(10, "most epochs of it")
    lr: float = opt(1e-4, "peak learning rate")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps, times --lr")
    # all stages
    patience: int = opt(10, "epochs without a better score on the held-out rows after which a stage ends")
    warmup: float = opt(0.1, "part of the steps in which the learning rate rises; a cosine to a tenth follows")
    weight_decay: float = opt(0.01, "on matrices, while finetuning")
    clip: float = opt(1.0, "largest norm of the gradient; in stage 1 of each layer's")
    # machine
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = opt("auto", "of the matrix products; maps and stage 1's loss are float32 always",
                     ("auto", "float32", "bfloat16"))
    workers: int = opt(1, "conversions at once, each a process, on one GPU too")
    teachers: str = opt("runs/bert", "folder for the finetuned softmax models, from which an interrupted run goes on")
    out: str = opt("experiments/results/bert.json", "the rows")

    def __post_init__(self):
        least = dict(limit=0, max_length=8, batch_size=1, teacher_epochs=0, distill_epochs=0, epochs=0, teacher_lr=0,
                     distill_lr=0, lr=0, map_lr_scale=0, patience=1, warmup=0, weight_decay=0, workers=1)
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise ValueError(f"{flag(name)} must be at least {smallest}, got {getattr(self, name)}")
        if self.warmup > 1 or not self.clip > 0 or min(self.seeds) < 0:
            raise ValueError(f"--warmup {self.warmup} must be at most 1, --clip {self.clip} above 0, --seeds "
                             f"{' '.join(map(str, self.seeds))} not negative")


# ---------------------------------------------------------------------------------------------------------------------
# The attention, and how to get it into a BERT


class LinearBertAttention(nn.Module):
    """Stands where BertSelfAttention stood, with the same query, key and value: x (B, T, C) -> (B, T, C), in O(T).

        y_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)        s: all words of the row, no padding

    Every query sees every key. phi(k) is zero where there is padding, which takes it out of numerator and denominator
    alike: a row gives the same numbers however it is padded, on the left or on the right. (With padding on the left
    BERT needs `position_ids` that begin at the first word, and its pooler, which reads place 0, must be told where
    the first word is; both are so with softmax too.) No dropout of attention weights: they are never formed.
    """

    def __init__(self, softmax, kind="hedgehog", max_len=512, shared=None):
        super().__init__()
        self.query, self.key, self.value = softmax.query, softmax.key, softmax.value
        self.map_q = FeatureMap(softmax.num_attention_heads, softmax.attention_head_size, kind, max_len=max_len)
        self.map_k = self.map_q if self.map_q.weight is None else FeatureMap(
            softmax.num_attention_heads, softmax.attention_head_size, kind, max_len=max_len)
        self.softmax = (softmax,)  # in a tuple, so that its weights are not counted, saved and trained twice
        self.first, self.shared = shared is None, {} if shared is None else shared
        self.losses = None  # a list while distilling

    def forward(self, x, attention_mask=None, *args, **kwargs):
        refused = [name for name, value in kwargs.items() if value is not None and value is not False and
                   name in ("cache", "past_key_values", "past_key_value", "encoder_hidden_states", "head_mask",
                            "output_attentions", "cu_seq_lens_q")]
        if refused or any(value is not None and value is not False for value in args):
            raise ValueError(f"the linear attention of an encoder cannot honour {', '.join(refused) or 'this call'}: "
                             "leave it out, or restore(model) first")
        q, k, v = (project(x).unflatten(-1, (-1, self.map_q.head_dim)).transpose(1, 2)
                   for project in (self.query, self.key, self.value))                     # (B, H, T, D)
        keep = self.words(attention_mask, x)                                              # (B, T), or None
        if self.losses is not None:  # stage 1: the maps learn, and what is passed on is the teacher's
            q, k = q.detach(), k.detach()
            self.losses.append(torch.stack(imitation_loss(q, k, self.map_q(q, is_query=True), self.map_k(k), keep)))
            return self.softmax[0](x, attention_mask, *args, **kwargs)
        phi_q, phi_k = self.map_q(q, is_query=True), self.map_k(k)                        # (B, H, T, P)
        if keep is not None:
            phi_k = phi_k.masked_fill(~keep[:, None, :, None], 0)
        y = linear_attention(phi_q, phi_k, v.to(phi_q.dtype), causal=False)
        return y.to(v.dtype).transpose(1, 2).flatten(2), None

    def words(self, mask, x):
        """`key_words`, found by the first layer for all: looking at a mask on a GPU is a wait."""
        if self.first or self.shared.get("mask") is not mask:
            self.shared.update(mask=mask, keep=key_words(mask, *x.shape[:2]))
        return self.shared["keep"]


def key_words(mask, B, T):
    """(B, T), False where there is padding, from whatever mask transformers hands to an attention; None: no padding.

    Linear attention has one sum over the keys for all queries and heads, so that a mask may only leave out keys.
    Raises ValueError for any other: causal, different from query to query or head to head, or with a bias.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"the mask is a {type(mask).__name__}, of flex attention, which linear attention cannot "
                         "honour: load the model with attn_implementation='sdpa'")
    shape = tuple(mask.shape)
    if mask.ndim == 2:  # the tokenizer's own, 1 for a word (flash attention)
        mask = mask.bool()[:, None, None]
    elif mask.is_floating_point():  # is added to q.k (eager)
        if ((mask != 0) & (mask > -1e4)).any():
            raise ValueError("the mask adds a bias to q.k, which linear attention never forms: only padding can be "
                             "honoured")
        mask = mask == 0
    mask = mask.bool()  # True for what is seen (sdpa)
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[2] not in (1, T) or mask.shape[3] != T:
        raise ValueError(f"a mask of shape {shape} does not fit {B} rows of {T} tokens")
    keep = mask[:, :1, :1]                                                                # (B, 1, 1, T)
    if mask.shape != keep.shape and not (mask == keep).all():
        causal = T > 1 and mask.shape[2] == T and not mask.triu(1).any()
        kind = "causal" if causal else "different from query to query or from head to head"
        raise ValueError(f"the mask is {kind}, and the bidirectional sum has one set of keys for all queries: only "
                         "padding can be honoured")
    return keep[:, 0, 0].expand(B, T)


def swap(model, kind="hedgehog", maps=None):
    """Give every self-attention of a transformers BERT, in place, linear attention with fresh maps, or `maps`.

    maps: what `maps_of` gave for a model of this shape. ValueError if the model is no encoder-only BERT.
    """
    config, layers = model.config, [m for m in model.modules() if isinstance(m, BertAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is of the {getattr(config, 'model_type', '?')} architecture: only "
                         "bert is supported, such as BertForSequenceClassification")
    if config.is_decoder or not all(isinstance(layer.self, BertSelfAttention) for layer in layers):
        raise ValueError("this BERT is a decoder or swapped already: an encoder is needed, after restore(model)")
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation not in ("eager", "sdpa"):
        raise ValueError(f"the model was loaded with attn_implementation={implementation!r}, whose masks cannot be "
                         "honoured: load it with 'sdpa' or 'eager'")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise ValueError(f"position_embedding_type={config.position_embedding_type!r} adds to q.k, which linear "
                         "attention never forms: only 'absolute' is supported")
    shared = None
    for layer in layers:
        p = layer.self.query.weight
        new = LinearBertAttention(layer.self, kind, config.max_position_embeddings, shared)
        layer.self, shared = new.to(p.device, p.dtype).train(layer.self.training), new.shared
    if maps is not None:
        own = maps_of(model)
        if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in maps.items()}:
            H, D = new.map_q.n_head, new.map_q.head_dim
            shapes = sorted({tuple(p.shape) for p in maps.values()})
            restore(model)
            raise ValueError(f"the maps do not fit {len(layers)} layers of {H} heads of width {D} with the {kind} map: "
                             f"there are {len(maps)}, of shape {' '.join(map(str, shapes))}")
        model.load_state_dict(maps, strict=False)
    return model


def restore(model):
    """The inverse of `swap`: softmax again, to the bit, with the weights that the model now has."""
    for layer in model.modules():
        if isinstance(layer, BertAttention) and isinstance(layer.self, LinearBertAttention):
            layer.self = layer.self.softmax[0].train(layer.self.training)
    return model


def maps_of(model):
    return {name: p for name, p in model.named_parameters() if ".map_" in name}


def imitation_loss(q, k, phi_q, phi_k, keep=None, bounds=(1e-37, 1e34)):
    """(cross-entropy of the linear weights under softmax's, entropy of softmax's): means over words, heads and batch.

    convert_gpt2.imitation_loss without its causal mask, and with keep (B, T), False for padding: it is neither a key
    nor a query. The bounds are inside the sum too, so that the entropy is a floor: the reason is told there.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(phi_q.dtype), k.to(phi_k.dtype)                                       # float32 at least
        keep = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if keep is None else keep
        padding = ~keep[:, None, None]                                                    # (B, 1, 1, T)
        s = q @ k.mT / math.sqrt(q.shape[-1])                                             # (B, H, T, T), as all below
        log_p = s.masked_fill(padding, -1e30).log_softmax(-1)
        p = log_p.exp().masked_fill(padding, 0)
        a = (phi_q @ phi_k.mT).clamp(*bounds)
        log_a_sum = a.masked_fill(padding, 0).sum(-1, keepdim=True).clamp(min=bounds[0]).log()
        weight = keep[:, None] / (keep.sum() * q.shape[1])                                # (B, 1, T), of a query
        return (((p * (log_a_sum - a.log())).sum(-1) * weight).sum(), (-(p * log_p).sum(-1) * weight).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Rows and batches


class Rows(NamedTuple):
    ids: torch.Tensor  # (N, T), zero past the end of a row
    types: torch.Tensor  # (N, T), 0 for the first sentence, 1 for the second
    lengths: np.ndarray  # (N,)
    labels: torch.Tensor  # (N,)


def tokenize(tokenizer, rows, max_length, device):
    first, *second = zip(*(text for text, _ in rows))
    encoded = tokenizer(list(first), *map(list, second), truncation=True, max_length=max_length)
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    lengths = np.array([len(x) for x in ids])
    padded = torch.zeros(2, len(rows), lengths.max(), dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[0, i, :n] = torch.tensor(ids[i])
        padded[1, i, :n] = torch.tensor(types[i]) if types else 0
    labels = torch.tensor([label for _, label in rows])
    return Rows(*padded.to(device), lengths, labels.to(device))


def load_rows(task, tokenizer, config, device):
    """{"train": Rows, "held out": ..., and the reported splits}. A tenth of the training rows is held out, 2,000 at
    most, by a draw that is the same for every seed and attention."""
    train, reported = glue.find_files(task, config.data)
    rows = {"train": glue.read_rows(task, train)} | {path.stem: glue.read_rows(task, path) for path in reported}
    for split, those in rows.items():
        order = np.random.default_rng(0).permutation(len(those))[:config.limit or None]
        rows[split] = [those[i] for i in order]
    n = min(2000, math.ceil(len(rows["train"]) / 10))
    rows["held out"], rows["train"] = rows["train"][:n], rows["train"][n:]
    if not rows["train"]:
        raise ValueError(f"{train} has no row left to train on: raise --limit")
    return {split: tokenize(tokenizer, those, config.max_length, device) for split, those in rows.items()}


def batches(rows, batch_size, generator=None, pool=50):
    """Yield (inputs of a BERT, labels), rows of about one length together. A generator (of numpy) shuffles them.

    With it, `pool` batches at a time are sorted by length, and their order is drawn again.
    """
    N = len(rows.lengths)
    order = np.arange(N) if generator is None else generator.permutation(N)
    pools = [order] if generator is None else np.split(order, range(pool * batch_size, N, pool * batch_size))
    parts = []
    for those in pools:
        those = those[np.argsort(rows.lengths[those], kind="stable")]
        parts += np.split(those, range(batch_size, len(those), batch_size))
    for part in parts if generator is None else [parts[i] for i in generator.permutation(len(parts))]:
        T = min(rows.ids.shape[1], -(-int(rows.lengths[part].max()) // 8) * 8)
        index = torch.from_numpy(part).to(rows.ids.device)
        lengths = torch.from_numpy(rows.lengths[part]).to(rows.ids.device)
        mask = (torch.arange(T, device=rows.ids.device) < lengths[:, None]).long()
        yield dict(input_ids=rows.ids[index, :T], token_type_ids=rows.types[index, :T], attention_mask=mask), \
            rows.labels[index]


# ---------------------------------------------------------------------------------------------------------------------
# The stages


@torch.no_grad()
def evaluate(model, rows, task, config, autocast):
    """The task's measures over all rows, the score among them."""
    was_training, logits, labels = model.training, [], []
    model.eval()
    with autocast:
        for inputs, those in batches(rows, 4 * config.batch_size):
            logits.append(model(**inputs).logits.float())
            labels.append(those)
    model.train(was_training)
    logits, labels = torch.cat(logits).cpu().numpy(), torch.cat(labels).cpu().numpy()
    return glue.measure(task, logits.argmax(-1) if glue.TASKS[task].labels else logits[:, 0], labels)


def report(model, rows, task, config, autocast):
    """`evaluate` on the reported split; on MNLI's two, matched and mismatched, the mean is the score."""
    splits = [split for split in rows if split not in ("train", "held out")]
    found = {split: evaluate(model, rows[split], task, config, autocast) for split in splits}
    if len(splits) == 1:
        return found[splits[0]]
    return dict(score=float(np.mean([found[split]["score"] for split in splits])),
                **{f"{name}_{split.removeprefix('dev_')}": value for split in splits
                   for name, value in found[split].items() if name != "score"})


def task_loss(model, inputs, labels):
    logits = model(**inputs).logits.float()
    return F.mse_loss(logits[:, 0], labels) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)


def imitate(model, inputs, labels=None):
    """[cross-entropy, entropy], means over the layers, while the model computes what its softmax teacher computes.

    The two share all but the maps, so the teacher is `model` with softmax's output passed on, and what a layer reads
    depends on no map.
    """
    attentions = [m for m in model.modules() if isinstance(m, LinearBertAttention)]
    for attention in attentions:
        attention.losses = []
    try:
        model(**inputs)
        return torch.stack([attention.losses[0] for attention in attentions]).mean(dim=0)
    finally:
        for attention in attentions:
            attention.losses = None


@torch.no_grad()
def faithfulness(model, rows, config, autocast):
    """{cross_entropy, entropy, kl} in nats on all rows, means over words, heads and layers."""
    total, n_words = 0, 0
    with autocast:
        for inputs, _ in batches(rows, config.batch_size):
            n = inputs["attention_mask"].sum().double().cpu()
            total, n_words = total + imitate(model, inputs).double().cpu() * n, n_words + n
    cross_entropy, entropy = (total / n_words).tolist()
    return dict(cross_entropy=cross_entropy, entropy=entropy, kl=cross_entropy - entropy)


def fit(model, rows, loss, value, groups, stage, config, autocast, device, seed, bar):
    """Epochs of AdamW on what requires a gradient; the weights of the epoch with the best value() survive.

    groups: lists of parameters whose gradients are clipped together. Returns {"epoch": the best, "value": its value}.
    """
    n_steps = math.ceil(len(rows.lengths) / config.batch_size)
    schedule = SimpleNamespace(lr=stage.lr, steps=stage.epochs * n_steps, beta2=0.999, map_lr_scale=stage.map_lr_scale,
                               weight_decay=stage.weight_decay,
                               warmup=round(config.warmup * stage.epochs * n_steps))
    learns, generator = [p for group in groups for p in group], np.random.default_rng(seed)
    optimizer, step, best, latest = make_optimizer(model, schedule, device), 0, None, torch.zeros(())
    bar.reset(total=schedule.steps)
    for epoch in range(stage.epochs + 1):
        now = value()
        if not math.isfinite(now) or not math.isfinite(latest):
            raise ValueError(f"the loss of {bar.desc} is not finite after {epoch} epochs: lower {stage.flag}")
        if best is None or now > best["value"]:
            best, kept = dict(epoch=epoch, value=now), [p.detach().clone() for p in learns]
        bar.set_postfix(held_out=f"{now:.3f}", best=f"{best['value']:.3f} in epoch {best['epoch']}")
        if epoch == stage.epochs or epoch - best["epoch"] >= config.patience:
            break
        for inputs, labels in batches(rows, config.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule) * group["lr_scale"]
            with autocast:
                latest = loss(model, inputs, labels)
            latest.backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
        latest = latest.detach()
    with torch.no_grad():
        for p, saved in zip(learns, kept):
            p.copy_(saved)
    return best


def distill(model, rows, config, autocast, device, seed, bar):
    """Stage 1, in place. Only the maps learn. Returns the faithfulness on the held-out rows."""
    model.eval().requires_grad_(False)                                                    # no dropout in the teacher
    for p in maps_of(model).values():
        p.requires_grad_(True)
    layers = [[p for p in m.parameters() if p.requires_grad] for m in model.modules()  # each a problem of its own
              if isinstance(m, LinearBertAttention)]
    stage = SimpleNamespace(lr=config.distill_lr, epochs=config.distill_epochs, map_lr_scale=1.0, weight_decay=0.0,
                            flag="--distill-lr")
    best = fit(model, rows["train"], lambda *batch: imitate(*batch)[0],
               lambda: -faithfulness(model, rows["held out"], config, autocast)["kl"], layers, stage, config, autocast,
               device, seed, bar)
    model.requires_grad_(True)
    return dict(distill_epoch=best["epoch"], **faithfulness(model, rows["held out"], config, autocast))


def finetune(model, rows, task, config, autocast, device, seed, bar, teacher=False):
    """Stage 0 or 2, in place: all weights, on the task's own loss. Returns {"epoch": ..., "held_out": ...}."""
    names = ("teacher_epochs", "teacher_lr") if teacher else ("epochs", "lr")
    stage = SimpleNamespace(epochs=getattr(config, names[0]), lr=getattr(config, names[1]), flag=flag(names[1]),
                            map_lr_scale=config.map_lr_scale, weight_decay=config.weight_decay)
    torch.manual_seed(seed)                                                               # of dropout
    best = fit(model.train(), rows["train"], task_loss,
               lambda: evaluate(model, rows["held out"], task, config, autocast)["score"], [list(model.parameters())],
               stage, config, autocast, device, seed, bar)
    model.eval()
    return dict(epoch=best["epoch"], held_out=best["value"])


# ---------------------------------------------------------------------------------------------------------------------
# One conversion, and the table of all


def load_bert(config, task):
    """(BertForSequenceClassification with a head for the task, its tokenizer). ValueError says what is wrong."""
    name, about = config.model, glue.TASKS[task]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind != "bert":
            raise ValueError(f"--model {name} is of the {kind} architecture: only bert is supported")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.BertForSequenceClassification.from_pretrained(
            name, num_labels=len(about.labels) or 1, ignore_mismatched_sizes=True, dtype=torch.float32)
    except OSError as e:
        raise ValueError(f"--model {name} cannot be had: give a folder with config.json, model.safetensors and the "
                         "tokenizer's files, or the name of a BERT on the Hugging Face hub and a network "
                         f"({str(e).splitlines()[0]})") from None
    longest = model.config.max_position_embeddings
    if config.max_length > longest:
        raise ValueError(f"--max-length {config.max_length}: this model knows {longest} positions, take at most that")
    return model, tokenizer


@lru_cache(maxsize=2)
def prepared(task, model, data, limit, max_length, device):
    """The rows of a task, tokenized once in a process."""
    config = SimpleNamespace(model=model, data=data, limit=limit, max_length=max_length)
    return load_rows(task, load_bert(config, task)[1], config, device)


def setting(config):
    """What a row of the results depends on, in the form it has in the JSON."""
    left_out = ("task", "attentions", "seeds", "data", "device", "dtype", "workers", "teachers", "out")
    chosen = {k: v for k, v in asdict(config).items() if k not in left_out}
    return chosen | dict(model=Path(config.model).name if Path(config.model).exists() else config.model)


def start(job, config):
    """(rows, model with a head drawn by the seed, device, autocast, bar) of one conversion."""
    task, seed = job[0], job[-1]
    device, dtype, _ = pick_device(config.device, config.dtype)
    if config.workers > 1:
        torch.set_num_threads(max(1, os.cpu_count() // config.workers))
    rows = prepared(task, config.model, config.data, config.limit, config.max_length, device)
    torch.manual_seed(seed)
    model = load_bert(config, task)[0].to(device)
    bar = tqdm(desc=" ".join(map(str, job)), unit="step", leave=False, disable=True if config.workers > 1 else None)
    return rows, model, device, torch.autocast(device.type, dtype) if dtype else nullcontext(), bar


def teacher_path(job, config):
    """One file for each task, seed and setting of stage 0."""
    chosen = {k: v for k, v in setting(config).items()
              if not k.startswith("distill") and k not in ("epochs", "lr", "map_lr_scale")}
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]
    return Path(config.teachers) / f"{'-'.join(map(str, job))}-{digest}.pt"


def teach(job, config):
    """Stage 0 of (task, seed): finetune softmax and keep it in --teachers, unless it is there."""
    path = teacher_path(job, config)
    if path.exists():
        return
    began = time.perf_counter()
    rows, model, device, autocast, bar = start(job, config)
    about = finetune(model, rows, job[0], config, autocast, device, job[1], bar, teacher=True)
    about |= report(model, rows, job[0], config, autocast) | dict(seconds=time.perf_counter() - began)
    bar.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda f: torch.save(dict(model=model.state_dict(), about=about), f))


def run(job, config):
    """Stages 1 and 2 of (task, attention, seed), from the saved teacher. -> its part of the results."""
    task, attention, seed = job
    began = time.perf_counter()
    rows, model, device, autocast, bar = start(job, config)
    teacher = torch.load(teacher_path((task, seed), config), map_location=device, weights_only=True)
    model.load_state_dict(teacher["model"])
    stages, about = {"teacher": teacher["about"]["score"]}, dict(seed=seed, teacher=teacher["about"])
    if attention != "softmax":
        torch.manual_seed(seed)  # performer draws its features
        swap(model, attention.removesuffix(UNDISTILLED))
        stages["swapped"] = report(model, rows, task, config, autocast)["score"]
        if maps_of(model) and config.distill_epochs and not attention.endswith(UNDISTILLED):
            about |= distill(model, rows, config, autocast, device, seed, bar)
            stages["distilled"] = report(model, rows, task, config, autocast)["score"]
    about |= finetune(model, rows, task, config, autocast, device, seed, bar)
    found = report(model, rows, task, config, autocast)
    bar.close()
    stages["finetuned"] = found["score"]
    return dict(task=task, attention=attention, **about, metrics=found, stages=stages,
                seconds=time.perf_counter() - began)


def summarize(task, attention, runs, about):
    """The row of the results for all seeds of one attention on one task.

    Softmax has two candidates, finetuned once and finetuned twice, and is given the better mean of the two.
    """
    runs = sorted(runs, key=lambda r: r["seed"])
    mean_of = {stage: float(np.mean([r["stages"][stage] for r in runs])) for stage in runs[0]["stages"]}
    counts = ("teacher", "finetuned") if attention == "softmax" else ("finetuned",)
    stage = max(counts, key=mean_of.get)
    scores = [r["stages"][stage] for r in runs]
    return dict(task=task, attention=attention, score=mean_of[stage], std=float(np.std(scores, ddof=len(runs) > 1)),
                seeds=[r["seed"] for r in runs], scores=scores, stage=stage, stages=mean_of,
                seconds=sum(r["seconds"] for r in runs), runs=runs, **about)


def add_recovered(rows):
    """`recovered` in each row: percent of softmax's score on the same task, and the spread of the seeds around it."""
    softmax = {row["task"]: row["score"] for row in rows if row["attention"] == "softmax"}
    for row in rows:
        best = softmax.get(row["task"], 0)
        row["recovered"], row["recovered_std"] = ((100 * row[k] / best if best > 0 else None) for k in ("score", "std"))


def load_results(path, tasks, about):
    """The rows of --out. Those of the tasks of this run must have been made with its settings."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        assert all(row["task"] and row["attention"] and row["runs"] for row in rows)
    except (ValueError, TypeError, LookupError, AssertionError):
        raise ValueError(f"{path} is damaged, or of another experiment: choose another --out") from None
    for row in rows:
        changed = [k for k, v in about.items() if row["task"] in tasks and row.get(k) != v]
        if changed:
            raise ValueError(f"{path} holds rows of {row['task']} made with "
                             f"{', '.join(f'{k}={row.get(k)}' for k in changed)}: give the same "
                             f"{', '.join(map(flag, changed))}, or choose another --out")
    return rows


def table(rows):
    """One line for each task and attention, and the mean over the tasks that have all seeds' scores of it."""
    form = "{:6}{:22}{:>16}{:>18}{:>9}{:>11}{:>11}{:>8}{:>10}".format
    lines = [form("task", "attention", "score", "recovered, %", "swapped", "distilled", "finetuned", "seeds", "s")]
    for row in rows:
        stages = [f"{100 * row['stages'][s]:.1f}" if s in row["stages"] else "-"
                  for s in ("swapped", "distilled", "finetuned")]
        recovered = "-" if row["recovered"] is None else f"{row['recovered']:.1f} ± {row['recovered_std']:.1f}"
        score = f"{100 * row['score']:.1f} ± {100 * row['std']:.1f}"
        lines.append(form(row["task"], row["attention"], score, recovered, *stages, len(row["seeds"]), f"{row['seconds']:.0f}"))
    for attention in dict.fromkeys(row["attention"] for row in rows):
        those = [row["recovered"] for row in rows if row["attention"] == attention and row["recovered"] is not None]
        paper = f", the paper's over GLUE {PAPER[attention]}" if attention in PAPER else ""
        if those and attention != "softmax":
            lines.append(f"{attention}: {np.mean(those):.1f} % of softmax recovered, mean of {len(those)} task"
                         f"{'s' * (len(those) > 1)}{paper}")
    return "\n".join(lines)


def main(config):
    if missing:
        raise ValueError(f"this experiment needs {missing}: pip install -r requirements-experiments.txt")
    device, _, why = pick_device(config.device, config.dtype)
    out, about = Path(config.out), setting(config)
    rows = load_results(out, config.task, about)
    for task in config.task:  # what is wrong is better told now than in a worker
        glue.find_files(task, config.data)
        load_bert(config, task)
    tqdm.write(f"{about['model']} on {why}")
    runs = {(row["task"], row["attention"], r["seed"]): r for row in rows for r in row["runs"]}
    jobs = [job for job in itertools.product(config.task, config.attentions, config.seeds) if job not in runs]
    teachers = list(dict.fromkeys((task, seed) for task, _, seed in jobs))
    about |= provenance(device) | dict(transformers=transformers.__version__)
    out.parent.mkdir(parents=True, exist_ok=True)
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with spawn.Pool(config.workers, *ignore) if config.workers > 1 else nullcontext() as pool:
        every = pool.imap_unordered if pool else map
        taught = every(partial(teach, config=config), teachers)
        list(tqdm(taught, total=len(teachers), unit="teacher", disable=None))
        for r in tqdm(every(partial(run, config=config), jobs), total=len(jobs), unit="run", disable=None):
            task, attention = r.pop("task"), r.pop("attention")
            runs[task, attention, r["seed"]] = r
            row = summarize(task, attention, [r for key, r in runs.items() if key[:2] == (task, attention)], about)
            rows = [row for row in rows if (row["task"], row["attention"]) != (task, attention)] + [row]
            rows.sort(key=lambda row: (list(glue.TASKS).index(row["task"]), ATTENTIONS.index(row["attention"])))
            add_recovered(rows)
            save_json(out, rows)                                                          # a stopped run keeps its rows
            tqdm.write(f"{task} {attention}, seed {r['seed']}: " + ", ".join(
                f"{stage} {100 * score:.1f}" for stage, score in r["stages"].items()) + f" ({r['seconds']:.0f} s)")
    print(table(rows))


if __name__ == "__main__":
    cli(lambda: main(parse_config(BertConfig)), out_of_memory="lower --batch-size, --max-length or --workers")
