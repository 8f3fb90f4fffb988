"""Why do the older maps fail? How spiky, and how monotone in q.k, the attention of each feature map is.

    python experiments/attention_properties.py                  on the tiny softmax model, trained if need be

A trained softmax model reads text it was not trained on, and every map turns the same q and k into attention weights.
Entropy says how spiky a row of weights is, Spearman's rank correlation with q.k how monotone. Maps that learn are
distilled on the training text first (once: they are kept in --maps).
"""

import json

import numpy as np
import torch
from common import GREY, bars, color, draw_if_possible, figure, ready, save
from students import rate, read, scores, student, students_parser, teacher_and_text, weights
from tqdm import tqdm

from hedgehog import LEARNED_MAPS
from train_gpt import check_least, cli, provenance, save_json

MAPS = {f"{kind}, distilled": dict(attention=kind) for kind in LEARNED_MAPS}
MAPS |= {f"{kind}, not distilled": dict(attention=kind, distill_steps=0) for kind in LEARNED_MAPS}
MAPS |= {kind: dict(attention=kind) for kind in ("taylor", "performer", "elu", "relu", "cosformer")}
MAPS |= {f"exp t={t}": dict(attention="exp", temperature=float(t)) for t in (1, 2)}
BINS = np.arange(-8, 0.5, 0.5)  # of softmax's log-weight, which is q.k / sqrt(D) up to a constant of the row


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


def draw(path):
    """Two figures: entropy and rank correlation of every map, and the curves of the weights against q.k."""
    found = json.loads(path.read_text())
    mean = {row["map"]: row for row in found["rows"] if row["layer"] == "mean"}
    fig, [axes] = figure(columns=2, height=0.9 + 0.36 * len(mean), sharey=True)
    bars(axes[0], list(mean), [row["entropy"] for row in mean.values()], "entropy of a row of weights (nats)")
    axes[0].axvline(mean["softmax"]["entropy"], color=GREY, linestyle="--", linewidth=1.2)
    bars(axes[1], list(mean), [row["rank_correlation"] for row in mean.values()], "rank correlation with q·k")
    axes[0].invert_yaxis()  # a shared axis that `bars` has turned twice
    near = min((name for name in mean if name != "softmax"), key=lambda name: mean[name]["entropy_gap_abs"])
    save(fig, path.with_suffix(".png"), f"Entropy closest to softmax's: {near}, {mean[near]['entropy_gap']:+.2f} nats "
         f"on average, {mean[near]['entropy_gap_abs']:.2f} away row by row")

    curves = found["curves"]
    fig, axes = figure(-(-len(curves) // 4), 4, height=1.9 * -(-len(curves) // 4) + 0.9, sharex=True, sharey=True)
    for ax, (name, points) in zip(axes.flat, curves.items()):
        x, y, low, high = ([point[key] for point in points] for key in ("log_softmax", "mean", "low", "high"))
        ax.fill_between(x, np.maximum(low, 1e-9), high, color=color(name), alpha=0.25, linewidth=0)
        ax.plot(x, y, color=color(name))
        ax.plot([-8, 0], [2.718 ** -8, 1], color=GREY, linestyle="--", linewidth=1)
        ax.set(yscale="log", ylim=(1e-4, 1.5))
        ax.set_title(name.replace(", ", ",\n"), fontsize=11.5)
    for ax in axes.flat[len(curves):]:
        ax.set_axis_off()
    fig.supxlabel("log of softmax's weight: q·k/√D up to a constant of the row", color=GREY, fontsize=12)
    fig.supylabel("weight (mean, 10–90 %)", color=GREY, fontsize=12)
    best = max((name for name in mean if name != "softmax"), key=lambda name: mean[name]["rank_correlation"])
    worst = min(mean, key=lambda name: mean[name]["rank_correlation"])
    save(fig, path.with_name(path.stem + "_monotone.png"), f"Most monotone in q·k: {best} "
         f"({mean[best]['rank_correlation']:.2f}), least: {worst} ({mean[worst]['rank_correlation']:.2f})")


def main(args):
    out = ready(args.out)
    check_least(args, blocks=1)
    teacher, data, device = teacher_and_text(args)
    T, valid = teacher.config.block_size, data["valid"]
    starts = np.linspace(0, len(valid) - T, args.blocks).astype(int)
    layers = read(teacher, torch.from_numpy(np.stack([valid[s:s + T] for s in starts]).astype(np.int64)).to(device))
    rows, curves = [], {}
    for name in tqdm(("softmax", *MAPS), unit="map", disable=None):
        options = MAPS.get(name, dict(attention="softmax"))
        model = None if name == "softmax" else student(teacher, data, args, device, **options)
        found, curves[name] = properties(model, layers)
        mean = {key: sum(row[key] for row in found) / len(found) for key in found[0]} | {"layer": "mean"}
        rows += [dict(map=name, distill_lr=rate(args, **options), **row) for row in (*found, mean)]
        tqdm.write(f"{name:28} entropy {mean['entropy']:.3f} nats, {mean['entropy_gap']:+.3f} from softmax's, "
                   f"rank correlation with q.k {mean['rank_correlation']:.3f}")
    save_json(out, dict(rows=rows, curves=curves, blocks=args.blocks, block_size=T, seed=args.seed,
                        distill_steps=args.distill_steps, **provenance(device)))
    draw_if_possible(draw, out)


def parse(argv=None):
    parser = students_parser(__doc__, "runs/maps-tiny", 1e-2, "runs/attention_properties.json")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of held-out text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli(lambda: main(parse()))
