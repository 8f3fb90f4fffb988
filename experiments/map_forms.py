"""What does the map's stable form cost? Queries and keys in either form, distilled from the same softmax model.

    python experiments/map_forms.py                                      the tiny softmax model, trained if need be

The paper's map is [exp(xW), exp(-xW)]; its stable form divides each half by its sum over the features, two softmaxes.
Attention divides by the sum of a query's weights, so a factor that both halves of a query share changes nothing; the
ratio of their two sums does, and so does any factor of a key. Here each may be divided or not. The result is the KL
divergence from softmax's weights, in nats, on held-out text, by layer.
"""

import json
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

from common import COLORS, draw_if_possible, figure, ready, save
from students import student, students_parser, teacher_and_text
from tqdm import tqdm

from convert_gpt2 import faithfulness
from train_gpt import cli, provenance, save_json

FORMS = {"exp": "hedgehog_exp", "stable": "hedgehog"}


def use(q_form, k_form):
    """A function that gives the maps of a model these forms; their weights are of the same shape in both."""
    def change(model):
        for block in model.transformer.h:
            block.attn.linear.map_q.kind, block.attn.linear.map_k.kind = FORMS[q_form], FORMS[k_form]
    return change


def draw(path):
    """KL from softmax by layer, a bar for each pair of forms."""
    rows = json.loads(path.read_text())["rows"]
    fig, [[ax]] = figure(height=3.4)
    for i, row in enumerate(rows):
        x = [layer + 0.2 * (i - 1.5) for layer in range(len(row["kl"]))]
        ax.bar(x, row["kl"], width=0.18, color=COLORS[i % len(COLORS)], label=f"q {row['q']}, k {row['k']}")
    ax.set_xticks(range(len(rows[0]["kl"])))
    ax.set(xlabel="layer", ylabel="KL from softmax (nats)")
    ax.grid(axis="x", visible=False)
    ax.legend()
    kl = {(row["q"], row["k"]): row["mean"] for row in rows}
    save(fig, path.with_suffix(".png"), f"Keys divided by their sums: KL {kl['exp', 'exp']:.2f} becomes "
         f"{kl['exp', 'stable']:.2f}; queries: {kl['stable', 'exp']:.2f}")


def main(args):
    out = ready(args.out)
    teacher, data, device = teacher_and_text(args)
    held_out, rows = SimpleNamespace(block_size=teacher.config.block_size, batch_size=8), []
    for q, k in tqdm(tuple(product(FORMS, repeat=2)), unit="pair", disable=None):
        model = student(teacher, data, args, device, change=use(q, k), attention="hedgehog", name=f"q-{q}-k-{k}")
        kl = faithfulness(model, data["valid"], held_out, device, nullcontext())["kl"]
        rows.append(dict(q=q, k=k, kl=kl, mean=sum(kl) / len(kl)))
        tqdm.write(f"q {q:6}  k {k:6}  KL {rows[-1]['mean']:.3f}, by layer " + " ".join(f"{x:.3f}" for x in kl))
    save_json(out, dict(rows=rows, distill_steps=args.distill_steps, distill_lr=args.distill_lr, seed=args.seed,
                        **provenance(device)))
    draw_if_possible(draw, out)


def parse(argv=None):
    return students_parser(__doc__, "runs/map-forms", 3e-2, "runs/map_forms.json", t2r=False).parse_args(argv)


if __name__ == "__main__":
    cli(lambda: main(parse()))
