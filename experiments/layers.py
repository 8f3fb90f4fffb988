"""Which layer needs softmax? A distilled model with linear attention in one layer alone, and in all layers but one.

    python experiments/layers.py runs/convert-tiny/hedgehog                a conversion of convert_gpt2.py

Nothing is trained: all layers share the teacher's weights, and each attends either by softmax or by its distilled maps.
`alone` is by how much the validation loss rises with linear attention in that layer, `but` with it in all the others.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from common import COLORS, GREY, draw_if_possible, figure, ready, save
from tqdm import tqdm

from convert_gpt2 import ConvertConfig, find_text, load_teacher, stage_config, swap
from train_gpt import cli, evaluate, pick_device, provenance, save_json


def attend_linearly(model, layers, linear):
    """Linear attention, `linear` [one module a layer], in some layers of the model, softmax in the others."""
    for i, block in enumerate(model.transformer.h):
        block.attn.linear = linear[i] if i in layers else None


def draw(path):
    """What each layer costs alone, and a line for all of them together."""
    found = json.loads(path.read_text())
    rows, x = found["rows"], range(len(found["rows"]))
    fig, [[ax]] = figure(height=3.4)
    ax.bar(x, [row["alone"] for row in rows], color=COLORS[0])
    ax.axhline(found["all"], color=GREY, linestyle="--", linewidth=1.2)
    ax.text(len(rows) - 0.6, found["all"], "in all layers", ha="right", va="top", color=GREY)
    ax.set_xticks(x, [row["layer"] for row in rows])
    ax.set(xlabel=f"layer with {found['attention']} instead of softmax", ylabel="rise of the loss (nats)")
    ax.grid(axis="x", visible=False)
    worst = max(rows, key=lambda row: row["alone"])
    save(fig, path.with_suffix(".png"), f"Layer {worst['layer']} alone costs {worst['alone']:.2f} nats, all layers "
         f"together {found['all']:.2f}")


def main(args):
    out, maps = ready(args.out), args.conversion / "distilled" / "last.pt"
    if not maps.exists():  # a run of train_gpt.py has a config.json, too
        raise ValueError(f"no conversion in {args.conversion}, or none with distilled maps: make one with python "
                         "convert_gpt2.py, or mend the path")
    if args.tokens < 0 or args.tokens == 1:
        raise ValueError(f"--tokens must be 0, for all, or at least 2, got {args.tokens}")
    config = ConvertConfig(**json.loads((args.conversion / "config.json").read_text())["config"] | dict(
        maps=str(maps), device=args.device))
    if config.softmax_layers:
        raise ValueError(f"{args.conversion} keeps softmax in its first layers: give a conversion of all layers")
    device, dtype, _ = pick_device(config.device, config.dtype)
    teacher, tokenizer = load_teacher(config)
    model = swap(teacher, config).to(device).eval()
    text = find_text(stage_config(config, model, "finetuned"), model, tokenizer)["valid"][:args.tokens or None]
    linear, n = [block.attn.linear for block in model.transformer.h], model.config.n_layer
    autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()

    def nats(layers):
        attend_linearly(model, layers, linear)
        return evaluate(model, text, model.config.block_size, config.batch_size, device, autocast)

    softmax, rows = nats(()), []
    for i in tqdm(range(n), unit="layer", disable=None):
        rows.append(dict(layer=i, alone=nats({i}) - softmax, but=nats(set(range(n)) - {i}) - softmax))
        tqdm.write(f"layer {i}: linear alone {rows[-1]['alone']:+.4f} nats, all but it {rows[-1]['but']:+.4f}")
    found = dict(softmax=softmax, all=nats(range(n)) - softmax, rows=rows, attention=config.attention, tokens=len(text),
                 **provenance(device))
    print(f"softmax {softmax:.4f} nats; {config.attention} in all layers {found['all']:+.4f}")
    save_json(out, found)
    draw_if_possible(draw, out)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("conversion", type=Path, help="folder of a conversion: it holds config.json and distilled/")
    add("--tokens", type=int, default=0, help="of the validation text; 0: all")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    add("--out", default="runs/layers.json", help="the rows; the figure goes beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli(lambda: main(parse()))
