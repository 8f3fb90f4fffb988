"""Turn a finetuned BERT into a linear one, and see how much of its GLUE score survives. The paper's second regime.

    python experiments/convert_bert.py --task cola mrpc --workers 8              bert-base, on a GPU
    python experiments/convert_bert.py --model FOLDER --data FOLDER              another BERT, and GLUE, from a disk
    python experiments/convert_bert.py --limit 100 --seeds 0 --epochs 1          does it run? On part of the rows

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
from functools import cache, partial
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
    cli, flag, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance, save_json, write_atomically)

try:
    import transformers
    from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention
    missing = glue.missing
except ImportError as e:
    missing = e.name

PAPER = {"hedgehog": 99.3, "t2r": 89}  # % of BERT's score recovered, mean over GLUE
STAGES, UNDISTILLED = ("teacher", "swapped", "distilled", "finetuned"), "-undistilled"
REFUSED = ("cache", "past_key_values", "encoder_hidden_states", "head_mask", "output_attentions", "cu_seq_lens_q")
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

        y_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)        s: all tokens of the row, no padding

    Every query sees every key. phi(k) is zero where there is padding, which takes it out of numerator and denominator
    alike: a token gives the same numbers however its row is padded, on the left or on the right. (A BERT whose rows
    are padded on the left needs `position_ids`, and a pooler that reads another place than 0, with softmax as well.)
    There is no dropout of attention weights, because they are never formed.
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
        refused = [name for name in REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]
        if refused or any(value is not None and value is not False for value in args):
            raise ValueError(f"linear attention cannot honour {', '.join(refused) or 'an argument after the mask'}: "
                             "leave it out, or restore(model) first")
        q, k, v = (project(x).unflatten(-1, (-1, self.map_q.head_dim)).transpose(1, 2)
                   for project in (self.query, self.key, self.value))                     # (B, H, T, D)
        keep = self.visible(attention_mask, x)                                              # (B, T), or None
        if self.losses is not None:  # stage 1: the maps learn, and what is passed on is the teacher's
            q, k = q.detach(), k.detach()
            self.losses.append(torch.stack(imitation_loss(q, k, self.map_q(q, is_query=True), self.map_k(k), keep)))
            return self.softmax[0].train(self.training)(x, attention_mask, **kwargs)
        phi_q, phi_k = self.map_q(q, is_query=True), self.map_k(k)                        # (B, H, T, P)
        if keep is not None:
            phi_k = phi_k.masked_fill(~keep[:, None, :, None], 0)
        y = linear_attention(phi_q, phi_k, v.to(phi_q.dtype), causal=False)
        return y.to(v.dtype).transpose(1, 2).flatten(2), None

    def visible(self, mask, x):
        """`visible_keys`, found by the first layer for all: looking at a mask on a GPU is a wait."""
        if self.first or self.shared.get("mask") is not mask:
            self.shared.update(mask=mask, keep=visible_keys(mask, *x.shape[:2]))
        return self.shared["keep"]


def visible_keys(mask, B, T):
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
    if mask.ndim == 2:  # the tokenizer's own, 1 for a token (flash attention)
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
    """(cross-entropy of the linear weights under softmax's, entropy of softmax's): means over tokens, heads and batch.

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
        weight = keep[:, None].to(s.dtype) / (keep.sum() * q.shape[1])                    # (B, 1, T), of a query
        return (((p * (log_a_sum - a.log())).sum(-1) * weight).sum(), (-(p * log_p).sum(-1) * weight).sum())


# ---------------------------------------------------------------------------------------------------------------------
# The model, and GLUE as tensors


def load_bert(config, task):
    """(BertForSequenceClassification with a head for the task, its tokenizer). ValueError says what is wrong."""
    name = config.model
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind != "bert":
            raise ValueError(f"--model {name} is of the {kind} architecture: only bert is supported")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.BertForSequenceClassification.from_pretrained(
            name, num_labels=len(glue.TASKS[task].labels) or 1, ignore_mismatched_sizes=True).float()
    except OSError as e:
        raise ValueError(f"--model {name} cannot be had: give a folder with config.json, model.safetensors and the "
                         "tokenizer's files, or the name of a BERT on the Hugging Face hub and a network "
                         f"({str(e).splitlines()[0]})") from None
    longest = model.config.max_position_embeddings
    if config.max_length > longest:
        raise ValueError(f"--max-length {config.max_length}: this model knows {longest} positions, take at most that")
    return model, tokenizer


class Rows(NamedTuple):
    ids: torch.Tensor  # (N, T), zero past the end of a row
    types: torch.Tensor  # (N, T), 0 for the first sentence, 1 for the second
    lengths: np.ndarray  # (N,)
    labels: torch.Tensor  # (N,)


def tokenize(tokenizer, rows, max_length, device):
    sentences = [list(column) for column in zip(*(text for text, _ in rows))]
    encoded = tokenizer(*sentences, truncation=True, max_length=max_length)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    ids = torch.zeros(2, len(rows), lengths.max(), dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[0, i, :n] = torch.tensor(encoded["input_ids"][i])
        ids[1, i, :n] = torch.tensor(encoded["token_type_ids"][i])
    return Rows(*ids.to(device), lengths, torch.tensor([label for _, label in rows]).to(device))


@cache
def load_rows(task, model, data, limit, max_length, device):
    """(training Rows, held-out Rows: a tenth of them, at most 2,000, {name of a reported split: Rows}).

    Which rows are used and which are held out is the same for every seed and attention.
    """
    def read(path):
        rows = glue.read_rows(task, path)
        return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:limit or None]]

    train, reported = glue.find_files(task, data)
    tokenizer = load_bert(SimpleNamespace(model=model, max_length=max_length), task)[1]
    encode, rows = partial(tokenize, tokenizer, max_length=max_length, device=device), read(train)
    n = min(2000, math.ceil(len(rows) / 10))
    if n == len(rows):
        raise ValueError(f"{train}: {n} rows are too few to hold one out: raise --limit")
    return encode(rows[n:]), encode(rows[:n]), {path.stem: encode(read(path)) for path in reported}


def batches(rows, batch_size, generator=None, pool=50):
    """Yield (inputs of a BERT, labels) of rows of about the same length, padded on the right.

    With a generator of numpy they are shuffled: `pool` batches at a time are sorted by length, and drawn in any order.
    """
    N = len(rows.lengths)
    order = np.arange(N) if generator is None else generator.permutation(N)
    pools, parts = np.split(order, range(pool * batch_size, N, pool * batch_size)), []
    for those in pools:
        those = those[np.argsort(rows.lengths[those], kind="stable")]
        parts += np.split(those, range(batch_size, len(those), batch_size))
    for i in range(len(parts)) if generator is None else generator.permutation(len(parts)):
        T = min(rows.ids.shape[1], math.ceil(rows.lengths[parts[i]].max() / 8) * 8)
        index = torch.from_numpy(parts[i]).to(rows.ids.device)
        lengths = torch.from_numpy(rows.lengths[parts[i]]).to(rows.ids.device)
        mask = (torch.arange(T, device=rows.ids.device) < lengths[:, None]).long()
        inputs = dict(input_ids=rows.ids[index, :T], token_type_ids=rows.types[index, :T], attention_mask=mask)
        yield inputs, rows.labels[index]


# ---------------------------------------------------------------------------------------------------------------------
# The stages. `run` is what they share: task, seed, rows, device, progress bar and more of one conversion.


@torch.no_grad()
def evaluate(model, rows, run):
    """{"score": ..., and the task's other measures} over all rows."""
    was_training, logits, labels = model.training, [], []
    model.eval()
    for inputs, those in batches(rows, 4 * run.config.batch_size):
        with run.autocast:
            logits.append(model(**inputs).logits.float())
        labels.append(those)
    model.train(was_training)
    logits, labels = torch.cat(logits).cpu().numpy(), torch.cat(labels).cpu().numpy()
    return glue.measure(run.task, logits.argmax(-1) if logits.shape[1] > 1 else logits[:, 0], labels)


def report(model, run):
    """`evaluate` on the reported split; MNLI has two, matched and mismatched, and the score is their mean."""
    found = {split: evaluate(model, rows, run) for split, rows in run.reported.items()}
    score = float(np.mean([measures["score"] for measures in found.values()]))
    return dict(score=score, **{name + split.removeprefix("dev") * (len(found) > 1): value
                                for split, measures in found.items() for name, value in measures.items()
                                if name != "score"})


def guess(run):
    """The score of giving the most frequent answer of the training rows (of a number: their mean) to every row."""
    answers, reported = run.train.labels, [rows.labels.cpu().numpy() for rows in run.reported.values()]
    answer = answers.mean() if answers.is_floating_point() else answers.mode().values
    scores = [glue.measure(run.task, np.full_like(labels, answer.item()), labels)["score"] for labels in reported]
    return float(np.mean(scores))


def task_loss(model, inputs, labels):
    logits = model(**inputs).logits.float()
    return F.mse_loss(logits[:, 0], labels) if logits.shape[1] == 1 else F.cross_entropy(logits, labels)


def imitate(model, inputs):
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
def faithfulness(model, rows, run):
    """{"cross_entropy": ..., "entropy": ..., "kl": ...} in nats over all rows, means over tokens, heads and layers."""
    total, n_tokens = 0, 0
    for inputs, _ in batches(rows, run.config.batch_size):
        n = inputs["attention_mask"].sum().item()
        with run.autocast:
            total, n_tokens = total + n * imitate(model, inputs).cpu().double(), n_tokens + n
    cross_entropy, entropy = (total / n_tokens).tolist()
    return dict(cross_entropy=cross_entropy, entropy=entropy, kl=cross_entropy - entropy)


def fit(model, run, name, loss, value, groups, weight_decay, map_lr_scale):
    """AdamW for the epochs and at the rate of stage `name`; the weights with the best value() are kept, in place.

    groups: lists of parameters whose gradient is clipped together. Returns the best epoch and its value.
    """
    epochs, config, rows = getattr(run.config, name + "epochs"), run.config, run.train
    n_steps = epochs * math.ceil(len(rows.lengths) / config.batch_size)
    schedule = SimpleNamespace(lr=getattr(config, name + "lr"), steps=n_steps, warmup=round(config.warmup * n_steps),
                               beta2=0.999, weight_decay=weight_decay, map_lr_scale=map_lr_scale)
    optimizer, generator = make_optimizer(model, schedule, run.device), np.random.default_rng(run.seed)
    step, best, now = 0, -math.inf, torch.zeros(())
    run.bar.reset(total=n_steps)
    for epoch in range(epochs + 1):
        latest = value()
        if not math.isfinite(latest) or not math.isfinite(now):
            raise ValueError(f"the loss of {run.name} is not finite after epoch {epoch}: lower {flag(name + 'lr')}")
        if latest > best:
            best, best_epoch, kept = latest, epoch, [p.detach().clone() for group in groups for p in group]
        run.bar.set_postfix(held_out=f"{latest:.3f}", best=f"{best:.3f} after epoch {best_epoch}")
        if epoch == epochs or epoch - best_epoch == config.patience:
            break
        for inputs, labels in batches(rows, config.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule) * group["lr_scale"]
            with run.autocast:
                now = loss(model, inputs, labels)
            now.backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            run.bar.update()
        now = now.detach()
    with torch.no_grad():
        for p, saved in zip((p for group in groups for p in group), kept):
            p.copy_(saved)
    return best_epoch, best


def distill(model, run):
    """Stage 1, in place: the maps alone learn. Returns the best epoch and how faithful they are on held-out rows."""
    model.eval().requires_grad_(False)                                                    # no dropout in the teacher
    for p in maps_of(model).values():
        p.requires_grad_(True)
    layers = [[p for p in m.parameters() if p.requires_grad]  # problems of their own: a wild one must not slow others
              for m in model.modules() if isinstance(m, LinearBertAttention)]
    epoch, _ = fit(model, run, "distill_", lambda model, inputs, labels: imitate(model, inputs)[0],
                   lambda: -faithfulness(model, run.held_out, run)["kl"], layers, 0.0, 1.0)
    model.requires_grad_(True)
    return dict(epoch=epoch, **faithfulness(model, run.held_out, run))


def finetune(model, run, name=""):
    """Stage 2, or with "teacher_" stage 0, in place: all weights learn, from the task's own loss."""
    epoch, value = fit(model.train(), run, name, task_loss, lambda: evaluate(model, run.held_out, run)["score"],
                       [list(model.parameters())], run.config.weight_decay, run.config.map_lr_scale)
    model.eval()
    return dict(epoch=epoch, held_out=value)


# ---------------------------------------------------------------------------------------------------------------------
# Conversions, each a job for a process, and the table


def start(job, config):
    """(model with a head that the seed draws, what its stages share) for a job (task, attention, seed)."""
    task, attention, seed = job
    device, dtype, _ = pick_device(config.device, config.dtype)
    if config.workers > 1:
        torch.set_num_threads(max(1, os.cpu_count() // config.workers))
    train, held_out, reported = load_rows(task, config.model, config.data, config.limit, config.max_length, device)
    torch.manual_seed(seed)
    model, name = load_bert(config, task)[0].to(device), f"{task} {attention}, seed {seed}"
    return model, SimpleNamespace(
        task=task, seed=seed, config=config, train=train, held_out=held_out, reported=reported, device=device,
        name=name, began=time.perf_counter(),
        autocast=torch.autocast(device.type, dtype) if dtype else nullcontext(),
        bar=tqdm(desc=name, unit="step", leave=False, disable=True if config.workers > 1 else None))


def setting(config):
    """What the numbers depend on, in the form that it has in a row of the results."""
    left_out = ("task", "attentions", "seeds", "data", "device", "dtype", "workers", "teachers", "out")
    chosen = {k: v for k, v in asdict(config).items() if k not in left_out}
    return chosen | dict(model=Path(config.model).resolve().name if Path(config.model).exists() else config.model)


def teacher_path(task, seed, config):
    """One file for each task, seed and setting of stage 0."""
    later = [k for k in setting(config) if k.startswith("distill")] + ["epochs", "lr", "map_lr_scale"]
    chosen = json.dumps({k: v for k, v in setting(config).items() if k not in later}, sort_keys=True)
    return Path(config.teachers) / f"{task}-{seed}-{hashlib.sha256(chosen.encode()).hexdigest()[:12]}.pt"


def teach(job, config):
    """Stage 0: finetune softmax for (task, seed), and keep it in --teachers."""
    task, seed = job
    path = teacher_path(task, seed, config)
    if not path.exists():
        model, run = start((task, "softmax", seed), config)
        kept = dict(about=finetune(model, run, "teacher_"), model=model.state_dict(), report=report(model, run))
        run.bar.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda f: torch.save(kept, f))


def convert(job, config):
    """Stages 1 and 2 for (task, attention, seed), from the teacher. -> (job, what is to be told of it)."""
    task, attention, seed = job
    model, run = start(job, config)
    teacher = torch.load(teacher_path(task, seed, config), map_location=run.device, weights_only=True)
    model.load_state_dict(teacher["model"])
    stages, about = {"teacher": teacher["report"]}, dict(seed=seed, teacher=teacher["about"])
    if attention != "softmax":
        swap(model, attention.removesuffix(UNDISTILLED))
        stages["swapped"] = report(model, run)
        if maps_of(model) and config.distill_epochs and not attention.endswith(UNDISTILLED):
            about["distillation"] = distill(model, run)
            stages["distilled"] = report(model, run)
    about |= finetune(model, run)
    stages["finetuned"] = report(model, run)
    run.bar.close()
    return job, dict(about, stages=stages, guess=guess(run), seconds=time.perf_counter() - run.began)


def summarize(task, attention, runs, about):
    """The row of the results for all runs of one attention on one task.

    Softmax was finetuned once, as the teacher, and a second time as long as the others: the better mean counts.
    """
    runs = sorted(runs, key=lambda r: r["seed"])
    means = {stage: {k: float(np.mean([r["stages"][stage][k] for r in runs])) for k in measures}
             for stage, measures in runs[0]["stages"].items()}
    stage = max(("teacher", "finetuned") if attention == "softmax" else ("finetuned",), key=lambda s: means[s]["score"])
    scores = [r["stages"][stage]["score"] for r in runs]
    return dict(task=task, attention=attention, **means[stage], seeds=len(runs), scores=scores,
                std=float(np.std(scores, ddof=1)) if len(runs) > 1 else None, stage=stage, stages=means,
                held_out=float(np.mean([r["held_out"] for r in runs])), guess=runs[0]["guess"],
                seconds=sum(r["seconds"] for r in runs), **about, runs=runs)


def add_recovered(rows):
    """"recovered" and its spread over the seeds, in percent of softmax's score on the task."""
    softmax = {row["task"]: row["score"] for row in rows if row["attention"] == "softmax"}
    for row in rows:
        whole = softmax.get(row["task"], 0)
        for name, value in (("recovered", row["score"]), ("recovered_std", row["std"])):
            row[name] = 100 * value / whole if whole > 0 and value is not None else None


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
    """One line for each task and attention, and the mean over tasks of what each attention recovered.

    "held out" is the score by which epochs were chosen, and by which rates should be.
    """
    def show(value, spread=None, scale=1):
        found = [f"{scale * x:.1f}" for x in (value, spread) if x is not None]
        return " ± ".join(found) or "-"

    form = "{:6}{:22}{:>14}{:>16}{:>9}{:>9}{:>11}{:>11}{:>10}{:>7}{:>7}".format
    lines = [form("task", "attention", "score", "recovered, %", *STAGES, "held out", "seeds", "s")]
    for row in rows:
        stages = (show(row["stages"].get(stage, {}).get("score"), scale=100) for stage in STAGES)
        lines.append(form(row["task"], row["attention"], show(row["score"], row["std"], 100),
                          show(row["recovered"], row["recovered_std"]), *stages, show(100 * row["held_out"]),
                          row["seeds"], f"{row['seconds']:.0f}"))
    for task, guess in {row["task"]: row["guess"] for row in rows}.items():
        lines.append(f"{task}: {' and '.join(glue.TASKS[task].metrics)}; the same answer to all gets {100 * guess:.1f}")
    for attention in dict.fromkeys(row["attention"] for row in rows):
        those = [row["recovered"] for row in rows if row["attention"] == attention and row["recovered"] is not None]
        if those and attention != "softmax":
            paper = f"; the paper's, over GLUE: {PAPER[attention]}" if attention in PAPER else ""
            lines.append(f"{attention}: {np.mean(those):.1f} % of softmax recovered, mean of {len(those)}{paper}")
    return "\n".join(lines)


def main(config):
    if missing:
        raise ValueError(f"this experiment needs {missing}: pip install -r requirements-experiments.txt")
    device, _, why = pick_device(config.device, config.dtype)
    out, about = Path(config.out), setting(config)
    rows = load_results(out, config.task, about)
    for task in config.task:  # what is wrong is better told now than by a worker
        load_bert(config, task)
        glue.find_files(task, config.data)
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
        done = every(partial(convert, config=config), jobs)
        for (task, attention, seed), r in tqdm(done, total=len(jobs), unit="run", disable=None):
            runs[task, attention, seed] = r
            row = summarize(task, attention, [r for key, r in runs.items() if key[:2] == (task, attention)], about)
            rows = [row for row in rows if (row["task"], row["attention"]) != (task, attention)] + [row]
            rows.sort(key=lambda row: (list(glue.TASKS).index(row["task"]), ATTENTIONS.index(row["attention"])))
            add_recovered(rows)
            save_json(out, rows)                                                          # a stopped run keeps its rows
            stages = ", ".join(f"{stage} {100 * found['score']:.1f}" for stage, found in r["stages"].items())
            tqdm.write(f"{task} {attention}, seed {seed}: {stages} ({r['seconds']:.0f} s)")
    print(table(rows))


if __name__ == "__main__":
    cli(lambda: main(parse_config(BertConfig)), out_of_memory="lower --batch-size, --max-length or --workers")
