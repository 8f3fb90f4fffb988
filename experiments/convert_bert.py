"""Turn a finetuned BERT into a linear one, and see how much of its GLUE score survives. The paper's second regime.

    python experiments/convert_bert.py --task cola mrpc --workers 6              bert-base, on a GPU
    python experiments/convert_bert.py --model FOLDER --data FOLDER              another BERT, and GLUE, from a disk
    python experiments/convert_bert.py --limit 100 --seeds 0 --epochs 1          does it run? On part of the rows

Three stages, for each task and seed: finetune softmax, which becomes the teacher; swap its attention and let the new
feature maps learn the teacher's attention weights on the task's own text; finetune again. Softmax is finetuned again
too. Every stage keeps the epoch that was best on a tenth of the training rows that nothing learns from, so the split
that is reported (GLUE's dev, MRPC's test if its original files are given) chooses nothing.

`swap(model)` is all that another program needs: it gives any transformers BERT this attention, and `restore(model)`
takes it away again.
"""

import copy
import math
import multiprocessing
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # no installed package
from convert_gpt2 import imitation_loss, learn_maps_alone, maps_of  # noqa: E402
from data import glue  # noqa: E402
from experiments.common import or_say, ready, rows_so_far, with_names  # noqa: E402
from hedgehog import FEATURE_MAPS, LEARNED_MAPS, FeatureMap, linear_attention  # noqa: E402
from train_gpt import (  # noqa: E402
    TrainConfig, check_least, cli, flag, learning_rate, make_optimizer, opt, parse_config, pick_device, provenance,
    save_json)

try:
    import transformers
    from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention
    missing = glue.missing
except ImportError as e:
    missing = e.name

PAPER = {"hedgehog": "99.3", "t2r": "89, probably not distilled"}  # % of BERT's score recovered, mean over GLUE
STAGES, UNDISTILLED = ("teacher", "swapped", "distilled", "finetuned"), "-undistilled"
REFUSED = ("cache", "past_key_values", "encoder_hidden_states", "head_mask", "output_attentions", "cu_seq_lens_q")
ATTENTIONS = ("softmax", *FEATURE_MAPS, *(kind + UNDISTILLED for kind in LEARNED_MAPS))


@dataclass
class BertConfig:
    model: str = opt("google-bert/bert-base-uncased", "a BERT on the Hugging Face hub, or a folder with one")
    task: tuple = opt(("cola", "mrpc"), "of GLUE", tuple(glue.TASKS))
    data: str = opt("data/glue", "folder with CoLA/train.tsv and the like; what it lacks is downloaded into it")
    attentions: tuple = opt(("softmax", "hedgehog", "t2r", "elu", "hedgehog-undistilled"), "feature maps", ATTENTIONS)
    seeds: tuple = opt((0, 1, 2), "of the classifier, the order of the rows and dropout")
    limit: int = opt(0, "use so many rows of every split, drawn once and for all; 0: all")
    max_length: int = opt(128, "tokens at which a row is cut, at most what the model knows")
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
    # all stages
    patience: int = opt(10, "epochs without a better score on the held-out rows after which a stage ends")
    warmup: float = opt(0.1, "part of the steps in which the learning rate rises; a cosine to a tenth follows")
    weight_decay: float = opt(0.01, "on matrices, while finetuning")
    clip: float = opt(1.0, "largest norm of the gradient; in stage 1 of each layer's")
    # machine
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 where the GPU has it; for a BERT as small as "
                     "MiniLM float32 is faster", ("auto", "float32", "bfloat16"))
    workers: int = opt(1, "pairs of a task and a seed at once, each in a process, on one GPU too")
    out: str = opt("runs/bert.json", "the rows; the same command again goes on with what they lack")

    def __post_init__(self):
        check_least(self, seeds=0, limit=0, max_length=8, batch_size=1, teacher_epochs=0, distill_epochs=0, epochs=0,
                    patience=1, workers=1)


# ---------------------------------------------------------------------------------------------------------------------
# The attention, and how to get it into a BERT


class LinearBertAttention(nn.Module):
    """Stands where BertSelfAttention stood, with the same query, key and value: x (B, T, C) -> (B, T, C), in O(T).

        y_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)        s: all tokens of the row, no padding

    phi(k) is zero where there is padding, which takes it out of numerator and denominator alike: a token gives the
    same numbers however its row is padded, on the left or on the right. (On the left a BERT needs `position_ids`, and
    a pooler that reads another place than 0, with softmax as well.) No weights are formed, so none are dropped out.
    """

    def __init__(self, softmax, kind="hedgehog", max_len=512):
        super().__init__()
        new_map = partial(FeatureMap, softmax.num_attention_heads, softmax.attention_head_size, kind, max_len=max_len)
        self.query, self.key, self.value = softmax.query, softmax.key, softmax.value
        self.map_q = new_map()
        self.map_k = self.map_q if self.map_q.weight is None else new_map()  # performer: one projection for both
        self.softmax = (softmax,)  # in a tuple, so that its weights are not counted, saved and trained twice
        self.imitates, self.kl = False, None  # see `imitate`

    def forward(self, x, attention_mask=None, *args, **kwargs):
        refused = [name for name in REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]
        if refused or any(value is not None and value is not False for value in args):
            raise ValueError(f"linear attention cannot honour {', '.join(refused) or 'an argument after the mask'}: "
                             "leave it out, or restore(model) first")
        q, k, v = (project(x).unflatten(-1, (-1, self.map_q.head_dim)).transpose(1, 2)
                   for project in (self.query, self.key, self.value))                     # (B, H, T, D)
        keep = visible_keys(attention_mask, x)                                            # (B, T)
        if self.imitates:  # stage 1: the maps learn, and what is passed on is the teacher's
            q, k = q.detach(), k.detach()
            cross_entropy, entropy = imitation_loss(q, k, self.map_q(q, is_query=True), self.map_k(k), keep,
                                                    causal=False)
            self.kl = cross_entropy - entropy
            return self.softmax[0].train(self.training)(x, attention_mask, **kwargs)
        phi_q, phi_k = self.map_q(q, is_query=True), self.map_k(k)                        # (B, H, T, P)
        phi_k = phi_k.masked_fill(~keep[:, None, :, None], 0)
        y = linear_attention(phi_q, phi_k, v.to(phi_q.dtype), causal=False)
        return y.to(v.dtype).transpose(1, 2).flatten(2), None


def visible_keys(mask, x):
    """(B, T), False where x (B, T, C) is padding, from whatever mask transformers hands to an attention.

    Linear attention has one sum over the keys for all queries and heads, so that a mask may only leave out keys.
    Raises ValueError for any other: causal, different from query to query or head to head, or with a bias.
    """
    B, T = x.shape[:2]
    if mask is None:
        return torch.ones(B, T, dtype=torch.bool, device=x.device)
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"the mask is the {type(mask).__name__} of flex_attention, which linear attention cannot "
                         'read: model.set_attn_implementation("sdpa")')
    why, shape = "", tuple(mask.shape)
    if mask.ndim == 2:  # the tokenizer's own, 1 for a token
        mask = mask[:, None, None]
    elif mask.is_floating_point():  # is added to q.k (eager)
        why = "a bias on q.k" if ((mask != 0) & (mask > -1e4)).any() else ""
        mask = mask == 0
    mask = mask.bool()  # True for what is seen (sdpa)
    keep = mask[:, :1, :1]                                                                # (B, 1, 1, T)
    if mask.ndim != 4 or mask.shape[0] not in (1, B) or mask.shape[2] not in (1, T) or mask.shape[3] != T:
        why = f"of shape {shape}, which does not fit {B} rows of {T} tokens"
    elif not why and mask.shape != keep.shape and not (mask == keep).all():
        causal = mask.shape[2] == T and not mask.triu(1).any()
        why = "causal" if causal else "different from query to query or from head to head"
    if why:
        raise ValueError(f"the mask is {why}: linear attention has one sum over the keys for all queries, and can "
                         "honour padding alone")
    return keep[:, 0, 0].expand(B, T)


def swap(model, kind="hedgehog", maps=None):
    """Give every self-attention of a transformers BERT, in place, linear attention with fresh maps, or `maps`, which
    `maps_of` gave for a model of this shape. ValueError if the model is no encoder-only BERT."""
    config, layers = model.config, [m for m in model.modules() if isinstance(m, BertAttention)]
    if not layers or config.is_decoder or not all(isinstance(layer.self, BertSelfAttention) for layer in layers):
        raise ValueError(f"{type(model).__name__} ({config.model_type}) must be a bert encoder that is not swapped "
                         "already, such as BertForSequenceClassification")
    for name, known in (("_attn_implementation", ("sdpa", "eager")), ("position_embedding_type", ("absolute",))):
        if getattr(config, name, None) not in (None, *known):
            raise ValueError(f"linear attention cannot honour {name.lstrip('_')}={getattr(config, name)!r}: load the "
                             f"model with {' or '.join(known)}")
    for layer in layers:
        p = layer.self.query.weight
        new = LinearBertAttention(layer.self, kind, config.max_position_embeddings)
        layer.self = new.to(p.device, p.dtype).train(layer.self.training)
    if maps is not None:
        if {name: p.shape for name, p in maps.items()} != {name: p.shape for name, p in maps_of(model).items()}:
            restore(model)
            raise ValueError(f"the maps are of another model or feature map: they do not fit {len(layers)} layers of "
                             f"{new.map_q.n_head} heads of width {new.map_q.head_dim} with the {kind} map")
        model.load_state_dict(maps, strict=False)
    return model


def restore(model):
    """The inverse of `swap`: softmax again, to the bit, with the weights that the model now has."""
    for layer in model.modules():
        if isinstance(layer, BertAttention) and isinstance(layer.self, LinearBertAttention):
            layer.self = layer.self.softmax[0].train(layer.self.training)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The stages


@torch.no_grad()
def evaluate(model, rows):
    """{"score": ..., and the task's other measures} over all rows."""
    model.eval()
    answers = [(model(**batch).logits.float(), batch["labels"]) for batch in rows.draw()]
    logits, labels = (torch.cat(part).cpu().numpy() for part in zip(*answers))
    return glue.measure(rows.task, logits.argmax(-1) if logits.shape[1] > 1 else logits[:, 0], labels)


def imitate(model, inputs):
    """KL of the linear weights from softmax's, mean over the layers, while softmax's output is what is passed on: the
    model computes what its teacher does, with which it shares all but the maps."""
    attentions = [m for m in model.modules() if isinstance(m, LinearBertAttention)]
    for attention in attentions:
        attention.imitates = True
    model(**inputs)
    kl = torch.stack([attention.kl for attention in attentions]).mean()
    for attention in attentions:
        attention.imitates, attention.kl = False, None
    return kl


@torch.no_grad()
def faithfulness(model, rows):
    """The KL in nats over all rows, mean over tokens, heads and layers."""
    kl, n_tokens = zip(*((imitate(model, batch).item(), batch["attention_mask"].sum().item()) for batch in rows.draw()))
    return float(np.average(kl, weights=n_tokens))


def fit(model, train, config, seed, stage, loss, value, groups, weight_decay=0.0):
    """AdamW on loss(batch) as `config` says for a stage; the weights with the best value() are kept. groups: lists of
    parameters whose gradient is clipped together. Returns the best epoch and its value."""
    epochs, lr, mode = getattr(config, stage + "epochs"), getattr(config, stage + "lr"), model.training
    schedule = TrainConfig(lr=lr, steps=epochs * len(train), warmup=round(config.warmup * epochs * len(train)),
                           beta2=0.999, weight_decay=weight_decay)
    optimizer, rng = make_optimizer(model, schedule, model.device), np.random.default_rng(seed)
    step, best, now, quiet = 0, -math.inf, torch.zeros(()), True if config.workers > 1 else None
    bar = tqdm(range(epochs + 1), f"{train.task}, {stage or 'finetune_'}epochs", leave=False, disable=quiet)
    for epoch in bar:
        latest = value()
        if not math.isfinite(latest) or not math.isfinite(now):
            raise ValueError(f"the loss on {train.task}, seed {seed}, is not finite after epoch {epoch}: lower "
                             f"{flag(stage + 'lr')}")
        if latest > best:
            best, best_epoch, kept = latest, epoch, copy.deepcopy(model.state_dict())
        bar.set_postfix(held_out=f"{latest:.3f}", best=f"{best:.3f} after epoch {best_epoch}")
        if epoch == epochs or epoch - best_epoch == config.patience:
            break
        model.train(mode)
        for batch in train.draw(rng):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, schedule) * group["lr_scale"]
            now = loss(batch)
            now.backward()
            for group in groups:
                torch.nn.utils.clip_grad_norm_(group, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        now = now.detach()
    bar.close()
    model.load_state_dict(kept)
    return best_epoch, best


def distill(model, train, held_out, config, seed):
    """Stage 1, in place: the maps alone learn. Returns the best epoch and its KL on held-out rows."""
    learn_maps_alone(model.eval())                                                        # no dropout in the teacher
    layers = [[p for p in m.parameters() if p.requires_grad]  # problems of their own: a wild one must not slow others
              for m in model.modules() if isinstance(m, LinearBertAttention)]
    epoch, value = fit(model, train, config, seed, "distill_", partial(imitate, model),
                   lambda: -faithfulness(model, held_out), layers)
    model.requires_grad_(True)
    return dict(epoch=epoch, kl=-value)


def finetune(model, train, held_out, config, seed, stage=""):
    """Stage 2, or with "teacher_" stage 0, in place: all weights learn, from the task's own loss."""
    epoch, value = fit(model.train(), train, config, seed, stage, lambda batch: model(**batch).loss,
                       lambda: evaluate(model, held_out)["score"], [list(model.parameters())], config.weight_decay)
    return dict(epoch=epoch, held_out=value)


def load(config, task):
    """(BERT with a head for the task, tokenizer), on the CPU. ValueError if --model is no BERT."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with or_say(f"no BERT with a tokenizer at --model {config.model}: give a folder with config.json, weights and "
                "vocabulary, or a name on the hub"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            config.model, num_labels=len(glue.TASKS[task].labels) or 1, ignore_mismatched_sizes=True).float()
    return restore(swap(model)), tokenizer  # `swap` refuses what is no BERT


def convert(job, config):
    """Finetune softmax, and make of it each of the attentions in turn. -> {(task, attention, seed): what came out}."""
    task, seed, attentions = job
    device, dtype, _ = pick_device(config.device, config.dtype)
    if config.workers > 1:
        torch.set_num_threads(max(1, os.cpu_count() // config.workers))
    torch.manual_seed(seed)                                                               # of the head
    model, tokenizer = load(config, task)
    model.to(device).forward = torch.autocast(device.type, dtype, enabled=dtype is not None)(model.forward)
    train, held_out, reported = glue.load_batches(
        task, config.data, config.limit, tokenizer=tokenizer, batch_size=config.batch_size, device=device,
        max_length=min(config.max_length, model.config.max_position_embeddings))
    began, found = time.perf_counter(), {}
    taught = finetune(model, train, held_out, config, seed, "teacher_")
    teacher, teacher_score = copy.deepcopy(model.state_dict()), evaluate(model, reported)
    teacher_seconds = time.perf_counter() - began
    sizes = dict(train_rows=len(train.rows) + len(held_out.rows), reported_rows=len(reported.rows))
    for attention in attentions:
        began, stages, about = time.perf_counter(), {"teacher": teacher_score}, dict(seed=seed, teacher=taught)
        restore(model).load_state_dict(teacher)
        torch.manual_seed(seed)
        if attention != "softmax":
            swap(model, attention.removesuffix(UNDISTILLED))
            stages["swapped"] = evaluate(model, reported)
            if maps_of(model) and config.distill_epochs and not attention.endswith(UNDISTILLED):
                about["distillation"] = distill(model, train, held_out, config, seed)
                stages["distilled"] = evaluate(model, reported)
        about |= finetune(model, train, held_out, config, seed)
        stages["finetuned"] = evaluate(model, reported)
        seconds = time.perf_counter() - began + teacher_seconds * (attention == "softmax")
        found[task, attention, seed] = dict(about, **sizes, stages=stages, seconds=seconds)
        tqdm.write(f"{task} {attention}, seed {seed}: " + ", ".join(
            f"{stage} {100 * measures['score']:.1f}" for stage, measures in stages.items()) + f" ({seconds:.0f} s)")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The table


def summarize(task, attention, runs, about):
    """The row for all seeds. Softmax was finetuned twice, as teacher and like the others: the better mean counts."""
    runs = sorted(runs, key=lambda r: r["seed"])
    means = {stage: {k: float(np.mean([r["stages"][stage][k] for r in runs])) for k in measures}
             for stage, measures in runs[0]["stages"].items()}
    stage = max(("finetuned", "teacher")[:1 + (attention == "softmax")], key=lambda stage: means[stage]["score"])
    scores = [r["stages"][stage]["score"] for r in runs]
    sizes = {k: r[k] for r in runs for k in ("train_rows", "reported_rows") if k in r}    # old runs do not tell
    return dict(about, task=task, attention=attention, **sizes, **means[stage], seeds=len(runs), scores=scores,
                stage=stage, std=float(np.std(scores, ddof=1)) if len(runs) > 1 else None, stages=means,
                held_out=float(np.mean([r["held_out"] for r in runs])), seconds=sum(r["seconds"] for r in runs),
                runs=runs)


def add_recovered(rows):
    """"recovered", in percent of softmax's score on the task."""
    softmax = {row["task"]: row["score"] for row in rows if row["attention"] == "softmax"}
    for row in rows:
        whole = softmax.get(row["task"], 0)
        row["recovered"] = 100 * row["score"] / whole if whole > 0 else None


def table(rows):
    """A line for each row, and the mean over tasks. "held out": by this epochs were chosen, and rates should be."""
    def show(value, scale=100):
        return "-" if value is None else f"{scale * value:.1f}"

    form = "{:6}{:22}{:>7}{:>7}{:>14}{:>10}{:>9}{:>11}{:>11}{:>10}{:>7}{:>7}".format
    lines = [form("task", "attention", "score", "std", "recovered, %", *STAGES, "held out", "seeds", "s")]
    for row in rows:
        stages = (row["stages"].get(stage, {}).get("score") for stage in STAGES)
        scores = show(row["score"]), show(row["std"]), show(row["recovered"], 1), *map(show, stages)
        lines.append(form(row["task"], row["attention"], *scores, show(row["held_out"]), row["seeds"],
                          f"{row['seconds']:.0f}"))
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
    left_out = ("task", "attentions", "seeds", "data", "device", "dtype", "workers", "out")
    about, out = {k: v for k, v in asdict(config).items() if k not in left_out}, ready(config.out)
    about["model"] = Path(config.model).name
    rows = rows_so_far(out, about, lambda row: row["task"] in config.task)
    tqdm.write(f"{config.model} on {why}")
    runs = {(row["task"], row["attention"], r["seed"]): r for row in rows for r in row["runs"]}
    jobs = [(task, seed, lacking) for task, seed in product(config.task, config.seeds)
            if (lacking := [attention for attention in config.attentions if (task, attention, seed) not in runs])]
    if jobs:  # what is not there is downloaded now, before several workers would, and a wrong --model told first
        load(config, jobs[0][0])
        for task in config.task:
            glue.find_files(task, config.data)
    else:
        tqdm.write(f"{out} has all these rows already, nothing is trained: choose another --out to make them again")
    about |= provenance(device) | dict(transformers=transformers.__version__)
    about["command"] = with_names(about["command"])
    spawn, ignore = multiprocessing.get_context("spawn"), (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with spawn.Pool(config.workers, *ignore) if config.workers > 1 else nullcontext() as pool:
        done = (pool.imap_unordered if pool else map)(partial(convert, config=config), jobs)
        for found in tqdm(done, total=len(jobs), unit="job", disable=None):
            runs |= found
            new = {key[:2] for key in found}
            rows = [row for row in rows if (row["task"], row["attention"]) not in new] + [
                summarize(*two, [r for key, r in runs.items() if key[:2] == two], about) for two in new]
            rows.sort(key=lambda row: (list(glue.TASKS).index(row["task"]), ATTENTIONS.index(row["attention"])))
            add_recovered(rows)
            save_json(out, rows)                                                          # a stopped run keeps its rows
    print(table(rows))


if __name__ == "__main__":
    cli(lambda: main(parse_config(BertConfig)), out_of_memory="lower --batch-size, --max-length or --workers")
