"""Draw every figure of the README from the committed numbers: python experiments/plot.py

Reads CSV and JSON under experiments/results/ and writes a PNG beside each. What has no numbers yet is left out, and
said so. Titles state what the numbers say, and are computed from them. Each figure is a function of the script that
measures or collects its numbers; only that of benchmark.py, which draws nothing itself, is here.
"""

import argparse
import json
from pathlib import Path

import associative_recall
import attention_maps
import attention_properties
import conversion
import layers
import map_forms
import wikitext103
from common import COLORS, GREY, RESULTS, figure, plt, save


def benchmark(path):
    rows = [row for row in json.loads(path.read_text()) if row["pass"] == "forward+backward"]
    fig, [axes] = figure(columns=2, height=4.4)
    for i, form in enumerate(dict.fromkeys(row["form"] for row in rows if "," not in row["form"])):
        line = {row["T"]: row for row in rows if row["form"] == form}
        for ax, key in zip(axes, ("ms", "peak_mib")):
            ax.loglog(list(line), [row[key] / row["B"] for row in line.values()], marker="o", label=form,
                      color=GREY if form == "softmax" else COLORS[i % len(COLORS)])
    for ax, label in zip(axes, ("ms a sequence, both passes", "MiB a sequence")):
        ax.set(xlabel="tokens T", ylabel=label)
        ticks = sorted({row["T"] for row in rows})[::-2]
        ax.set_xticks(ticks, [f"{T:,}" for T in ticks])
        ax.minorticks_off()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    ms = {(row["form"], row["T"]): row["ms"] for row in rows}
    ours = "fused" if any(form == "fused" for form, _ in ms) else "chunked"
    ratio = {T: ms["softmax", T] / ms[ours, T] for form, T in ms if form == ours and ("softmax", T) in ms}
    save(fig, path.with_suffix(".png"), f"Linear attention: {ratio[max(ratio)]:.1f}x the speed of softmax "
         f"at T = {max(ratio):,}, {ratio[min(ratio)]:.2f}x at {min(ratio):,}")


FIGURES = (("tiny", wikitext103.loss_curves), ("wikitext103", wikitext103.loss_curves),
           ("wikitext103/summary.json", wikitext103.perplexities),
           ("benchmark-cpu.json", benchmark), ("benchmark-cuda.json", benchmark),
           ("associative_recall.json", associative_recall.draw),
           ("tiny/associative_recall-10000.json", associative_recall.draw),
           ("attention_properties.json", attention_properties.draw), ("attention_maps.json", attention_maps.draw),
           ("convert/summary.json", conversion.draw), ("convert/98M/summary.json", conversion.draw),
           ("convert/layers.json", layers.draw),
           ("convert/before/layers.json", layers.draw),
           ("map_forms.json", map_forms.draw))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the numbers")
    results = parser.parse_args().results
    if plt is None:
        parser.error("matplotlib is missing: pip install -r requirements-experiments.txt")
    for name, draw in FIGURES:
        there = (results / name).is_file() or any((results / name).glob("*.csv"))
        draw(results / name) if there else print(f"without {results / name}: not measured yet")
