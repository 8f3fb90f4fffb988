"""A trained softmax model, its linear students, and what both attend to, for the experiments that compare them.

Their `config` is what `students_parser` reads.
"""

import argparse
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import common  # noqa: F401  it puts the root folder on the path
import torch
from tqdm import tqdm

from convert_gpt2 import ConvertConfig, distill, find_text, load_teacher, maps_of, stage_config, swap, text_of
from hedgehog import LEARNED_MAPS, attention_weights
from train_gpt import MAY_CHANGE_ON_RESUME, HelpFormatter, load_checkpoint, pick_device, save_json

# Distilled for 400 steps on the tiny model, one seed, T2R has a KL of 1.15 nats on held-out text at 3e-4, 0.86 at 1e-3
# (rank correlation with q.k 0.79), 0.92 at 3e-3, and 1.06 at Hedgehog's 1e-2, where it does not settle. On blocks of 64
# tokens more is better: 0.36 at 1e-3, 0.24 at 3e-3, 0.22 at 1e-2.
T2R_LR = 1e-3


def students_parser(doc, maps, distill_lr, out, t2r=True):
    """The flags that `teacher_and_text` and `student` need; `doc` is the script's, `t2r` says whether that map takes
    part, the others are defaults."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("teacher", nargs="?", default="", metavar="CHECKPOINT",
        help="softmax run of train_gpt.py; runs/tiny-softmax if it is left out")
    add("--data", default="", help="folder made by data/prepare.py; empty: the one that the checkpoint was trained on")
    add("--maps", default=maps, help="distilled maps are read from here, or made and kept here")
    add("--distill-steps", type=int, default=400, help="optimizer steps of a distillation")
    add("--distill-lr", type=float, default=distill_lr, help="its peak learning rate")
    if t2r:
        add("--distill-lr-t2r", type=float, default=T2R_LR, help="that of T2R, which does not settle at Hedgehog's")
    add("--seed", type=int, default=0, help="of the distillation and of performer's random projections")
    add("--compile", action="store_true", help="torch.compile its loss: for long contexts on a GPU")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    add("--out", default=out, help="the results; the figure goes beside it")
    return parser


def teacher_and_text(config):
    """(softmax GPT in eval mode on its device, the text, device): as convert_gpt2.py finds them, but without --data the
    teacher's own text. ValueError if --maps holds maps of others."""
    device = pick_device(config.device, "float32")[0]
    convert = ConvertConfig(teacher=config.teacher, device=config.device)
    teacher, tokenizer = load_teacher(convert)
    config.data = convert.data = config.data or text_of(config.teacher)
    data = find_text(stage_config(convert, teacher, "distilled"), teacher, tokenizer)
    remember(teacher, data, Path(config.maps))
    return teacher.to(device).eval(), data, device


def rate(config, attention, distill_steps=None, **options):
    """Peak learning rate of the distillation that `student` makes of these options; None where it makes none."""
    steps = config.distill_steps if distill_steps is None else distill_steps
    if attention not in LEARNED_MAPS or not steps:
        return None
    return config.distill_lr_t2r if attention == "t2r" else config.distill_lr


def student(teacher, data, config, device, block_size=None, change=None, **options):
    """The teacher with linear attention, as `change` leaves it. Its maps are distilled now, unless an earlier call has
    kept them."""
    options = dict(distill_steps=config.distill_steps, distill_lr=rate(config, **options) or 0.0, seed=config.seed,
                   compile=config.compile) | options
    convert = ConvertConfig(teacher=config.teacher, data=config.data, out=config.maps, resume=True, **options)
    torch.manual_seed(config.seed)                                                        # performer draws its w_i
    model = swap(teacher, convert).to(device).eval()
    if change:
        change(model)
    if convert.distill_steps and maps_of(model):
        stage = stage_config(convert, model, "distilled", steps=convert.distill_steps, accum=1, lr=convert.distill_lr,
                             batch_size=convert.distill_batch_size, weight_decay=0.0,
                             block_size=block_size or teacher.config.block_size)
        if stage.resume:
            saved = load_checkpoint(Path(stage.out) / "last.pt", mmap=True)["config"].items()
            flags = dict(steps="--distill-steps", seed="--seed",
                         lr="--distill-lr-t2r" if convert.attention == "t2r" else "--distill-lr")
            other = [f"{flags.get(k, k)} {v}" for k, v in saved
                     if k not in MAY_CHANGE_ON_RESUME and getattr(stage, k) != v]
            if other:
                raise ValueError(f"maps in {stage.out} were distilled with {', '.join(other)}: choose another --maps")
        distill(model, data, stage, device, nullcontext(), tqdm.write, "give the same command again")
    return model


def remember(teacher, data, maps):
    """Write down what maps in this folder imitate, on which text. ValueError if those that are there know another."""
    path, digest = maps / "teacher.json", hashlib.sha256(json.dumps(data["meta"], sort_keys=True).encode())
    for name, x in teacher.state_dict().items():
        digest.update(name.encode() + x.numpy().tobytes())
    if path.exists() and json.loads(path.read_text()) != digest.hexdigest():
        raise ValueError(f"maps in {maps} were distilled from another model or on another text: choose another --maps")
    maps.mkdir(parents=True, exist_ok=True)
    save_json(path, digest.hexdigest())


@torch.no_grad()
def read(teacher, idx):
    """What softmax attention compares while the teacher reads idx (B, T): a list of q, k (B, H, T, D), one a layer."""
    gpt, layers = teacher.transformer, []
    x = gpt.wte(idx) + gpt.wpe(torch.arange(idx.shape[1], device=idx.device))             # (B, T, C)
    for block in gpt.h:
        layers.append(block.attn.split_heads(block.ln_1(x))[:2])
        x = block(x)
    return layers


def scores(q, k):
    """q.k / sqrt(D), (B, H, T, T), -inf for the future."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)


@torch.no_grad()
def weights(model, layer, q, k):
    """The (B, H, T, T) attention weights of one layer of a linear model, or of softmax where model is None."""
    if model is None:
        return scores(q, k).softmax(dim=-1)
    maps = model.transformer.h[layer].attn.linear
    return attention_weights(maps.map_q(q, is_query=True), maps.map_k(k))
