"""Draw every figure of the README from the committed numbers: python experiments/plot.py

Reads CSV and JSON under experiments/results/ and writes a PNG beside each. What has no numbers yet is left out, and
said so. Titles state what the numbers say, and are computed from them. Colours and text are mid-tones on a transparent
background, to be read on a white page and on a dark one; shown 880 pixels wide, the text is as large as the page's.
"""

import argparse
import csv
import json
import math
from pathlib import Path

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:  # the numbers are there without it
    plt = None

RESULTS = Path(__file__).resolve().parent / "results"
GREY, COLORS = "#7f8791", ("#d9822b", "#4a8fe0", "#3da35d", "#c25b9f", "#8a78d6", "#b59a2a", "#3aa6a6", "#d0605e")
STYLE = {"font.size": 12, "axes.titlesize": 12.5, "figure.dpi": 120, "savefig.transparent": True,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "grid.color": GREY,
         "legend.frameon": False, "legend.labelcolor": GREY, "lines.linewidth": 2,
         "figure.constrained_layout.use": True,
         **{key: GREY for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
                                  "ytick.color")}}


def figure(rows=1, columns=1, height=3.6, **options):
    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(8.8, height), squeeze=False, **options)


def save(fig, path, title):
    fig.suptitle(title, color=GREY, fontsize=13.5, fontweight="bold")
    fig.savefig(path, pil_kwargs=dict(optimize=True))
    plt.close(fig)
    print(f"{path}: {title}")


def color(name):
    """Orange for what learns to imitate softmax, grey for softmax, blue for what it is compared with."""
    return GREY if name.startswith("softmax") else COLORS[0] if name.startswith("hedgehog") else COLORS[1]


def bars(ax, names, values, label, form="{:.2f}"):
    drawn = ax.barh(names, values, color=[color(name) for name in names])
    ax.bar_label(drawn, [form.format(v) for v in values], padding=4, color=GREY)
    ax.invert_yaxis()
    ax.margins(x=0.16)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(label)


def draw(function, path):
    """function(path), or a word on what is missing: an experiment ends with it."""
    if plt is None:
        print(f"{path} is written, its figure is not: pip install -r requirements-experiments.txt")
    else:
        function(path)


# ---------------------------------------------------------------------------------------------------------------------
# One function a figure: its numbers -> its picture


def loss_curves(folder):
    """Validation loss of every run of train_gpt.py whose log.csv lies here, under the name of its attention."""
    curves = {path.stem: list(csv.DictReader(path.open())) for path in sorted(folder.glob("*.csv"))}
    fig, [[ax]] = figure()
    final = {}
    for name, rows in sorted(curves.items(), key=lambda item: float(item[1][-1]["valid_nats"])):
        x, y = ([float(row[key]) for row in rows if int(row["step"])] for key in ("tokens", "valid_nats"))
        style = ("-", "--", ":", "-.")[[color(other) for other in final].count(color(name)) % 4]
        final[name] = float(rows[-1]["valid_nats"])
        ax.plot([tokens / 1e6 for tokens in x], y, style, label=name, color=color(name))
    ax.set(xlabel="training tokens, millions", ylabel="validation loss (nats a token)")
    ax.legend()
    first = list(final.items())[:3]
    save(fig, folder / "loss.png", ("Final loss: " if len(first) == len(final) else "Lowest final losses: ")
         + ", ".join(f"{name} {nats:.2f}" for name, nats in first))


def softmax_beside(row, rows, plain=False):
    """The best softmax of the same text and as many tokens: with the row's own convolution, window and layers of it, or
    the plain one that the paper compares with. None without one."""
    def setting(r, options):
        window = options.get("window", 0)  # without one, layers that keep softmax are as in the plain one
        return r["data"], r["tokens"], options.get("short_conv", 0), window, window and options.get("softmax_layers", 0)
    wanted = setting(row, {} if plain else row["options"])
    same = [r for r in rows if r["attention"] == "softmax" and setting(r, r["options"]) == wanted]
    return min(same, key=lambda r: r["test_ppl"], default=None)


def perplexities(path):
    """Final perplexities on the test split, the lowest first; runs of different length or text are told apart."""
    rows = sorted(json.loads(path.read_text()), key=lambda row: row["test_ppl"])
    several = len({(row["data"], row["tokens"]) for row in rows}) > 1
    names = {row["name"]: row["name"] + (f", {row['tokens'] / 1e6:.0f}M tokens, {row['data']}" if several else "")
             for row in rows}
    fig, [[ax]] = figure(height=0.9 + 0.36 * len(rows))
    trained = "" if several else f" after {rows[0]['tokens'] / 1e6:.0f}M tokens of {rows[0]['data']}"
    bars(ax, list(names.values()), [row["test_ppl"] for row in rows], f"test perplexity{trained}")
    for bar, row in zip(ax.patches, rows):
        bar.set_color(color(row["attention"]))
    pairs = [(row, softmax_beside(row, rows, plain=True)) for row in rows if row["attention"] != "softmax"]
    ratios = [f"{row['name']} {row['test_ppl'] / softmax['test_ppl']:.3f}" for row, softmax in pairs if softmax]
    title = "Times plain softmax's perplexity: " + ", ".join(ratios[:3])
    save(fig, path.with_name("perplexity.png"), title if ratios else
         f"Lowest: {rows[0]['name']}, {rows[0]['test_ppl']:.2f}")


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


def associative_recall(path):
    rows = json.loads(path.read_text())
    names = [row["attention"] for row in rows if row["seed"] == "mean"]
    fig, [[ax]] = figure(height=1.2 + 0.45 * len(names))
    counts = []
    for key, start, offset, alpha in (("accuracy", "from scratch", -0.2, 0.5), ("converted", "from softmax", 0.2, 1)):
        percent = {(row["attention"], row["seed"]): 100 * row[key] for row in rows if key in row}
        mean = {name: value for (name, seed), value in percent.items() if seed == "mean"}
        if mean:
            at = {name: names.index(name) + offset for name in mean}
            ax.barh([*at.values()], [*mean.values()], 0.38, color=[color(name) for name in mean], alpha=alpha)
            for name, value in mean.items():
                right = max(x for (other, _), x in percent.items() if other == name)
                ax.text(right + 2, at[name], f"{value:.0f} {start}", va="center", fontsize=10)
            ax.plot(*zip(*((value, at[name]) for (name, seed), value in percent.items() if seed != "mean")), "o",
                    color=GREY, markersize=4, markerfacecolor="none")
            solved = [name for name in mean if mean[name] >= 99]
            counts.append(f"{start} by {solved[0] if len(solved) == 1 else f'{len(solved)} of {len(mean)}'}")
    ax.set_yticks(range(len(names)), names)
    ax.set_xticks(range(0, 101, 20))
    ax.invert_yaxis()
    ax.set_xlim(0, 125)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("accuracy, % (mean; dots: seeds)")
    save(fig, path.with_suffix(".png"), f"Associative recall: solved {', '.join(counts)}")


def properties(path):
    found = json.loads(path.read_text())
    mean = {row["map"]: row for row in found["rows"] if row["layer"] == "mean"}
    fig, [axes] = figure(columns=2, height=0.9 + 0.36 * len(mean), sharey=True)
    bars(axes[0], list(mean), [row["entropy"] for row in mean.values()], "entropy of a row of weights (nats)")
    axes[0].axvline(mean["softmax"]["entropy"], color=GREY, linestyle="--", linewidth=1.2)
    bars(axes[1], list(mean), [row["rank_correlation"] for row in mean.values()], "rank correlation with q·k")
    axes[0].invert_yaxis()  # a shared axis that `bars` has turned twice
    near = min((name for name in mean if name != "softmax"), key=lambda name: mean[name]["entropy_gap_abs"])
    save(fig, path.with_suffix(".png"), f"Closest to softmax, row by row: {near}, {mean[near]['entropy_gap_abs']:.2f} "
         f"nats of entropy away")

    curves = found["curves"]
    fig, axes = figure(-(-len(curves) // 4), 4, height=1.9 * -(-len(curves) // 4) + 0.9, sharex=True, sharey=True)
    for ax, (name, points) in zip(axes.flat, curves.items()):
        x, y, low, high = ([point[key] for point in points] for key in ("log_softmax", "mean", "low", "high"))
        ax.fill_between(x, low, high, color=color(name), alpha=0.25, linewidth=0)
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


def attention_maps(path):
    found = json.loads(path.read_text())
    names = list(found["maps"])
    fig, axes = figure(len(found["heads"]), len(names), height=2.15 * len(found["heads"]) + 0.6)
    for i, (layer, head) in enumerate(found["heads"]):
        for j, name in enumerate(names):
            ax, rows = axes[i, j], found["maps"][name][i]
            T = len(rows)
            square = [[max(0, w) ** 0.5 for w in row] + [float("nan")] * (T - len(row)) for row in rows]
            ax.imshow(square, cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.set_title(name, fontsize=11.5) if i == 0 else None
        axes[i, 0].set_ylabel(f"layer {layer}, head {head}")
    kl = {name: sum(found["kl_of_heads"][name]) / len(found["heads"]) for name in names if name != "softmax"}
    save(fig, path.with_suffix(".png"), "KL from softmax: " + ", ".join(f"{name} {x:.2f}" for name, x in kl.items()))


def conversion(path):
    """Left: perplexity against the finetuned teacher's, over tokens of finetuning. Right: KL from softmax, by layer."""
    rows, lines = json.loads(path.read_text()), {}
    for row in rows:
        if row["stage"] == "finetuned" and row["ratio"]:
            best = lines.setdefault((row["attention"], conversion_variant(row, rows)), {})
            best[row["tokens"]] = min(row["ratio"], best.get(row["tokens"], math.inf))
    kinds = [kind for kind in dict.fromkeys(row["attention"] for row in rows) if kind != "softmax"]
    colors = {"softmax": GREY} | dict(zip(kinds, COLORS))
    styles = dict(zip(sorted({variant for _, variant in lines}), 2 * ("o-", "s--", "^:", "D-.")))
    fig, [[left, right]] = figure(columns=2, height=4.6)
    lines = dict(sorted(lines.items(), key=lambda line: line[1][max(line[1])]))
    for (kind, variant), points in lines.items():
        x, y = zip(*sorted(points.items()))
        left.plot([tokens / 1e6 for tokens in x], y, styles[variant], label=kind + variant, color=colors[kind])
    left.set(xscale="log", xlabel="tokens of finetuning, millions", ylabel="perplexity / finetuned teacher's")
    ticks = sorted({tokens / 1e6 for points in lines.values() for tokens in points})
    left.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    left.minorticks_off()
    left.margins(x=0.15)
    left.legend()
    drawn = {}
    for row in rows:  # all layers; maps that learn are drawn distilled, and those of the longest distillation
        last = drawn.get(row["attention"], row)
        if "kl" in row and not row.get("softmax_layers") and (row["stage"] == "distilled", row["tokens"]) >= (
                last["stage"] == "distilled", last["tokens"]):
            drawn[row["attention"]] = row
    for kind, row in sorted(drawn.items(), key=lambda item: item[1]["mean_kl"]):
        stage = {"distilled": "distilled", "swapped": "as it is"}[row["stage"]]
        right.plot(range(len(row["kl"])), row["kl"], "o-", label=f"{kind}, {stage}", color=colors[kind])
    right.set(xlabel="layer", ylabel="KL from softmax (nats)")
    right.set_ylim(0, 1.3 * right.get_ylim()[1])
    right.legend()
    linear = next((line for line in lines if line[0] != "softmax"), None)
    save(fig, path.with_suffix(".png"), f"{''.join(linear)}: {lines[linear][max(lines[linear])]:.3f} x the finetuned "
         "teacher's perplexity" if linear else "The teacher alone")


def conversion_variant(row, rows):
    """What was added to an attention, or left out, whatever the rates: "", ", undistilled", ..."""
    distilled = any(r["name"] == row["name"] and r["stage"] == "distilled" for r in rows)
    learns = row["attention"] in ("hedgehog", "hedgehog_exp", "t2r")
    flags = [(row.get("short_conv"), "convolution of {}"), (row.get("softmax_layers"), "softmax in the first {}"),
             (row.get("window"), "window {}"), (learns and not distilled, "undistilled")]
    flags += [(row["options"].get(name), name.replace("_", " ")) for name in (
        "feature_bias", "tie_qk", "learn_temperature", "map_scale", "lora_rank")]
    return "".join(f", {text.format(value)}" for value, text in flags if value)


def layers(path):
    found = json.loads(path.read_text())
    rows, x = found["rows"], range(len(found["rows"]))
    fig, [[ax]] = figure(height=3.4)
    ax.bar(x, [row["alone"] for row in rows], color=COLORS[0])
    ax.axhline(found["all"], color=GREY, linestyle="--", linewidth=1.2)
    ax.text(-0.4, found["all"], "in all layers", va="bottom", color=GREY)
    ax.set_xticks(x, [row["layer"] for row in rows])
    ax.set(xlabel=f"layer with {found['attention']} instead of softmax", ylabel="rise of the loss (nats)")
    ax.grid(axis="x", visible=False)
    worst = max(rows, key=lambda row: row["alone"])
    save(fig, path.with_suffix(".png"), f"Layer {worst['layer']} alone costs {worst['alone']:.2f} nats, all layers "
         f"together {found['all']:.2f}")


def map_forms(path):
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


FIGURES = (("tiny", loss_curves), ("wikitext103", loss_curves), ("wikitext103/summary.json", perplexities),
           ("benchmark-cpu.json", benchmark), ("benchmark-cuda.json", benchmark),
           ("associative_recall.json", associative_recall), ("attention_properties.json", properties),
           ("attention_maps.json", attention_maps), ("convert/summary.json", conversion),
           ("convert/layers.json", layers), ("map_forms.json", map_forms))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the numbers")
    results = parser.parse_args().results
    if plt is None:
        parser.error("matplotlib is missing: pip install -r requirements-experiments.txt")
    for name, draw in FIGURES:
        there = (results / name).is_file() or any((results / name).glob("*.csv"))
        draw(results / name) if there else print(f"without {results / name}: not measured yet")
