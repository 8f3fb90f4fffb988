"""What does linear attention look at? Pictures of the same heads, and how far each map is from softmax on which text.

    python experiments/attention_maps.py                                 the tiny softmax model, trained if need be
    python experiments/attention_maps.py runs/tiny-softmax --text "The hedgehog knows one big thing."

The table is the KL divergence from softmax's weights, in nats, a layer: on the text the maps were distilled on, on text
of the same kind that they have not seen, on other text, and on contexts longer than those they were distilled on.
GPT-2's learned positions end at the teacher's block size, so for the last the maps are distilled again, on a quarter of
it, and read up to all of it: the teacher knows every position, the maps do not. For 256 to 4,096, train a teacher that
long (train_gpt.py --attention softmax --block-size 4096) and give --short 256 --contexts-only.
"""

import argparse
import json
import textwrap
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import GREY, draw_if_possible, figure, or_say, plt, ready, save
from students import rate, read, student, students_parser, teacher_and_text, weights
from tqdm import tqdm

from data.prepare import load_tokenizer
from convert_gpt2 import faithfulness
from train_gpt import cli, encode_prompt, provenance, save_json

TEXT = "The hedgehog knows one thing. The hedgehog knows it well."
MAPS = {"hedgehog before": dict(attention="hedgehog", distill_steps=0), "hedgehog after": dict(attention="hedgehog"),
        "hedgehog_exp after": dict(attention="hedgehog_exp"), "t2r after": dict(attention="t2r"),
        "elu": dict(attention="elu")}
PICTURES = ("softmax", "hedgehog before", "hedgehog after", "elu")


def pick_heads(layers, n=3):
    """The spikiest head of n layers, first to last. Softmax alone decides: a choice that favours no map."""
    some = sorted({round(i) for i in np.linspace(0, len(layers) - 1, n)})
    entropy = [torch.special.entr(weights(None, i, *layers[i])).sum(dim=-1).mean(dim=(0, 2)) for i in some]
    return [(i, e.argmin().item()) for i, e in zip(some, entropy)]


def triangle(square):
    """(T, T) weights as rows of t + 1 numbers, in thousandths: what a picture shows."""
    return [[round(w, 3) for w in row[:t + 1]] for t, row in enumerate(square.tolist())]


def kl(p, y):
    """Mean over rows of KL(p || y), for (T, T) weights."""
    past = torch.ones_like(p).tril() > 0
    return (p * (p.clamp(min=1e-37).log() - y.clamp(min=1e-37).log()))[past].sum().item() / len(p)


def pictures(models, layers):
    heads = pick_heads(layers)
    squares = {name: [weights(models.get(name), layer, *layers[layer])[0, head] for layer, head in heads]
               for name in PICTURES}
    return dict(heads=heads, maps={name: [triangle(y) for y in square] for name, square in squares.items()},
                kl_of_heads={name: list(map(kl, squares["softmax"], square)) for name, square in squares.items()})


def measure(args, name, model, texts, context, length, device):
    """A row a text: KL from softmax, one a layer, of a map that was distilled at `length`, if it was."""
    config, lr = SimpleNamespace(block_size=context, batch_size=max(1, 2048 // context)), rate(args, **MAPS[name])
    about = dict(map=name, distilled_at=length if lr else None, distill_lr=lr, seed=args.seed)
    return [about | dict(text=text, context=context,
                         kl=(found := faithfulness(model, tokens, config, device, nullcontext())["kl"]),
                         mean=sum(found) / len(found)) for text, tokens in texts.items()]


def table(rows):
    lines = [f"{'map':18}{'distilled at':>13}{'text':>14}{'context':>9}{'KL':>8}   by layer"]
    for row in rows:
        layers = " ".join(f"{x:.3f}" for x in row["kl"])
        lines.append(f"{row['map']:18}{row['distilled_at'] or '-':>13}{row['text']:>14}{row['context']:>9}"
                     f"{row['mean']:>8.3f}   {layers}")
    return "\n".join(lines)


def draw(path):
    """The pictures: a row a head, a column a map; in the grey of the future the KL of that picture alone."""
    found = json.loads(path.read_text())
    names, n = list(found["maps"]), len(found["heads"])
    fig, axes = figure(n, len(names), height=2.1 * n + 2, sharex=True, sharey=True)
    for (i, j), ax in np.ndenumerate(axes):
        rows, kl = found["maps"][names[j]][i], found["kl_of_heads"][names[j]][i]
        square = [[max(0, w) ** 0.5 for w in row] + [np.nan] * (len(rows) - len(row)) for row in rows]
        image = ax.imshow(square, cmap=plt.get_cmap("inferno").with_extremes(bad=GREY), vmin=0, vmax=1)
        if names[j] != "softmax":
            ax.text(0.95, 0.95, f"KL {kl:.2f}", transform=ax.transAxes, ha="right", va="top", color="white")
        ax.set(title=names[j] if i == 0 else "", xlabel="key" if i == n - 1 else "",
               ylabel="layer {}, head {}\nquery".format(*found["heads"][i]) if j == 0 else "")
        ax.tick_params(left=j == 0, bottom=i == n - 1)
        ax.grid(False)
    bar = fig.colorbar(image, ax=axes, location="bottom", shrink=0.7, aspect=40, label="attention weight, colours by "
                       f"its square root; grey: the future\nread: “{textwrap.shorten(found['text'], 60)}”")
    bar.set_ticks([w ** 0.5 for w in (0, 0.01, 0.1, 0.25, 0.5, 1)], labels=["0", "0.01", "0.1", "0.25", "0.5", "1"])
    held_out = [row for row in found["rows"] if row["text"] == "held out"]
    mean = {row["map"]: row["mean"] for row in held_out[::-1]}  # the first of a map, at the teacher's own length
    save(fig, path.with_suffix(".png"), "KL from softmax in nats, held-out text, all heads: " + ", ".join(
        f"{name} {mean[name]:.2f}".replace(" ", "\xa0") for name in names if name in mean))


def main(args):
    out = ready(args.out)
    if not args.text:
        raise ValueError("--text is empty: give at least one character")
    teacher, data, device = teacher_and_text(args)
    T, tokenizer = teacher.config.block_size, load_tokenizer(data["meta"]["tokenizer"])
    short = args.short or T // 4
    if not 1 <= short <= T:
        raise ValueError(f"--short {short} must be at least 1 and at most {T}, the teacher's block size")
    with or_say(f"cannot read --other {args.other}: give a text in UTF-8"):
        other = np.array(tokenizer.encode(Path(args.other).read_text(encoding="utf-8")))
    if len(other) <= T:
        raise ValueError(f"--other {args.other} holds {len(other)} tokens, a block takes {T + 1}: give a longer text")
    texts = {"training": data["train"], "held out": data["valid"], "other": other}
    maps = {} if args.contexts_only else MAPS
    models = {name: student(teacher, data, args, device, **options) for name, options in maps.items()}
    rows = [row for name, model in tqdm(models.items(), "at its own length", unit="map", disable=None)
            for row in measure(args, name, model, texts, T, T, device)]
    for name in tqdm(("hedgehog after", "hedgehog_exp after", "t2r after", "elu"), "longer", unit="map", disable=None):
        options = MAPS[name] | dict(name=f"{MAPS[name]['attention']}-{short}", distill_batch_size=max(1, 2048 // short))
        model = student(teacher, data, args, device, block_size=short, **options)
        for context in [short * 2 ** i for i in range(20) if short * 2 ** i <= T]:
            rows += measure(args, name, model, {"held out": data["valid"]}, context, short, device)
    found = dict(rows=rows, text=args.text, other=Path(args.other).name, distill_steps=args.distill_steps,
                 **provenance(device))
    if models:
        found |= pictures(models, read(teacher, encode_prompt(tokenizer, args.text)[:, :T].to(device)))
    save_json(out, found)
    print(table(rows))
    if models:
        draw_if_possible(draw, out)


def parse(argv=None):
    parser = students_parser(__doc__, "runs/maps-tiny", 1e-2, "runs/attention_maps.json")
    add = parser.add_argument
    add("--text", default=TEXT, help="what is read for the pictures")
    add("--other", default=argparse.__file__, help="a text of another kind: Python code by default")
    add("--short", type=int, default=0, help="length to distil at for longer contexts; 0: a quarter of the teacher's")
    add("--contexts-only", action="store_true", help="leave out the pictures and the table at the teacher's own length")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli(lambda: main(parse()))
