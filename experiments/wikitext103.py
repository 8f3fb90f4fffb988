"""Trained from scratch, how close does each attention come to softmax? Finished runs of train_gpt.py into one table.

    python experiments/wikitext103.py runs/wikitext103-fast-*

Each run becomes a row of experiments/results/wikitext103/summary.json, under its folder's name without the preset (a
row of that name is replaced, if it is of the same text and length), and its log.csv the curve beside it; then the
figures are drawn and the table printed. A row names the text that it was trained on, and whatever it does otherwise
than its preset does.
"""

import argparse
import csv
import json
import re
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

from common import COLORS, RESULTS, bars, color, copy_curves, draw_if_possible, figure, read_rows, save

from train_gpt import MAY_CHANGE_ON_RESUME, PRESETS, TrainConfig, cli, save_json

# Test perplexity after 100 epochs of WikiText-103. Of Hedgehog's two forms, the paper does not say which this one is.
PAPER = {"softmax": 18.6, "hedgehog": 20.8, "hedgehog_exp": 20.8, "elu": 25.6, "performer": 26.8}

LINES = ("-", "--", ":", "-.", (0, (8, 2, 1, 2, 1, 2)))


def departures(config, usual, left_out):
    """{flag: value} of a run's config (a dict) where it is not as in `usual`, its preset's dataclass."""
    usual = asdict(usual)
    return {key: value for key, value in config.items() if value != usual[key] and key not in left_out}


def number(value, form):
    return "-" if value is None else format(value, form)


def row(run, commit=None):
    about, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    if "test_ppl" not in summary:
        raise ValueError(f"{run} was trained on a text without a test split, by which the table is made: prepare the "
                         "text with one (data/prepare.py --test FILE), and train again")
    config, preset = about["config"], about["config"]["preset"]
    options = departures(config, TrainConfig(**PRESETS[preset]), MAY_CHANGE_ON_RESUME | {"attention", "seed"})
    name = run.resolve().name.removeprefix(preset + "-")
    if commit and summary["commit"] == "unknown":  # no git where it ran
        summary["commit"] = commit
    return dict(name=name, preset=preset, data=Path(config["data"]).name, options=options, **summary)


def softmax_beside(row, rows, plain=False):
    """The best softmax of the same text and as many tokens: with the row's own convolution, window and layers of it, or
    the plain one that the paper compares with. None without one."""
    def setting(r, options):
        window = options.get("window", 0)  # without one, layers that keep softmax are as in the plain one
        return r["data"], r["tokens"], options.get("short_conv", 0), window, window and options.get("softmax_layers", 0)
    wanted = setting(row, {} if plain else row["options"])
    same = [r for r in rows if r["attention"] == "softmax" and setting(r, r["options"]) == wanted]
    return min(same, key=lambda r: r["test_ppl"], default=None)


def ratio(row, rows, plain=False):
    """Its test perplexity over that of the softmax it is compared with, see `softmax_beside`; None without one."""
    softmax = softmax_beside(row, rows, plain)
    return row["test_ppl"] / softmax["test_ppl"] if softmax else None


def table(rows):
    """Markdown: ours beside the paper's, a dash where nothing is known."""
    lines = ["| attention | otherwise than the preset | trained on | tokens, M | hours | valid ppl | test ppl "
             "| x softmax | x softmax with the same options | test ppl a word | tokens/s | MFU | GiB "
             "| the paper's test ppl |", "|---" * 14 + "|"]
    for r in rows:
        options = ", ".join(f"{key} {value}" for key, value in r["options"].items()) or "-"
        numbers = ((r["tokens"] / 1e6, ".0f"), (r["train_seconds"] / 3600, ".2f"), (r["valid_ppl"], ".2f"),
                   (r["test_ppl"], ".2f"), (ratio(r, rows, plain=True), ".3f"),
                   (ratio(r, rows), ".3f"), (r["test_ppl_per_word"], ".1f"),
                   (r["tokens_per_second"], ",.0f"), (r["mfu"], ".2f"), (r["peak_gib"], ".1f"),
                   (PAPER.get(r["attention"]) if not r["options"].keys() - {"steps"} else None, ".1f"))
        lines.append("| " + " | ".join([r["attention"], options, r["data"], *(number(*n) for n in numbers)]) + " |")
    return "\n".join(lines)


def loss_curves(folder):
    """Validation loss of every run of train_gpt.py whose log.csv lies here; of equal rows of the table, the best."""
    rows = sorted(read_rows(folder / "summary.json"), key=lambda row: row["test_ppl"])
    best = {repr([row[key] for key in ("attention", "options", "data", "tokens")]): row["name"] for row in rows[::-1]}
    again = {row["name"] for row in rows} - set(best.values())
    curves = {path.stem: list(csv.DictReader(path.open())) for path in folder.glob("*.csv") if path.stem not in again}
    lengths, final = {}, {}  # a panel each, in the order of the ends
    for name, rows in sorted(curves.items(), key=lambda item: float(item[1][-1]["valid_nats"])):
        lengths.setdefault(round(int(rows[-1]["tokens"]), -6), {})[name] = rows
        final[name] = float(rows[-1]["valid_nats"])
    heights = [max(2.6 if len(lengths) > 1 else 3.6, 0.6 + 0.27 * len(panel)) for panel in lengths.values()]
    fig, axes = figure(len(lengths), height=sum(heights), height_ratios=heights)
    for ax, panel in zip(axes[:, 0], lengths.values()):
        styles, others = {}, cycle(COLORS[1:7])
        for name, rows in panel.items():
            hue = COLORS[7] if re.match("hedgehog(?!_exp)", name) else color(name)        # the stable form is red
            hue = next(others) if hue == COLORS[1] else hue
            styles[hue] = styles.get(hue, -1) + 1                                         # of one colour, by the line
            x, y = ([float(row[key]) for row in rows if int(row["step"])] for key in ("tokens", "valid_nats"))
            ax.plot([tokens / 1e6 for tokens in x], y, label=name, color=hue, ls=LINES[styles[hue] % len(LINES)])
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        ax.set(xlabel="training tokens, millions", ylabel="validation loss (nats)")
    first = list(final.items())[:3]
    save(fig, folder / "loss.png", ("Final loss: " if len(first) == len(final) else "Lowest final losses: ")
         + ", ".join(f"{name} {nats:.2f}" for name, nats in first))


def perplexities(path):
    """Final perplexities on the test split, the lowest first; runs of different length or text are told apart."""
    rows = sorted(json.loads(path.read_text()), key=lambda row: row["test_ppl"])
    data, lengths = ({row[key] for row in rows} for key in ("data", "tokens"))

    def label(row):
        length = f"{row['tokens'] / 1e6:.0f}M"
        of = [f"{length} tokens"] * (len(lengths) > 1 and not row["name"].endswith(length))
        return ", ".join([row["name"], *of, *[row["data"]] * (len(data) > 1)])
    fig, [[ax]] = figure(height=0.9 + 0.36 * len(rows))
    trained = f" after {rows[0]['tokens'] / 1e6:.0f}M tokens" * (len(lengths) == 1)
    trained += f", trained on {rows[0]['data']}" * (len(data) == 1)
    bars(ax, [label(row) for row in rows], [row["test_ppl"] for row in rows], f"test perplexity{trained}",
         colors=[color(row["attention"]) for row in rows])
    linear = [(ratio(row, rows, plain=True), row["name"]) for row in rows if row["attention"] != "softmax"
              and not row["options"].keys() & {"softmax_layers", "hybrid_window", "short_conv"}]  # the map alone
    ratios = [f"{name} {x:.3f}" for x, name in sorted(pair for pair in linear if pair[0])]
    save(fig, path.with_name("perplexity.png"), "x softmax: " + ", ".join(ratios[:3]) if ratios else
         f"Lowest: {rows[0]['name']}, {rows[0]['test_ppl']:.2f}")


def need_summaries(parser, folders, what):
    for folder in folders:
        if not (folder / "summary.json").exists():
            parser.error(f"{folder} is no {what}: summary.json is missing there")


def main(runs, out, commit=None):
    path, curves = out / "summary.json", {}
    rows = {r["name"]: r for r in read_rows(path)}
    for run in runs:
        new = row(run, commit)
        old = rows.get(new["name"], new)
        if (old["data"], old["tokens"]) != (new["data"], new["tokens"]):
            raise ValueError(f"{path} has a row {old['name']!r} of {old['tokens']:,} tokens of {old['data']}, {run} is "
                             f"of {new['tokens']:,} of {new['data']}: rename that folder, or choose another --out")
        rows[new["name"]] = new
        curves[new["name"]] = run / "log.csv"
    rows = sorted(rows.values(), key=lambda r: (r["data"], r["tokens"], r["test_ppl"]))
    copy_curves(curves, out)
    save_json(path, rows)
    draw_if_possible(loss_curves, out)
    draw_if_possible(perplexities, path)
    print(table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=RESULTS / "wikitext103", help="folder of the results")
    parser.add_argument("--commit", help="of the runs that were made where there was no git")
    args = parser.parse_args()
    need_summaries(parser, args.runs, "finished run of train_gpt.py")
    cli(lambda: main(**vars(args)))
