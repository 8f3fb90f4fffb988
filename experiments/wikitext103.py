"""Trained from scratch, how close does each attention come to softmax? Finished runs of train_gpt.py into one table.

    python experiments/wikitext103.py runs/wikitext103-fast-*

Each run becomes a row of experiments/results/wikitext103/summary.json, under its folder's name without the preset (a
row of that name is replaced), and its log.csv the curve beside it; then the figures are drawn and the table printed.
A row names the text that it was trained on, and whatever it does otherwise than its preset does.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]  # neither is an installed package
import plot  # noqa: E402
from train_gpt import MAY_CHANGE_ON_RESUME, PRESETS, TrainConfig, save_json  # noqa: E402

PAPER = {"softmax": 18.6, "hedgehog": 20.8, "elu": 25.6, "performer": 26.8}  # 100 epochs of WikiText-103, test


def departures(config, usual, left_out):
    """{flag: value} of a run's config (a dict) where it is not as in `usual`, its preset's dataclass."""
    usual = asdict(usual)
    return {key: value for key, value in config.items() if value != usual[key] and key not in left_out}


def number(value, form):
    return "-" if value is None else format(value, form)


def row(run, commit=None):
    about, summary = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    config, preset = about["config"], about["config"]["preset"]
    options = departures(config, TrainConfig(**PRESETS[preset]), MAY_CHANGE_ON_RESUME | {"attention", "seed"})
    name = run.resolve().name.removeprefix(preset + "-")
    if commit and summary["commit"] == "unknown":  # no git where it ran
        summary["commit"] = commit
    return dict(name=name, preset=preset, data=Path(config["data"]).name, options=options, **summary)


def ratio(row, rows, plain=False):
    """Its test perplexity over that of the softmax it is compared with, see `plot.softmax_beside`; None without one."""
    softmax = plot.softmax_beside(row, rows, plain)
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
                   (PAPER.get(r["attention"]) if not r["options"] else None, ".1f"))
        lines.append("| " + " | ".join([r["attention"], options, r["data"], *(number(*n) for n in numbers)]) + " |")
    return "\n".join(lines)


def main(runs, out, commit=None):
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    rows = {r["name"]: r for r in (json.loads(path.read_text()) if path.exists() else [])}
    for run in runs:
        rows |= {(new := row(run, commit))["name"]: new}
        shutil.copy(run / "log.csv", out / f"{new['name']}.csv")
    rows = sorted(rows.values(), key=lambda r: (r["data"], r["tokens"], r["test_ppl"]))
    save_json(path, rows)
    plot.draw(plot.loss_curves, out)
    plot.draw(plot.perplexities, path)
    print(table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=plot.RESULTS / "wikitext103", help="folder of the results")
    parser.add_argument("--commit", help="of the runs that were made where there was no git")
    main(**vars(parser.parse_args()))
