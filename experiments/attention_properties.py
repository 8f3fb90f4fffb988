"""Why do the older maps fail? How spiky, and how monotone in q.k, the attention of each feature map is.

    python experiments/attention_properties.py                  on the tiny softmax model, trained if need be

A trained softmax model reads text it was not trained on, and every map turns the same q and k into attention weights.
Entropy says how spiky a row of weights is, Spearman's rank correlation with q.k how monotone. Maps that learn are
distilled on the training text first (once: they are kept in --maps).
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
import plot  # noqa: E402
from convert_gpt2 import (  # noqa: E402
    ConvertConfig, distill, find_text, load_teacher, maps_of, stage_config, swap)
from hedgehog import attention_weights  # noqa: E402
from train_gpt import (  # noqa: E402
    MAY_CHANGE_ON_RESUME, cli, load_checkpoint, opt, parse_config, pick_device, provenance, save_json)

DISTILLED = ("hedgehog", "hedgehog_exp", "t2r")
MAPS = {f"{kind}, distilled": dict(attention=kind) for kind in DISTILLED}
MAPS |= {f"{kind}, not distilled": dict(attention=kind, distill_steps=0) for kind in DISTILLED}
MAPS |= {kind: dict(attention=kind) for kind in ("taylor", "performer", "elu", "relu", "cosformer")}
MAPS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}
BINS = np.arange(-8, 0.5, 0.5)  # of softmax's log-weight, which is q.k / sqrt(D) up to a constant of the row


@dataclass
class PropertiesConfig:
    teacher: str = opt("", "softmax run of train_gpt.py; default: runs/tiny-softmax, trained if it is not there")
    data: str = opt("", "folder made by data/prepare.py; default: data/pydoc, made on the fly")
    maps: str = opt("runs/convert-tiny", "distilled maps are read from here, or made and kept here")
    distill_steps: int = opt(400, "optimizer steps of a distillation")
    distill_lr: float = opt(1e-2, "its peak learning rate")
    compile: bool = opt(False, "torch.compile its loss: for long contexts on a GPU")
    blocks: int = opt(8, "blocks of held-out text")
    seed: int = opt(0, "of the distillation and of performer's random projections")
    device: str = opt("auto", "where to run", ("auto", "cuda", "mps", "cpu"))
    out: str = opt("experiments/results/attention_properties.json", "the results; the figures go beside it")


def teacher_and_text(config):
    """(softmax GPT in eval mode on its device, the text, device): as convert_gpt2.py finds them."""
    device = pick_device(config.device, "float32")[0]
    convert = ConvertConfig(teacher=config.teacher, data=config.data, device=config.device)
    teacher, tokenizer = load_teacher(convert)
    return teacher.to(device).eval(), find_text(stage_config(convert, teacher, "distilled"), teacher, tokenizer), device


def student(teacher, data, config, device, block_size=None, change=None, **options):
    """The teacher with linear attention, as `change` leaves it. Its maps are distilled now, unless an earlier call has
    kept them."""
    options = dict(distill_steps=config.distill_steps, distill_lr=config.distill_lr, seed=config.seed,
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
            saved = load_checkpoint(Path(stage.out) / "last.pt")["config"].items()
            other = [f"{k}={v}" for k, v in saved if k not in MAY_CHANGE_ON_RESUME and getattr(stage, k) != v]
            if other:
                raise ValueError(f"maps in {stage.out} were distilled with {', '.join(other)}: choose another --maps")
        distill(model, data, stage, device, nullcontext(), tqdm.write)
    return model


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


def entropy(p):
    """Nats, (..., T) of weights p (..., T, T)."""
    return torch.special.entr(p).sum(dim=-1)


def ranks(x):
    """Ranks along the last axis; equal values share the mean of theirs."""
    a, b = x.unsqueeze(-1), x.unsqueeze(-2)
    return ((a > b).sum(-1) + (a >= b).sum(-1)).double() / 2


def rank_correlation(x, y):
    """Spearman's, along the last axis. 0 where one of the two is constant: such weights follow nothing."""
    x, y = (r - r.mean(dim=-1, keepdim=True) for r in (ranks(x), ranks(y)))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)


def properties(model, layers):
    """A row for each layer, and the curve of the weights against q.k over all layers."""
    rows, curve = [], []
    for layer, (q, k) in enumerate(layers):
        s, p, y = scores(q, k), weights(None, layer, q, k), weights(model, layer, q, k)
        gap = (entropy(y) - entropy(p))[:, :, 1:]                                        # the first token has no choice
        some = range(q.shape[2] // 4, q.shape[2], max(1, q.shape[2] // 16))               # queries with a past
        rho = torch.cat([rank_correlation(s[:, :, t, :t + 1], y[:, :, t, :t + 1]) for t in some])
        rows.append(dict(layer=layer, entropy=entropy(y)[:, :, 1:].mean().item(), entropy_gap=gap.mean().item(),
                         entropy_gap_abs=gap.abs().mean().item(), rank_correlation=rho.mean().item()))
        curve += [torch.stack((p[:, :, t, :t + 1].log(), y[:, :, t, :t + 1])).flatten(1) for t in some]
    x, y = torch.cat(curve, dim=1).double().cpu().numpy()
    binned = [(middle + 0.25, y[(middle <= x) & (x < middle + 0.5)]) for middle in BINS[:-1]]
    return rows, [dict(log_softmax=float(m), mean=float(v.mean()), low=float(np.quantile(v, 0.1)),
                       high=float(np.quantile(v, 0.9)), n=len(v)) for m, v in binned if len(v) >= 20]


def main(config):
    teacher, data, device = teacher_and_text(config)
    T, valid = teacher.config.block_size, data["valid"]
    starts = np.linspace(0, len(valid) - T, config.blocks).astype(int)
    layers = read(teacher, torch.from_numpy(np.stack([valid[s:s + T] for s in starts]).astype(np.int64)).to(device))
    rows, curves = [], {}
    for name in tqdm(("softmax", *MAPS), unit="map", disable=None):
        model = None if name == "softmax" else student(teacher, data, config, device, **MAPS[name])
        found, curves[name] = properties(model, layers)
        mean = {key: sum(row[key] for row in found) / len(found) for key in found[0]} | {"layer": "mean"}
        rows += [dict(map=name, **row) for row in (*found, mean)]
        tqdm.write(f"{name:28} entropy {mean['entropy']:.3f} nats, {mean['entropy_gap']:+.3f} from softmax's, "
                   f"rank correlation with q.k {mean['rank_correlation']:.3f}")
    save_json(Path(config.out), dict(rows=rows, curves=curves, blocks=config.blocks, block_size=T,
                                     distill_steps=config.distill_steps, distill_lr=config.distill_lr, seed=config.seed,
                                     **provenance(device)))
    plot.draw(plot.properties, Path(config.out))


if __name__ == "__main__":
    cli(lambda: main(parse_config(PropertiesConfig)))
