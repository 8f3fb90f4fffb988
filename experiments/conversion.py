"""A trained softmax GPT, converted: how much of it is left? Results of convert_gpt2.py into one table.

    python experiments/conversion.py runs/convert-wikitext103-fast

The rows of each folder's summary.json are added to experiments/results/convert/summary.json (rows of the same name are
replaced), each with the flags by which it departs from its preset; the curves of both stages go beside them, then the
figures are drawn and the table printed. --out names another folder: sweep/ holds the distillations that chose their
rate, before/ an earlier table and the finetunings that chose theirs, 98M/ longer finetunings from another teacher,
98M-controls/ a bare window and T2R from a third, 393M/ the longest, and two more of 98M, from a fourth.
"""

import argparse
import json
from pathlib import Path

from common import COLORS, GREY, RESULTS, bars, copy_curves, draw_if_possible, figure, read_rows, save
from wikitext103 import departures, need_summaries, number

from convert_gpt2 import MAY_CHANGE, PRESETS, ConvertConfig, mean_of_layers, ratio
from hedgehog import LEARNED_MAPS
from train_gpt import cli, save_json

SAID_ELSEWHERE = MAY_CHANGE | {"teacher", "attention", "seed"}


def options(folder, name):
    """What a conversion does otherwise than its preset. Maps of an earlier one are told by its name."""
    config = json.loads((folder / name / "config.json").read_text())["config"]
    found = departures(config, ConvertConfig(**PRESETS[config["preset"]]), SAID_ELSEWHERE)
    return found | ({"maps": Path(found["maps"]).parent.parent.name} if "maps" in found else {})


def conversions(rows):
    """{name: {stage: row}}, the finetuned teachers first. Of a run trained further, the conversion's own row."""
    found = {}
    for row in sorted(rows, key=lambda row: (row["attention"] != "softmax", row["tokens"])):
        found.setdefault(row["name"], {}).setdefault(row["stage"], row)
    return found


def table(rows):
    """Markdown, a line a conversion, a dash where nothing is known."""
    def cell(stage, key, form, scale=1):
        value = stages.get(stage, {}).get(key)
        return number(None if value is None else value / scale, form)

    lines = ["| | otherwise than the preset | swapped in | distilled, M tokens | ppl | KL | GiB | finetuned, M tokens "
             "| valid ppl | test ppl | ratio | minutes | GiB |", "|---" * 13 + "|"]
    for name, stages in conversions(rows).items():
        some = next(iter(stages.values()))
        if "teacher" in stages:
            ppl = [cell("teacher", key, ".2f") for key in ("valid_ppl", "test_ppl")]
            lines.append("| teacher | - | - | - | - | - | - | 0 | " + " | ".join(ppl) + " | - | - | - |")
            continue
        cells = [name, ", ".join(f"{key} {value}" for key, value in some["options"].items()) or "-",
                 cell("swapped", "test_ppl", ".1f"), cell("distilled", "tokens", ".1f", 1e6),
                 cell("distilled", "test_ppl", ".2f"), cell("distilled", "mean_kl", ".3f"),
                 cell("distilled", "peak_gib", ".1f"), cell("finetuned", "tokens", ".1f", 1e6),
                 cell("finetuned", "valid_ppl", ".2f"), cell("finetuned", "test_ppl", ".2f"),
                 cell("finetuned", "ratio", ".3f"), cell("finetuned", "seconds", ".1f", 60),
                 cell("finetuned", "peak_gib", ".1f")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variant_of(row, rows):
    """What was added to an attention, or left out, whatever the rates: "", ", undistilled", ..."""
    distilled = any(r["name"] == row["name"] and r["stage"] == "distilled" for r in rows)
    learns = row["attention"] in LEARNED_MAPS or row.get("hybrid_window")  # which has gates
    flags = [(row.get("short_conv"), "convolution of {}"), (row.get("softmax_layers"), "softmax in the first {}"),
             (row.get("window"), "window {}"), (row.get("hybrid_window"), "hybrid window {}"),
             (learns and not distilled, "undistilled")]
    flags += [(row["options"].get(name), name.replace("_", " ")) for name in (
        "feature_bias", "tie_qk", "learn_temperature", "map_scale", "lora_rank")]
    return "".join(f", {text.format(value)}" for value, text in flags if value)


def draw(path):
    """Above: perplexity over the finetuned teacher's, at the best rate. Below: KL from softmax's weights, by layer."""
    rows, best, drawn = json.loads(path.read_text()), {}, {}
    finetuned = [row for row in rows if row["stage"] == "finetuned" and row["ratio"]]
    lengths = {row["tokens"] for row in finetuned}
    for row in sorted(finetuned, key=lambda row: row["ratio"]):
        after = f", {row['tokens'] / 1e6:.0f}M tokens" if len(lengths) > 1 else ""
        best.setdefault(row["attention"] + variant_of(row, rows) + after, row)
    kinds = [kind for kind in dict.fromkeys(row["attention"] for row in rows) if kind != "softmax"]
    colors = {"softmax": GREY} | dict(zip(kinds, COLORS))
    fig, [[above], [below]] = figure(rows=2, height=3.9 + 0.36 * len(best))
    fig.get_layout_engine().set(hspace=0.08)
    bars(above, list(best), [row["ratio"] for row in best.values()], "test perplexity / the finetuned teacher's",
         form="{:.3f}", colors=[colors[row["attention"]] for row in best.values()])
    for row in rows:  # without softmax anywhere; maps that learn are drawn after the longest distillation
        last, softmax = drawn.get(row["attention"], row), row.get("softmax_layers") or row.get("hybrid_window")
        if "kl" in row and not softmax and (row["stage"] == "distilled", row["tokens"]) >= (
                last["stage"] == "distilled", last["tokens"]):
            drawn[row["attention"]] = row
    for kind, row in sorted(drawn.items(), key=lambda item: item[1]["mean_kl"]):
        stage = {"distilled": "distilled", "swapped": "as it is"}[row["stage"]]
        below.plot(range(len(row["kl"])), row["kl"], "o-", label=f"{kind}, {stage}", color=colors[kind])
    below.set(xlabel="layer", ylabel="KL from softmax (nats)")
    below.set_xticks(range(max((len(row["kl"]) for row in drawn.values()), default=1)))
    if drawn:
        below.legend(loc="upper right", bbox_to_anchor=(-0.12, 1.05))
    plain = [row for row in best.values() if row["attention"] != "softmax" and not variant_of(row, rows)]
    save(fig, path.with_suffix(".png"), "Times the finetuned softmax: " + ", ".join(
        f"{row['attention']} {row['ratio']:.3f}" for row in plain[:3]) if plain else "The teacher alone")


def main(folders, out):
    path, new, curves = out / "summary.json", [], {}
    for folder in folders:
        for row in read_rows(folder / "summary.json"):
            if any((r["name"], r["stage"], r["tokens"]) == (row["name"], row["stage"], row["tokens"]) for r in new):
                if row["stage"] == "teacher":                                             # each folder has it
                    continue
                raise ValueError(f"{folder} and a folder before it both hold {row['name']}: give one of them a --name")
            extra = dict(options=options(folder, row["name"])) if row["stage"] != "teacher" else {}
            if "kl" in row:
                extra["mean_kl"] = mean_of_layers(row["kl"], row.get("softmax_layers", 0))
            new.append(row | extra)
            for stage, ending in (("distilled", "-distilled"), ("finetuned", "")):
                if row["stage"] == stage and row["tokens"]:
                    curves[row["name"] + ending] = folder / row["name"] / stage / "log.csv"
    replaced = {row["name"] for row in new}
    rows = [row for row in read_rows(path) if row["name"] not in replaced] + new
    rows = [row | dict(ratio=ratio(row, rows)) for row in rows]
    copy_curves(curves, out)
    save_json(path, rows)
    if any(row["stage"] == "finetuned" for row in rows):
        draw_if_possible(draw, path)
    print(table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="--out of finished conversions")
    parser.add_argument("--out", type=Path, default=RESULTS / "convert", help="folder of the results")
    args = parser.parse_args()
    need_summaries(parser, args.folders, "--out of convert_gpt2.py")
    cli(lambda: main(**vars(args)))
