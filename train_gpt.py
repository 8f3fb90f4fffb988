"""Train a GPT with Hedgehog attention, or softmax, or any other map of hedgehog.py, on one GPU or on a laptop.

    python train_gpt.py                                    a tiny byte-level model on text that ships inside Python
    python train_gpt.py --attention softmax                the same run with softmax attention
    python train_gpt.py --data DIR                         your own text, made by data/prepare.py
    python train_gpt.py --preset wikitext103               the paper's from-scratch experiment
    python train_gpt.py --preset wikitext103-fast          the same model, in about 10 minutes on one H100
    torchrun --nproc-per-node 8 train_gpt.py ...           the same run on several GPUs

A run is a folder: config.json, log.csv (one row an evaluation), last.pt and best.pt, summary.json. Add --resume to the
command of a run that was stopped and it goes on along the same curve: on as many CPU threads to the last bit. With
--resume and a larger --steps a finished run, or the finetuned/ of a conversion, is trained further: the learning rate
rises again, to where the longer schedule has it.
"""

import argparse
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.prepare import load_tokenizer, lock_folder, prepare_pydoc
from hedgehog import ATTENTIONS, GPT, GPTConfig

HERE = Path(__file__).resolve().parent
# Dense bf16 TFLOP/s of the makers' data sheets, by a part of the device's name; the first that fits.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362,
               "L4": 121, "RTX 4090": 165, "RTX 3090": 71}
LORA_SCALE = 2.0  # alpha / rank, the paper's 16 / 8, kept at every rank


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass is the command line


def flag(name):
    return "--" + name.replace("_", "-")


def check_least(config, **least):
    """ValueError that names the flag of a field, or of any value of a tuple, that is below its least value, or NaN."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if not all(v >= smallest for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{flag(name)} must be at least {smallest}, got {value}")


def opt(default, help, choices=None):
    """A field that is also a flag: its default, its help and its choices on one line."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Options:
    """What train_gpt.py and convert_gpt2.py have in common; --help tells it last."""
    # model
    dropout: float = opt(0.0, "on the embedding and, for softmax, the attention weights")
    feature_bias: bool = opt(False, "bias in the feature maps")
    tie_qk: bool = opt(False, "one feature map for queries and keys")
    temperature: float = opt(1.0, "of the exp map: exp(temperature x)")
    map_scale: float = opt(1.0, "feature maps start from this times the identity")
    learn_temperature: bool = opt(False, "one more learned number a head and map, exp(number) times W")
    chunk_size: int = opt(64, "tokens whose attention weights are formed at once (linear attention)")
    segment_size: int = opt(256, "tokens whose features are held at once while training; 0: all, faster, more memory")
    softmax_layers: int = opt(0, "the first layers, which attend by softmax whatever --attention says; 0 in the paper")
    window: int = opt(0, "tokens that --softmax-layers look back over, linear in the length then; 0: all")
    hybrid_window: int = opt(0, "tokens that every linear layer sees by softmax, and older ones by its map, not in the "
                             "paper; 0: none")
    lora_rank: int = opt(0, "train low-rank updates of the attention's projections and nothing else; 0: all weights")
    seed: int = opt(0, "of the initial weights, the order of the data and dropout")
    # machine
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    dtype: str = opt("auto", "of the matrix products; auto: bfloat16 where the GPU has it",
                     ("auto", "float32", "bfloat16"))
    compile: bool = opt(False, "torch.compile: a minute more at the start, much faster on a GPU")
    prompt: str = opt("The ", "beginning of the sample at the end")
    sample_tokens: int = opt(200, "length of that sample")

    def __post_init__(self):
        check_least(self, softmax_layers=0, window=0, lora_rank=0, seed=0, sample_tokens=0)
        if not math.isfinite(self.temperature * self.map_scale):
            raise ValueError(f"--temperature {self.temperature} and --map-scale {self.map_scale} must be finite")


@dataclass
class TrainConfig(Options):
    preset: str = opt("tiny", "named set of defaults; any flag overrides it",
                      ("tiny", "wikitext103", "wikitext103-fast"))
    attention: str = opt("hedgehog", "softmax, or a feature map; of Hedgehog's two, hedgehog_exp is the better",
                         ATTENTIONS)
    data: str = opt("", "folder made by data/prepare.py; empty: data/pydoc, made on the fly")
    out: str = opt("", "folder of the run; empty: runs/PRESET-ATTENTION")
    resume: bool = opt(False, "go on with the run in --out; flags not given are taken from it")
    # model
    n_layer: int = opt(4, "layers")
    n_head: int = opt(4, "heads a layer")
    n_embd: int = opt(128, "model width, a multiple of --n-head")
    block_size: int = opt(256, "context length in tokens")
    bias: bool = opt(True, "biases in linear layers and norms")
    tie_head: bool = opt(True, "one matrix for the embedding and the output")
    short_conv: int = opt(0, "tokens that a convolution of q, k and v reaches over, not in the paper; 0: none")
    # optimisation
    steps: int = opt(1000, "optimizer steps; with --resume a larger number trains a finished run further")
    batch_size: int = opt(8, "sequences a step, over all processes and micro-batches")
    accum: int = opt(1, "micro-batches a step; doubling it halves the memory, not the batch")
    lr: float = opt(4e-3, "peak learning rate")
    map_lr_scale: float = opt(1.0, "learning rate of the feature maps, times --lr")
    warmup: int = opt(100, "steps of linear warm-up; a cosine to --final-lr follows")
    final_lr: float = opt(0.1, "learning rate at the end, times --lr")
    weight_decay: float = opt(0.1, "on matrices only")
    map_decay: bool = opt(True, "also on the feature maps, whose W it pulls from the identity towards zero")
    beta2: float = opt(0.99, "AdamW's second moment")
    clip: float = opt(1.0, "largest norm of the gradient")
    eval_every: int = opt(200, "steps between evaluations, each of which also writes a checkpoint")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, steps=0, batch_size=1, accum=1, eval_every=1, warmup=0, lr=0, map_lr_scale=0, final_lr=0,
                    weight_decay=0)
        if self.lora_rank and self.lora_rank > self.n_embd:
            raise ValueError(f"--lora-rank {self.lora_rank} is no low rank for matrices of width {self.n_embd}: take "
                             "at most that")
        if self.attention != "softmax" and self.softmax_layers >= self.n_layer > 0:
            raise ValueError(f"--softmax-layers {self.softmax_layers} leaves none of {self.n_layer} layers to "
                             f"{self.attention}: take fewer, or --attention softmax")
        if self.seed >= 2 ** 31 or not 0 <= self.beta2 < 1 or not self.clip > 0:
            raise ValueError("--seed must be below 2^31, --beta2 in [0, 1) and --clip above 0 (inf: no clipping), got "
                             f"{self.seed}, {self.beta2} and {self.clip}")


PRESETS = {
    "tiny": {},
    # The recipe behind the paper's peers (safari, wt103): 512 x 1,024 tokens a step, 100 epochs of 225 steps. Not run.
    "wikitext103": dict(
        data="data/wikitext103", n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.1, steps=22500,
        batch_size=512, accum=32, lr=6e-4, warmup=225, beta2=0.999, eval_every=225, chunk_size=128, segment_size=0,
        compile=True),
    # The same model in about 10 minutes of one H100, compilation and evaluation included: 197M tokens. The rate lies
    # between softmax's two best of a sweep on a smaller model, 1e-3 and 2e-3; Hedgehog's were 2e-3 and 4e-3.
    "wikitext103-fast": dict(
        data="data/wikitext103", n_layer=12, n_head=12, n_embd=768, block_size=1024, steps=6000, batch_size=32,
        lr=1.5e-3, warmup=300, beta2=0.95, eval_every=500, chunk_size=128, segment_size=0, compile=True),
}
MAY_CHANGE_ON_RESUME = {"preset", "data", "out", "resume", "accum", "device", "compile", "eval_every", "prompt",
                        "sample_tokens"}


def saved_config(config):
    return load_checkpoint(run_folder(config) / "last.pt", mmap=True)["config"]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default == "" else super()._get_help_string(action)


def parse_config(config_class, presets=None, argv=None, saved_config=saved_config,
                 may_change=MAY_CHANGE_ON_RESUME | {"steps"}):  # of a finished run, as `build` sees to
    """Command line -> config. Flags come first, then the run that --resume goes on with, then the preset."""
    parser = argparse.ArgumentParser(description=sys.modules[config_class.__module__].__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter, allow_abbrev=False)
    for f in sorted(dataclasses.fields(config_class), key=lambda f: f.name not in config_class.__annotations__):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        if f.type is tuple:                                                               # several values, of one type
            kind = dict(type=type(f.default[0]), nargs="+")
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument(flag(f.name), default=f.default, help=f.metadata["help"], **kind)
    if presets:  # before --help is answered, which names the defaults
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", nargs="?", default=config_class.preset)
        parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].preset, {}))
    config = parser.parse_args(argv)
    if getattr(config, "resume", False):
        saved = {f.name: f.default for f in dataclasses.fields(config_class)} | saved_config(config)
        parser.set_defaults(**{k: v for k, v in saved.items() if k not in ("out", "resume")})
        config = parser.parse_args(argv)
        refuse_changes(saved, config, may_change)
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(config).items()})


def refuse_changes(saved, config, may_change):
    changed = [k for k, v in saved.items() if k not in may_change and getattr(config, k) != v]
    if changed:
        raise ValueError(f"this run was started with {', '.join(f'{k}={saved[k]}' for k in changed)}: leave out "
                         f"{', '.join(map(flag, changed))} to resume it, or choose another --out")


def run_folder(config):
    return Path(config.out or f"runs/{config.preset}-{config.attention}")


# ---------------------------------------------------------------------------------------------------------------------
# Machine, data, evaluation


def pick_device(name, dtype):
    """(device, autocast dtype or None, one line that says why)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = {"cuda": "a GPU is there", "mps": "Apple GPU, no CUDA", "cpu": "no GPU found"}[name]
    else:
        why = "as asked for"
        if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
            raise ValueError(f"--device {name} is not available here: leave it out, or say --device cpu")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # tf32 for what stays float32
        why += ": " + torch.cuda.get_device_name(device)
    if dtype != "auto":
        why_dtype = "as asked for"
    elif name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why_dtype = "bfloat16", "this GPU has it"
    else:
        dtype, why_dtype = "float32", "a GPU without bfloat16" if name == "cuda" else "bfloat16 is for CUDA"
    return device, getattr(torch, dtype) if dtype != "float32" else None, f"{name} ({why}), {dtype} ({why_dtype})"


def load_data(folder, block_size):
    """{"meta": dict, "train": uint16 tokens, "valid": ..., and "test" if it is there}, memory-mapped and checked."""
    folder = Path(folder)
    known = folder.name in ("pydoc", "wikitext103")  # what data/prepare.py makes by name
    remedy = f"make it with: python data/prepare.py {folder.name if known else 'FILE...'} --out {folder}"
    if not (folder / "meta.json").exists():
        raise ValueError(f"no prepared text in {folder} (meta.json is missing): {remedy}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        vocab_size, counts = int(meta["vocab_size"]), {k: int(meta["tokens"][k]) for k in meta["tokens"]}
        needed = {"tokenizer", "unit", "words", "lines", "sha256"}
        if not needed <= meta.keys() or not {"train", "valid"} <= counts.keys():
            raise KeyError
    except (ValueError, TypeError, LookupError, AttributeError):
        raise ValueError(f"{folder / 'meta.json'} is damaged, or of an earlier version: {remedy}") from None
    data = {"meta": meta}
    for split, count in counts.items():
        path = folder / f"{split}.bin"
        if not path.exists() or path.stat().st_size == 0:
            raise ValueError(f"{path} is missing or empty: {remedy}")
        if path.stat().st_size != 2 * count:
            raise ValueError(f"{path} holds {path.stat().st_size} bytes, its meta.json says {2 * count}: {remedy}")
        if count <= block_size:
            raise ValueError(f"{path} holds {count} tokens, a block takes {block_size + 1}: lower --block-size or "
                             "prepare more text")
        data[split] = np.memmap(path, dtype="<u2", mode="r")
        if data[split].max() >= vocab_size:
            raise ValueError(f"{path} holds token {data[split].max()}, beyond the vocabulary of {vocab_size}: {remedy}")
    return data


@functools.lru_cache(maxsize=2)
def epoch_starts(n_tokens, block_size, seed, epoch):
    """First tokens of an epoch's blocks: the text is cut at a random offset, and every block comes once, shuffled."""
    rng = np.random.default_rng((seed, epoch))
    n = (n_tokens - 1) // block_size
    if n > 1:
        return rng.integers(block_size) + block_size * rng.permutation(n - 1)
    return np.zeros(1, dtype=np.int64)


def get_batch(tokens, config, step, part, n_parts, device):
    """Part `part` of the sequences of a step, x and y (batch_size / n_parts, T). A function of the seed and the step
    alone, so that a resumed run, and one on more processes, sees the same data."""
    size = config.batch_size // n_parts
    rows = step * config.batch_size + part * size + np.arange(size)
    n = len(epoch_starts(len(tokens), config.block_size, config.seed, 0))
    starts = [epoch_starts(len(tokens), config.block_size, config.seed, row // n)[row % n] for row in rows]
    xy = torch.from_numpy(np.stack([tokens[s:s + config.block_size + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        xy = xy.pin_memory().to(device, non_blocking=True)
    else:
        xy = xy.to(device)
    return xy[:, :-1], xy[:, 1:]


@torch.no_grad()
def evaluate(model, tokens, block_size, batch_size, device, autocast=nullcontext(), rank=0, world=1):
    """Mean nats a token over the whole split, in order, in blocks that do not overlap.

    Every token but the first is predicted once, with the past of its own block. Every call has one shape (the compiled
    model is used as it is): what is missing in the last batch is padded, and its targets of -1 do not count.
    """
    was_training = model.training
    model.eval()
    n = math.ceil((len(tokens) - 1) / block_size)                                         # blocks, the last one shorter
    total = torch.zeros(2, dtype=torch.float64)                                           # nats, tokens
    for first in range(rank * batch_size, n, world * batch_size):
        xy = torch.full((batch_size, block_size + 1), -1)
        for i, block in enumerate(range(first, min(first + batch_size, n))):
            piece = tokens[block * block_size:(block + 1) * block_size + 1]
            xy[i, :len(piece)] = torch.from_numpy(piece.astype(np.int64))
        xy = xy.to(device)
        x, y = xy.clamp(min=0)[:, :-1], xy[:, 1:]                                         # with strides as in training
        with autocast:
            loss = model(x, y)[1]
        count = (y >= 0).sum().item()
        total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
    model.train(was_training)
    nats, count = over_processes(total.tolist(), world)
    return nats / count


def perplexity(nats):
    return math.exp(min(nats, 700))  # e^710 is beyond a float


def evaluate_splits(model, data, block_size, batch_size, device, autocast):
    """Nats and perplexity on the validation split, and on the test split if there is one, as summary.json has them.

    The perplexity per word shares the same nats out among the words, as WikiText counts them: what stands between
    whitespace, and one end-of-sentence for each line, empty ones too (245,569 in WikiText-103's test split).
    """
    results = {}
    for split in ("valid", "test"):
        if split in data:
            nats = evaluate(model, data[split], block_size, batch_size, device, autocast)
            words = data["meta"]["words"][split] + data["meta"]["lines"][split]
            per_word = perplexity(nats * (len(data[split]) - 1) / words)
            results |= {f"{split}_nats": nats, f"{split}_ppl": perplexity(nats), f"{split}_ppl_per_word": per_word}
    return results


def peak_gib(device):
    return torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else None


def training_flops(model):
    """Model FLOPs of a training step for each token: what the equations need, however they are computed.

    6 for each weight of a matrix product (2 forward, 4 backward), the output matrix included, the embeddings not; and
    three times the attention's forward. That is in a layer, with P features a head,
        softmax    2 T C                           two products of width D with the T / 2 keys before, on average
        window     4 C times its mean length       window - window^2 / 2T
        linear     4 P (D + 1) H + maps of q, k    the state takes up a token and answers it: the recurrent form
        hybrid     both of the last two
    so recomputed features and the products inside a chunk count as overhead, not as work done. Norms, activations and a
    short convolution are left out: thousandths.
    """
    c, attention = model.config, 0
    weights, D = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)), c.n_embd // c.n_head
    for block in model.transformer.h:
        linear = block.attn.linear
        window = linear.window if linear else min(block.attn.window or c.block_size, c.block_size)
        attention += 4 * (window - window ** 2 / (2 * c.block_size)) * c.n_embd
        if linear:
            phi = linear.map_q
            width = D if phi.weight is not None else phi.feature_dim if phi.kind == "performer" else 0
            attention += c.n_head * (4 * phi.feature_dim * (D + 1) + 4 * D * width)
    return 6 * weights + 3 * attention


def utilisation(model, tokens_per_second, device, world=1):
    """Model FLOPs done, as a part of what `world` such GPUs can do in bf16; None for one that is not in the list."""
    name = device_name(device) if device.type == "cuda" else ""
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    return training_flops(model) * tokens_per_second / (world * peak * 1e12) if peak else None


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def largest(*values):
    return max((v for v in values if v is not None), default=None)


def over_processes(values, world):
    """The sums of a few floats over all processes, which meet on their CPUs: nothing waits for what a GPU is doing."""
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and checkpoints


def make_optimizer(model, config, device):
    """AdamW. Matrices decay, vectors do not, and the feature maps are groups of their own for their learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # A map's bias and a hybrid's gate are vectors, one a head; the short convolution starts from the identity,
        # which decay would shrink.
        vectors = ("bias", "map_gate", "short_conv.weight")
        is_map, is_matrix = ".map_" in name, p.ndim >= 2 and not name.endswith(vectors)
        groups.setdefault((is_map, is_matrix), []).append(p)
    return torch.optim.AdamW(
        [dict(params=params, lr_scale=config.map_lr_scale if is_map else 1.0,
              weight_decay=config.weight_decay if is_matrix and (config.map_decay or not is_map) else 0.0)
         for (is_map, is_matrix), params in groups.items()],
        lr=config.lr, betas=(0.9, config.beta2), fused=device.type == "cuda")


def learning_rate(step, config):
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def write_atomically(path, write):
    """write(file) under a temporary name, renamed when complete: a full disk or a crash leaves the earlier file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"could not write {path} ({e.strerror or e}): free some space or choose another --out; "
                         "the file that was there is kept") from e


def second_name(path, name):
    """The file at path under another name too, at once: no second gigabyte is written where the disk has hard links."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:
        write_atomically(name, lambda f: f.write(path.read_bytes()))


def save_json(path, value):
    write_atomically(path, lambda f: f.write(json.dumps(value, indent=1).encode() + b"\n"))


def load_checkpoint(path, mmap=False):
    """The dict of a last.pt or best.pt, on the CPU. ValueError if it is not there or damaged. mmap: tensors stay on the
    disk, for who asks for the config alone."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}: train one with python train_gpt.py, or mend the path")
    try:
        mmap = mmap and str(path).isprintable()  # no file whose name is not UTF-8
        if not mmap:
            with zipfile.ZipFile(path) as archive:  # PyTorch writes checksums, and compares none
                if archive.testzip():
                    raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        complete = {"model", "optimizer", "state", "model_config", "meta", "config"} <= checkpoint.keys()
    except PermissionError:
        raise
    except Exception as e:  # whatever a file of other bytes makes of the unpickler
        raise ValueError(damaged(path)) from e
    if not complete:
        raise ValueError(damaged(path))
    return checkpoint


def damaged(path):
    return (f"{path} is damaged, or not a checkpoint of train_gpt.py: if the other one of last.pt and best.pt beside "
            "it is whole, copy it over this one; otherwise train again")


def load_model(path, device="cpu"):
    """(model in eval mode, its checkpoint), from a last.pt or best.pt."""
    checkpoint = load_checkpoint(path)
    if all(".map_" in name for name in checkpoint["model"]):
        raise ValueError(f"{path} holds feature maps alone: give the conversion's folder, or its finetuned/best.pt")
    try:
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(merge_lora(checkpoint["model"]))
    except (TypeError, RuntimeError) as e:
        raise ValueError(damaged(path)) from e
    return model.to(device).eval(), checkpoint


def best_of(path):
    """The best.pt in the folder of a run, or of a conversion; a .pt file itself."""
    inside = (path / "best.pt", path / "finetuned/best.pt")
    return path if path.suffix == ".pt" else next((p for p in inside if p.exists()), inside[0])


def device_name(device):
    """The chip's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"Apple GPU of {cpu}" if device.type == "mps" else f"{cpu}, {torch.get_num_threads()} threads"


def provenance(device, command=""):
    """What a result needs to be trusted: command (default: this process'), commit, versions, device."""
    try:
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    world = int(os.environ.get("WORLD_SIZE", 1))                                          # set by torchrun
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = f"--nnodes {world // local} " if world > local else ""
    start, devices = (f"torchrun {nodes}--nproc-per-node {local}", f"{world} x ") if world > 1 else ("python", "")
    said = (a.encode(errors="surrogateescape").decode(errors="backslashreplace") for a in sys.argv)  # may be no UTF-8
    return dict(command=command or " ".join([start, *said]), commit=commit or "unknown", torch=torch.__version__,
                python=platform.python_version(), device=devices + device_name(device))


def mean_loss(state):
    """Of the training steps since the last row; nan before the first."""
    return state["loss_sum"] / state["loss_count"] if state["loss_count"] else math.nan


class Log:
    """log.csv, one row an evaluation. A resumed run drops the rows that it is going to write again."""

    columns = ("step", "tokens", "lr", "train_nats", "valid_nats", "valid_ppl", "seconds", "tokens_per_second", "mfu",
               "peak_gib", "command", "commit", "torch", "python", "device")

    def __init__(self, path, start, columns=columns):
        self.columns = columns
        kept = io.StringIO(newline="")
        writer = csv.DictWriter(kept, self.columns, restval="-")  # for a log that is older than some columns
        writer.writeheader()
        if start and path.exists():
            with path.open(newline="") as f:  # a row cut short by a crash is dropped
                writer.writerows(row for row in csv.DictReader(f)
                                 if set(row) <= set(self.columns) and all(row.values()) and int(row["step"]) < start)
        write_atomically(path, lambda f: f.write(kept.getvalue().encode()))
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, self.columns)

    def row(self, step, tokens_per_step, lr, state, nats, tokens_per_second, mfu, about):
        self.write((step, step * tokens_per_step, lr, mean_loss(state), nats, perplexity(nats), state["seconds"],
                    tokens_per_second, mfu, state["peak_gib"], *about.values()))

    def write(self, row):
        self.writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else "-" if v is None else v
                              for k, v in zip(self.columns, row, strict=True)})
        self.file.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank updates (LoRA, Hu et al. 2021): train W + scale B A instead of W, with B (out, r) and A (r, in). The paper
# finetunes Llama-2 so: rank 8, alpha 16 on the projections of q, k, v and the output, all else frozen.


class LowRankLinear(nn.Linear):
    """A linear layer whose weight stays, plus scale B A. B starts at zero: the update does too."""

    def __init__(self, linear, rank):
        nn.Module.__init__(self)  # not nn.Linear's, which would draw weights that are replaced here
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return super().forward(x) + LORA_SCALE * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, rank):
    """Freeze the GPT `model` and give the attention's projections, c_attn (q, k, v) and c_proj, low-rank updates."""
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = LowRankLinear(block.attn.c_attn, rank)
        block.attn.c_proj = LowRankLinear(block.attn.c_proj, rank)


def merge_lora(state):
    """A state_dict with its low-rank updates added to the weights. One without any is returned as it is."""
    merged = {name: p for name, p in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_A"):
            layer = name.removesuffix("lora_A")
            update = state[layer + "lora_B"].float() @ state[name].float()
            merged[layer + "weight"] = merged[layer + "weight"] + LORA_SCALE * update
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train_step(model, optimizer, tokens, config, step, device, autocast, rank, world):
    """One optimizer step on config.batch_size sequences. Returns (2,): this process' mean loss, in nats, and the norm
    of the gradient. Reading them waits for a GPU, so that is left to the caller."""
    torch.manual_seed((config.seed << 32) + step * world + rank)  # dropout, too, is a function of the seed and the step
    lr, total = learning_rate(step, config), 0.0
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    for i in range(config.accum):
        x, y = get_batch(tokens, config, step, rank * config.accum + i, world * config.accum, device)
        last = i == config.accum - 1
        with nullcontext() if world == 1 or last else model.no_sync():  # gradients travel once a step
            with autocast:
                loss = model(x, y)[1] / config.accum
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack((total, norm))


def steps_ahead(device):
    """How many steps are begun before the last one is waited for, so that a GPU has work while the CPU reads a batch
    or, where several processes train, agrees with the others on the loss."""
    return 1 if device.type == "cuda" else 0


def send_home(values):
    """(copy on the CPU, event after which it is there or None). A copy that is begun now waits for no later step."""
    if values.device.type != "cuda":
        return values, None
    copy, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    return copy, arrived


def stop_if_not_finite(value, step, config, lr="--lr"):
    if not math.isfinite(value):
        out = run_folder(config)
        good = f"; the last checkpoint in {out} is good" if (out / "last.pt").exists() else ""
        raise ValueError(f"the loss or its gradient is {value} at step {step}, learning rate "
                         f"{learning_rate(step, config):.2g}{good}: lower {lr} or lengthen --warmup")


def holding(f):
    """f with an argument `held`, an ExitStack that is closed when f has ended: for the locks on its folders."""
    @functools.wraps(f)
    def g(*args, **kwargs):
        with ExitStack() as held:
            return f(*args, **kwargs, held=held)
    return g


@holding
def train(config, model=None, how="add --resume to the command", command="", *, held):
    """Train, evaluate, save and sample as `config` says. Returns what is also written to summary.json.

    model: the GPT to start from, of the shape that `config` says; default: a new one. `how` one goes on after Ctrl-C,
    and the `command` that began it all, are what a caller knows.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # set by torchrun
    device, dtype, why = pick_device(config.device, config.dtype)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    say = tqdm.write if rank == 0 else lambda text: None
    if config.batch_size % (world * config.accum):
        raise ValueError(f"--batch-size {config.batch_size} must be a multiple of --accum {config.accum} x {world} "
                         "processes")
    data, out = find_data(config, rank, world), run_folder(config)
    if config.resume and rank == 0:
        held.enter_context(lock_folder(out))  # before last.pt is read
    raw, optimizer, state = build(config, data["meta"], device, model)
    tokenizer = load_tokenizer(data["meta"]["tokenizer"])  # now, and not after hours: what cannot work fails here
    prompt = encode_prompt(tokenizer, config.prompt)
    if rank == 0:
        start_folder(out, config, raw, data["meta"], device, say, held)
    model = torch.compile(raw) if config.compile and config.steps else raw
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)   # they never change
    autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
    unit, count, micro = data["meta"]["unit"], data["meta"]["tokens"], config.batch_size // (world * config.accum)
    say(f"{config.attention}, {sum(p.numel() for p in raw.parameters()) / 1e6:.2f}M parameters, on {why}\n"
        f"{count['train']:,} training and {count['valid']:,} validation {unit}s, run folder {out}")

    def save(*names):
        if rank > 0:
            return
        write_atomically(out / names[0], lambda f: torch.save(dict(
            model=raw.state_dict(), optimizer=optimizer.state_dict(), state=state, config=asdict(config),
            model_config=asdict(raw.config), meta=data["meta"]), f))
        for name in names[1:]:
            second_name(out / names[0], out / name)

    first, about = state["step"], provenance(device, command)
    kept = first % config.eval_every > 0 and first < config.steps  # a finished run's last row is not written again
    log = Log(out / "log.csv", first + kept) if rank == 0 else None
    state.setdefault("commands", []).append(about["command"])
    seconds, tokens_per_step = [], config.batch_size * config.block_size
    begun, since, quiet = [], 0.0, rank > 0 or None  # None: no bar where there is no terminal

    def settle(n):
        """Wait for all but n of the steps that were begun, and count them."""
        nonlocal since
        while len(begun) > n:
            values, arrived = begun.pop(0)
            if arrived:
                arrived.synchronize()
            loss, norm = over_processes([x / world for x in values.tolist()], world)
            stop_if_not_finite(loss + norm, state["step"], config)                        # before anything is saved
            now = time.perf_counter()
            seconds.append(now - since)
            since = now
            state.update(step=state["step"] + 1, loss_sum=state["loss_sum"] + loss, loss_count=state["loss_count"] + 1,
                         seconds=state["seconds"] + seconds[-1])
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed(seconds[-20:], tokens_per_step):,.0f}")
            bar.update()

    def rate():
        """Tokens a second of the steps made here, or before a resumption if none was."""
        return speed(seconds or [state["seconds"] / max(1, state["step"])], tokens_per_step)

    with interrupts(say) as received, tqdm(total=config.steps, initial=first, unit="step", disable=quiet) as bar:
        for step in range(first, config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                settle(0)
                nats = evaluate(model, data["valid"], config.block_size, micro, device, autocast, rank, world)
                stop_if_not_finite(nats, step, config)
                say(f"step {step:5d}  valid {nats:.4f} nats, perplexity {perplexity(nats):.2f} per {unit}")
                improved, state["best"] = nats < state["best"], min(nats, state["best"])
                state["peak_gib"] = largest(state.get("peak_gib"), peak_gib(device))
                save("best.pt", "last.pt") if improved else save("last.pt")  # last.pt says that best.pt is there
                if log:
                    log.row(step, tokens_per_step, learning_rate(step, config), state, nats, rate(),
                            utilisation(raw, rate(), device, world), about)
                state.update(loss_sum=0.0, loss_count=0)
            if step == config.steps:
                break
            if not begun:
                since = time.perf_counter()
            values = train_step(model, optimizer, data["train"], config, step, device, autocast, rank, world)
            begun.append(send_home(values))
            settle(steps_ahead(device))
            if over_processes([len(received)], world)[0]:
                settle(0)
                save("last.pt")
                over_processes([0.0], world)  # where one process leaves, torchrun stops the others: not while one saves
                say(f"stopped after step {step + 1}, saved: {how} to go on")
                raise SystemExit(130)
    summary = None
    if rank == 0:
        summary = finish(config, raw, data, out, device, autocast, micro, state, rate(), about, world)
        text = tokenizer.decode_bytes(raw.generate(prompt.to(device), config.sample_tokens, 0.8, top_k=50)[0].tolist())
        say(f"best after step {summary['best_step']}: valid {summary['valid_nats']:.4f} nats, perplexity "
            f"{summary['valid_ppl']:.2f} per {unit}, {rate():,.0f} {unit}s/s, {state['seconds']:.0f} s of training\n"
            f"--- sample ---\n{text.decode(errors='replace')}")
    if world > 1:
        dist.barrier()  # a process that leaves while another still works was seen to abort, and to take the run with it
        dist.destroy_process_group()
    return summary


def find_data(config, rank, world):
    """The text of --data, or the embedded default, which is made at the first use."""
    folder = Path(config.data or HERE / "data" / "pydoc")
    if not config.data and rank == 0 and not (folder / "meta.json").exists():
        prepare_pydoc(folder)
    if world > 1:
        dist.barrier()
    return load_data(folder, config.block_size)


def build(config, meta, device, model=None):
    """(model, optimizer, state of the run): new from the seed, or `model`, or from last.pt."""
    torch.manual_seed(config.seed)
    shape = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"}
    if model is None:
        if config.lora_rank and not config.resume:
            raise ValueError("--lora-rank finetunes a trained model, and this one is new: convert_gpt2.py --lora-rank")
        model = GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape))
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    model = model.to(device).train()
    optimizer = make_optimizer(model, config, device)
    if not config.resume:
        return model, optimizer, dict(step=0, best=math.inf, loss_sum=0.0, loss_count=0, seconds=0.0)
    checkpoint = load_checkpoint(run_folder(config) / "last.pt")
    for key in ("tokenizer", "sha256"):
        if checkpoint["meta"][key] != meta[key]:
            how = f"its {key} differs"
            if key == "tokenizer":
                how = f"tokenizer was {checkpoint['meta'][key]}, --data has {meta[key]}"
            raise ValueError(f"the run in {run_folder(config)} was trained on another text ({how}): mend --data")
    made, planned = checkpoint["state"]["step"], checkpoint["config"]["steps"]
    if config.steps != planned and not made == planned < config.steps:
        raise ValueError(f"the run in {run_folder(config)} has made {made} of its {planned} steps: --resume goes on "
                         "without --steps, and with a larger one where all are made")
    if config.steps > planned and planned % config.eval_every:  # the last row has these losses, and stays
        checkpoint["state"].update(loss_sum=0.0, loss_count=0)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, checkpoint["state"]


def start_folder(out, config, model, meta, device, say, held):
    """Make the run folder, and hold it. A run that is already there is moved aside, never overwritten."""
    if not config.resume:
        held.enter_context(lock_folder(out))
        if (out / "last.pt").exists():
            move_aside(out, say)
            held.enter_context(lock_folder(out))
    save_json(out / "config.json", dict(config=asdict(config), model=asdict(model.config), meta=meta,
                                        **provenance(device)))


def free_name(path, ending=""):
    """The first of path-1, path-2, ... with that ending that is not there."""
    return next(p for i in itertools.count(1) if not (p := path.with_name(f"{path.name}-{i}{ending}")).exists())


def move_aside(out, say):
    """Returns where it is now."""
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"--out {out} is a folder you are in, and holds an earlier run: choose another")
    aside = free_name(out)
    out.rename(aside)
    say(f"{out} held an earlier run: it is now {aside}")
    return aside


def finish(config, model, data, out, device, autocast, micro, state, tokens_per_second, about, world):
    """Evaluate the best checkpoint, also on the test split if there is one, and write summary.json."""
    best = load_checkpoint(out / "best.pt")
    model.load_state_dict(best["model"])
    model.eval()
    meta, trained = data["meta"], config.steps * config.batch_size * config.block_size
    summary = dict(attention=config.attention, parameters=sum(p.numel() for p in model.parameters()),
                   steps=config.steps, tokens=trained, epochs=trained / meta["tokens"]["train"], seed=config.seed,
                   best_step=best["state"]["step"], unit=meta["unit"])
    summary |= evaluate_splits(model, data, config.block_size, micro, device, autocast)
    summary |= dict(tokens_per_second=tokens_per_second, mfu=utilisation(model, tokens_per_second, device, world),
                    train_seconds=state["seconds"], peak_gib=state["peak_gib"])
    summary |= dict(about, command=state["commands"][0], resumed=len(state["commands"]) - 1)
    save_json(out / "summary.json", summary)
    return summary


def encode_prompt(tokenizer, prompt):
    """(1, T) token ids."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that this locale does not know
        raise ValueError("--prompt is not UTF-8, or the terminal's locale is not: set LC_ALL=C.UTF-8") from None
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("--prompt is empty: give at least one character")
    return torch.tensor([ids])


def speed(seconds, tokens_per_step):
    """Tokens a second at the median step: compilation and hiccups do not count."""
    median = float(np.median(seconds)) if seconds else 0.0
    return tokens_per_step / median if median else 0.0


@contextmanager
def interrupts(say):
    """A list that Ctrl-C and SIGTERM append to, so that a step is never cut in two. A second one stops at once."""
    received = []

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(RuntimeError):  # the signal may come in the middle of another line
            say("stopping after this step (once more: at once)")

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def cli(run, out_of_memory="double --accum, or lower --batch-size, --block-size or --n-embd"):
    """run(), with what a user can mend told in a sentence and exit code 2 instead of a traceback."""
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show becomes a question mark
    try:
        run()
        return
    except UnicodeError:  # a ValueError, but a bug
        raise
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:  # the reader of our output has left, as in `sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except ValueError as e:
        message, code = f"error: {e}", 2
    except OSError as e:
        message, code = f"error: {e}: free some space, or mend the path or its permissions", 2
    except (RuntimeError, MemoryError) as e:
        # PyTorch says it in one type on CUDA, and in words alone on MPS and on the CPU.
        words = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(e) for w in words):
            raise
        message, code = f"error: out of memory: {out_of_memory}. {(str(e).splitlines() or [''])[0]}", 2
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    cli(lambda: train(parse_config(TrainConfig, PRESETS)))
