"""Every experiment at toy size, and the measures they report against counts by hand."""

import csv
import json
import lzma
import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import associative_recall
import attention_maps
import attention_properties
import common
import conversion
import layers
import map_forms
import plot
import recall_task
import students
import wikitext103
import convert_gpt2
import train_gpt
from conftest import stop_after
from hedgehog import ATTENTIONS, GPT, GPTConfig
from train_gpt import PRESETS, TrainConfig, parse_config, train

needs_matplotlib = pytest.mark.skipif(common.plt is None, reason="matplotlib draws the figures: "
                                      "pip install -r requirements-experiments.txt")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small softmax model, barely trained, and the folder of its text."""
    from data.prepare import main as prepare
    folder = tmp_path_factory.mktemp("teacher")
    text = folder / "text.txt"
    text.write_text("".join(f"The hedgehog counts {i} apples, and the fox counts {i * i % 97}.\n" for i in range(90)))
    assert prepare([str(text), "--out", str(folder / "data")]) == 0
    flags = ("--attention softmax --n-layer 2 --n-head 2 --n-embd 16 --block-size 32 --batch-size 4 --steps 4 "
             f"--warmup 1 --device cpu --data {folder / 'data'} --out {folder / 'run'}")
    train(parse_config(TrainConfig, PRESETS, flags.split()))
    return folder


@pytest.fixture(scope="module")
def attentive(teacher):
    """The flags that read a softmax model which attends to something, after 80 steps."""
    flags = ("--attention softmax --n-layer 3 --n-head 2 --n-embd 16 --block-size 32 --batch-size 4 --steps 80 "
             f"--lr 1e-2 --warmup 5 --eval-every 80 --sample-tokens 1 --device cpu --data {teacher / 'data'}")
    train(parse_config(TrainConfig, PRESETS, [*flags.split(), "--out", str(teacher / "attentive")]))
    return [str(teacher / "attentive"), "--data", str(teacher / "data"), "--device", "cpu", "--distill-steps", "3"]


# ---------------------------------------------------------------- associative recall


def test_taylor_by_weights_is_taylor_by_features():
    torch.manual_seed(0)
    model = GPT(GPTConfig(21, 11, 2, 2, 16, tie_head=False, attention="taylor", chunk_size=8)).double()
    x, found = torch.randint(11, (3, 21)), []
    for change in (lambda model: model, recall_task.by_weights):
        logits = change(model)(x)[0]
        replaced = [block.attn.linear.forward is recall_task.taylor for block in model.transformer.h]
        assert all(replaced) if found else not any(replaced)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        found.append([logits, *gradients])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * a.abs().max().item() + 1e-15)


def test_the_asked_key_has_occurred_and_the_answer_is_its_value():
    x, y = recall_task.make_rows(200, 16, 10, torch.Generator().manual_seed(0))
    maps = set()
    for row, answer in zip(x.tolist(), y.tolist()):
        pairs = list(zip(row[:-2:2], row[1:-2:2]))
        value_of = dict(pairs)
        assert row[-2] == 10 and value_of[row[-1]] == answer
        assert all(value_of[k] == v for k, v in pairs)                      # a key has one value in a row
        assert all(k < 5 <= v < 10 for k, v in pairs)
        maps.add(tuple(sorted(value_of.items())))
    assert len(maps) > 150                                                  # and another one in another row
    assert any(len(set(row[:-2:2])) < 7 for row in x.tolist())              # pairs repeat


def recall(flags, path):
    associative_recall.main(parse_config(associative_recall.RecallConfig, argv=[*flags, "--device", "cpu", "--out",
                                                                               str(path)]))
    return {(row["attention"], row["seed"]): row for row in json.loads(path.read_text())}


EASY = ("--length 6 --vocabulary 8 --steps 800 --lr 5e-3 --n-embd 32 --test-rows 500 --seeds 1 --distill-steps 100 "
        "--finetune-steps 10").split()


def test_recall_is_learned_where_it_is_easy_and_what_softmax_has_learned_is_converted(tmp_path):
    rows = recall([*EASY, "--attention", "hedgehog"], tmp_path / "rows.json")
    assert rows.keys() == {("hedgehog", 0), ("hedgehog", "mean")}                         # its teacher has no row
    row = rows["hedgehog", 0]
    assert row["accuracy"] > 0.9 and row["distilled"] > 0.95 and row["converted"] > 0.95
    assert row["guess"] < 0.8 and row["swapped"] < 0.9 and 0 < row["kl"] < 0.1
    assert {"command", "commit", "device", "torch", "length", "lr"} <= row.keys()


SMALL = "--length 6 --vocabulary 6 --steps 2 --test-rows 50 --n-embd 16 --distill-steps 2 --finetune-steps 2".split()


def test_first_the_maps_learn_and_then_everything(tmp_path, monkeypatch):
    train, changed = recall_task.train, []

    def spy(model, *args):
        before = {name: p.clone() for name, p in model.named_parameters()}
        loss = train(model, *args)
        changed.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return loss
    monkeypatch.setattr(recall_task, "train", spy)
    recall([*SMALL, "--seeds", "1", "--attention", "hedgehog"], tmp_path / "rows.json")
    softmax, scratch, distilled, finetuned = changed
    assert all(".map_" in name for name in distilled) and len(distilled) == 4             # two maps a layer
    assert scratch == finetuned == softmax | distilled and "transformer.wte.weight" in softmax


def test_every_attention_takes_part_in_two_processes_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    path, ran = tmp_path / "rows.json", []
    rows = recall([*SMALL, "--seeds", "2", "--workers", "2"], path)
    assert rows.keys() == {(name, seed) for name in associative_recall.VARIANTS for seed in (0, 1, "mean")}
    for name in associative_recall.VARIANTS:
        for key in ("accuracy", "converted") if name != "softmax" else ("accuracy",):
            a, b, mean = (rows[name, seed][key] for seed in (0, 1, "mean"))
            assert mean == pytest.approx((a + b) / 2) and 0 <= a <= 1
    run = associative_recall.run
    monkeypatch.setattr(associative_recall, "run", lambda job, config: ran.append(job[:2]) or run(job, config))
    path.write_text(json.dumps([row for key, row in rows.items() if key != ("elu", 1)]))
    assert recall([*SMALL, "--seeds", "2"], path).keys() == rows.keys()
    assert ran == [("softmax", 1), ("elu", 1)]                                            # elu's teacher, and elu
    assert not common.plt or path.with_suffix(".png").stat().st_size > 10_000


def test_rows_of_other_settings_are_refused_and_kept(tmp_path, capsys):
    flags, path = [*SMALL, "--seeds", "1", "--attention", "elu"], tmp_path / "rows.json"
    recall(flags, path)
    before = path.read_text()
    for other in (["--lr", "0.1", "--steps", "3"], ["--attention", "relu", "--lr", "0.1", "--steps", "3"]):
        with pytest.raises(ValueError, match="rows.json holds rows made with --steps 2, --lr 0.001: give the same "
                                             "--steps, --lr, or choose another --out"):
            recall([*flags, *other], path)
    assert path.read_text() == before
    capsys.readouterr()
    recall([*flags, "--workers", "3"], path)                                              # of the machine, no setting
    assert f"every row is in {path} already" in capsys.readouterr().out and path.read_text() == before
    recall([*flags, "--attention", "relu"], path)
    assert "already" not in capsys.readouterr().out


EXPERIMENTS = {associative_recall: lambda argv: parse_config(associative_recall.RecallConfig, argv=argv),
               layers: lambda argv: layers.parse(["nowhere", *argv]),
               **{module: module.parse for module in (attention_maps, attention_properties, map_forms)}}


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda module: module.__name__)
def test_the_committed_rows_are_neither_gone_on_from_nor_written_over(module):
    out = Path(EXPERIMENTS[module]([]).out)
    assert out.parts[0] == "runs" and not (ROOT / out).is_relative_to(common.RESULTS)


@pytest.mark.parametrize("module", EXPERIMENTS, ids=lambda module: module.__name__)
def test_an_out_that_cannot_be_written_is_told_before_the_work(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for work in {"run", "teacher_and_text", "load_teacher"} & vars(module).keys():
        monkeypatch.setattr(module, work, lambda *args, **kwargs: pytest.fail("the work has begun"))
    Path("README.md").write_text("mine")
    for out, sentence in (("README.md/rows.json", "cannot write --out README.md/rows.json: choose another"),
                          ("README.md", "must end in .json"), (".", "must end in .json")):
        with pytest.raises(ValueError, match=sentence):
            module.main(EXPERIMENTS[module](["--out", out]))
    assert Path("README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_an_error_in_another_process_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="n_embd=63 must be divisible by n_head=2"):      # and does not wait for ever
        recall([*SMALL, "--seeds", "2", "--workers", "2", "--n-embd", "63", "--n-head", "2"], tmp_path / "rows.json")


def test_an_odd_length_is_refused():
    with pytest.raises(ValueError, match="--length and --vocabulary must be even"):
        associative_recall.RecallConfig(length=7)
    with pytest.raises(ValueError, match="must be at least 1"):
        associative_recall.RecallConfig(seeds=0)


# ---------------------------------------------------------------- from scratch


def test_the_whole_path_prepare_train_resume_evaluate_sample_collect(tmp_path, monkeypatch, capsys):
    from data.prepare import main as prepare
    from sample import sample
    lines = [f"The hedgehog counts {i} apples , and the fox counts {i * i % 97} .\n" for i in range(120)]
    files = [tmp_path / name for name in ("train.txt.xz", "valid.txt", "test.txt")]
    files[0].write_bytes(lzma.compress("".join(lines[:90]).encode()))
    files[1].write_text("".join(lines[90:105]))
    files[2].write_text("".join(lines[105:]))
    assert prepare([str(files[0]), "--valid", str(files[1]), "--test", str(files[2]), "--out",
                    str(tmp_path / "text")]) == 0
    flags = ("--preset wikitext103-fast --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-size 8 --steps 30 "
             "--eval-every 10 --warmup 3 --lr 1e-2 --no-compile --device cpu --sample-tokens 2 "
             f"--data {tmp_path / 'text'} --out {tmp_path}/wikitext103-fast-").split()
    for attention in ("softmax", "hedgehog"):
        run = [*flags[:-1], flags[-1] + attention]
        with monkeypatch.context() as m:
            m.setattr(train_gpt, "interrupts", lambda say: stop_after(14))
            with pytest.raises(SystemExit):
                train(parse_config(TrainConfig, PRESETS, [*run, "--attention", attention]))
        summary = train(parse_config(TrainConfig, PRESETS, ["--resume", *run[-2:]]))
        log = list(csv.DictReader((Path(run[-1]) / "log.csv").open()))
        assert [row["step"] for row in log] == ["0", "10", "20", "30"]
        assert float(log[-1]["valid_nats"]) < float(log[0]["valid_nats"]) - 1
        assert summary["test_nats"] == pytest.approx(float(log[-1]["valid_nats"]), abs=0.3)  # unseen, but alike
        assert len(sample(run[-1], "The ", 20, device="cpu", write=lambda piece: None)) >= 24 - 3
    out = tmp_path / "results"
    wikitext103.main([tmp_path / "wikitext103-fast-softmax", tmp_path / "wikitext103-fast-hedgehog"], out)
    wikitext103.main([tmp_path / "wikitext103-fast-hedgehog"], out)  # again: replaced, not doubled
    rows = {row["name"]: row for row in json.loads((out / "summary.json").read_text())}
    assert rows.keys() == {"softmax", "hedgehog"}
    assert {"attention", "tokens", "valid_ppl", "test_ppl", "tokens_per_second", "peak_gib", "device", "command",
            "commit", "data", "seed"} <= rows["hedgehog"].keys()
    assert rows["hedgehog"]["resumed"] == 1 and rows["hedgehog"]["options"]["n_layer"] == 2
    curve = list(csv.DictReader((out / "hedgehog.csv").open()))
    assert {"command", "commit", "torch", "device"} <= curve[0].keys() and len(curve) == 4
    assert f"{rows['hedgehog']['test_ppl'] / rows['softmax']['test_ppl']:.3f}" in capsys.readouterr().out
    longer = shutil.copytree(tmp_path / "wikitext103-fast-hedgehog", tmp_path / "longer" / "wikitext103-fast-hedgehog")
    summary = json.loads((longer / "summary.json").read_text())
    (longer / "summary.json").write_text(json.dumps(summary | dict(tokens=600 * 10 ** 6)))
    with pytest.raises(ValueError, match="has a row 'hedgehog' of .* is of 600,000,000 of .*: rename that folder"):
        wikitext103.main([longer], out)
    if common.plt:
        assert {"loss.png", "perplexity.png"} <= {path.name for path in out.iterdir()}
        # Of two equal runs the worse is in the table, and not in the figure.
        path = shutil.copytree(tmp_path / "wikitext103-fast-softmax", tmp_path / "wikitext103-fast-again")
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | dict(test_ppl=summary["test_ppl"] + 1)))
        monkeypatch.setattr(wikitext103, "save", lambda fig, *_: drawn.append(fig.axes[0].get_legend()))
        drawn = []
        wikitext103.main([path], out)
        assert {text.get_text() for text in drawn[0].get_texts()} == {"softmax", "hedgehog"}
        assert "again" in [row["name"] for row in json.loads((out / "summary.json").read_text())]


def test_a_run_without_a_test_split_is_refused_before_any_curve_is_copied(teacher, attentive, tmp_path):
    whole = shutil.copytree(attentive[0], tmp_path / "whole")
    summary = json.loads((whole / "summary.json").read_text())
    (whole / "summary.json").write_text(json.dumps(summary | dict(test_ppl=9.0)))
    with pytest.raises(ValueError, match="attentive was trained on a text without a test split.*--test FILE"):
        wikitext103.main([whole, Path(attentive[0])], tmp_path / "refused")
    (whole / "log.csv").unlink()
    with pytest.raises(ValueError, match="missing: .*/whole/log.csv: finish"):
        wikitext103.main([whole], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_ratio_is_to_the_best_softmax_of_the_same_text_tokens_and_options_that_help_it_too():
    def row(attention, ppl, data="a", tokens=1, **options):
        return dict(attention=attention, test_ppl=ppl, data=data, tokens=tokens, options=options)
    rows = [row("softmax", 10.0), row("softmax", 9.0, lr=1), row("softmax", 5.0, short_conv=4),
            row("softmax", 4.0, "b"), row("softmax", 3.0, tokens=2), row("softmax", 2.0, softmax_layers=1, window=8)]
    assert wikitext103.ratio(row("hedgehog", 18.0, map_scale=2), rows) == 2
    assert wikitext103.ratio(row("hedgehog", 15.0, short_conv=4), rows) == 3
    assert wikitext103.ratio(row("hedgehog", 15.0, short_conv=3), rows) is None
    windowed = row("hedgehog", 3.0, softmax_layers=1, window=8)
    assert wikitext103.ratio(windowed, rows) == 1.5 and wikitext103.ratio(windowed, rows, plain=True) == 3 / 9
    assert wikitext103.ratio(row("hedgehog", 3.0, softmax_layers=2, window=8), rows) is None
    assert wikitext103.ratio(row("hedgehog", 18.0, softmax_layers=2), rows) == 2  # whole layers: as in plain softmax


# ---------------------------------------------------------------- conversions


@pytest.fixture(scope="module")
def converted(teacher, attentive):
    """Results of convert_gpt2.py on that teacher: itself and Hedgehog finetuned for two lengths, Hedgehog undistilled
    and with softmax in its first layer, 1 + ELU."""
    out, softmax = teacher / "converted", attentive[0]
    flags = (f"--preset wikitext103-fast --no-compile --device cpu --sample-tokens 1 --no-reference --batch-size 4 "
             f"--distill-batch-size 2 --teacher {softmax} --data {teacher / 'data'} --out {out}")
    maps = f"--maps {out}/hedgehog/distilled/last.pt --distill-steps 0"
    for more in ("--attention softmax --steps 2", "--attention softmax --steps 3 --name softmax-long",
                 "--steps 2 --distill-steps 3 --distill-lr 0.1", f"--steps 3 --name hedgehog-long {maps}",
                 "--steps 2 --distill-steps 0", "--attention elu --steps 2",
                 f"--softmax-layers 1 --window 8 --steps 2 {maps}"):
        argv = [*flags.split(), *more.split()]
        convert_gpt2.convert(parse_config(convert_gpt2.ConvertConfig, convert_gpt2.PRESETS, argv))
    return out


def test_conversions_are_collected_with_ratios_curves_and_a_table(converted, tmp_path, capsys):
    out = tmp_path / "results"
    conversion.main([converted], out)
    conversion.main([converted], out)  # again: replaced, not doubled
    rows = json.loads((out / "summary.json").read_text())
    found = {(row["name"], row["stage"]): row for row in rows}
    assert len(found) == len(rows) and sum(stage == "finetuned" for _, stage in found) == 7
    for name, beside in (("hedgehog", "softmax"), ("hedgehog-long", "softmax-long"), ("elu", "softmax")):
        ppl = [found[name, "finetuned"]["valid_ppl"] for name in (name, beside)]
        assert found[name, "finetuned"]["ratio"] == pytest.approx(ppl[0] / ppl[1], rel=1e-12)
    assert found["hedgehog", "distilled"]["options"] == dict(
        distill_steps=3, distill_batch_size=2, distill_lr=0.1, steps=2, batch_size=4)
    assert found["hedgehog-long", "finetuned"]["options"]["maps"] == "hedgehog"
    assert found["hedgehog", "distilled"]["mean_kl"] < found["hedgehog", "swapped"]["mean_kl"]
    first = found["hedgehog-first1x8", "distilled"]
    assert first["kl"][0] == 0 and first["mean_kl"] == pytest.approx(sum(first["kl"][1:]) / 2)
    assert {path.name for path in out.glob("*.csv")} == {f"{name}.csv" for name in (
        "softmax", "softmax-long", "hedgehog", "hedgehog-distilled", "hedgehog-long", "hedgehog-undistilled",
        "hedgehog-first1x8", "elu")}
    lines = capsys.readouterr().out.splitlines()
    cells = next(line for line in lines if line.startswith("| hedgehog |")).split(" | ")
    row = [found["hedgehog", stage] for stage in ("swapped", "distilled", "finetuned")]
    assert [cells[2], cells[4], cells[5], cells[8], cells[10]] == [
        "-", "-", f"{row[1]['mean_kl']:.3f}", f"{row[2]['valid_ppl']:.2f}", f"{row[2]['ratio']:.3f}"]  # no test split
    variants = {(row["attention"], conversion.variant_of(row, rows)) for row in rows if row["stage"] == "finetuned"}
    assert variants == {("softmax", ""), ("hedgehog", ""), ("hedgehog", ", undistilled"), ("elu", ""),
                        ("hedgehog", ", softmax in the first 1, window 8")}
    other = tmp_path / "other"
    (other / "fast").mkdir(parents=True)
    (other / "fast" / "config.json").write_text((converted / "elu" / "config.json").read_text())
    teacher_row = found["teacher", "teacher"] | dict(command="another")
    (other / "summary.json").write_text(json.dumps([teacher_row, found["elu", "swapped"] | dict(name="fast")]))
    conversion.main([converted, other], out)
    again = json.loads((out / "summary.json").read_text())
    assert len(again) == len(rows) + 1                                                    # one teacher, one more row
    conversion.main([other], out)
    assert len(json.loads((out / "summary.json").read_text())) == len(again)              # what was there is kept
    (other / "summary.json").write_text(json.dumps([found["elu", "swapped"]]))
    with pytest.raises(ValueError, match="both hold elu: give one of them a --name"):
        conversion.main([converted, other], tmp_path / "refused")
    (other / "summary.json").write_text(json.dumps([found["elu", "finetuned"] | dict(name="fast")]))
    with pytest.raises(ValueError, match="missing: .*/fast/finetuned/log.csv: finish the conversion"):
        conversion.main([converted, other], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@needs_matplotlib
def test_a_conversion_is_drawn_at_its_best_rate_and_its_longest_distillation(tmp_path, monkeypatch):
    seen = {}

    def look(fig, path, title):
        above, below = fig.axes
        seen.update(title=title, lines={line.get_label(): list(line.get_ydata()) for line in below.lines}, bars=dict(
            zip([label.get_text() for label in above.get_yticklabels()], [bar.get_width() for bar in above.patches])))
    monkeypatch.setattr(conversion, "save", look)

    def row(attention, stage, tokens, **values):
        return dict(name=f"{attention}{values}", attention=attention, stage=stage, tokens=tokens, options={}) | values
    rows = [row("hedgehog", "finetuned", 5, ratio=2.0), row("hedgehog", "finetuned", 5, ratio=1.5),
            row("hedgehog", "finetuned", 9_000_000, ratio=1.2), row("softmax", "finetuned", 5, ratio=1.0),
            row("hedgehog", "swapped", 0, kl=[9.0], mean_kl=9.0)]
    rows += [row("hedgehog", "distilled", tokens, kl=[kl], mean_kl=kl) for tokens, kl in ((3, 3.0), (7, 2.0), (2, 4.0))]
    for r in rows[:3]:
        rows.append(r | dict(stage="distilled", tokens=0))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    conversion.draw(tmp_path / "rows.json")
    assert seen == dict(
        title="Times the finetuned softmax: hedgehog 1.200, hedgehog 1.500", lines={"hedgehog, distilled": [2.0]},
        bars={"softmax, 0M tokens": 1.0, "hedgehog, 9M tokens": 1.2, "hedgehog, 0M tokens": 1.5})
    (tmp_path / "rows.json").write_text(json.dumps(rows[3:4]))
    conversion.draw(tmp_path / "rows.json")
    assert seen == dict(title="The teacher alone", lines={}, bars={"softmax": 1.0})


def test_layers_are_swapped_one_by_one(converted, tmp_path):
    def measure(*flags):
        layers.main(layers.parse([str(converted / "hedgehog"), "--device", "cpu", "--out", str(tmp_path / "l.json"),
                                  *flags]))
        return json.loads((tmp_path / "l.json").read_text())
    found, results = measure(), {(row["name"], row["stage"]): row
                                 for row in json.loads((converted / "summary.json").read_text())}
    assert found["softmax"] == pytest.approx(results["teacher", "teacher"]["valid_nats"], abs=1e-6)
    assert found["softmax"] + found["all"] == pytest.approx(results["hedgehog", "distilled"]["valid_nats"], abs=1e-6)
    config = convert_gpt2.ConvertConfig(**json.loads((converted / "hedgehog" / "config.json").read_text())["config"])
    for row in found["rows"]:
        assert abs(row["alone"] - row["but"]) > 1e-3                                         # not each other
        model = convert_gpt2.swap(convert_gpt2.load_teacher(config)[0], config).eval()
        convert_gpt2.load_maps(model, converted / "hedgehog" / "distilled" / "last.pt")
        for i, block in enumerate(model.transformer.h):
            block.attn.linear = block.attn.linear if i == row["layer"] else None
        tokens = train_gpt.load_data(config.data, 32)["valid"]
        alone = train_gpt.evaluate(model, tokens, 32, 4, torch.device("cpu"))
        assert alone - found["softmax"] == pytest.approx(row["alone"], abs=1e-6)
    assert measure("--tokens", "100")["tokens"] == 100
    with pytest.raises(ValueError, match="no conversion in .*python convert_gpt2.py"):
        layers.main(layers.parse([str(tmp_path)]))
    with pytest.raises(ValueError, match="keeps softmax in its first layers"):
        layers.main(layers.parse([str(converted / "hedgehog-first1x8"), "--device", "cpu"]))


def test_either_form_of_the_map_for_queries_and_for_keys(attentive, tmp_path):
    out = ["--seed", "1", "--out", str(tmp_path / "forms.json")]
    map_forms.main(map_forms.parse([*attentive, "--maps", str(tmp_path / "maps"), *out]))
    forms = json.loads((tmp_path / "forms.json").read_text())
    assert (forms["seed"], forms["distill_lr"], forms["distill_steps"]) == (1, 3e-2, 3)
    found = {(row["q"], row["k"]): row for row in forms["rows"]}
    assert set(found) == {(q, k) for q in ("exp", "stable") for k in ("exp", "stable")}
    assert len({round(row["mean"], 6) for row in found.values()}) == 4
    config = map_forms.parse([*attentive, "--maps", str(tmp_path / "whole"), "--seed", "1"])
    teacher, text, device = students.teacher_and_text(config)
    for form, kind in (("exp", "hedgehog_exp"), ("stable", "hedgehog")):                  # both alike: the map itself
        model = students.student(teacher, text, config, device, attention=kind)
        kl = convert_gpt2.faithfulness(model, text["valid"], SimpleNamespace(block_size=32, batch_size=8), device,
                                       nullcontext())["kl"]
        assert found[form, form]["kl"] == pytest.approx(kl, abs=1e-6)
    map_forms.use("stable", "exp")(model)
    for block in model.transformer.h:
        assert (block.attn.linear.map_q.kind, block.attn.linear.map_k.kind) == ("hedgehog", "hedgehog_exp")
    if common.plt:
        assert (tmp_path / "forms.png").exists()


def test_flags_that_cannot_be_are_told_in_a_sentence(attentive, converted, tmp_path):
    maps, conversion = [*attentive, "--maps", str(tmp_path / "maps")], [str(converted / "hedgehog"), "--device", "cpu"]
    (latin := tmp_path / "latin.txt").write_bytes("Ein Igel weiß vieles. ".encode("latin-1") * 9)
    (short := tmp_path / "short.txt").write_text("x" * 32)
    for module, flags, sentence in (
            (attention_maps, [*maps, "--short", "33"], "--short 33 must be at least 1 and at most 32, the teacher's"),
            (attention_maps, [*maps, "--short", "-1"], "--short -1 must be at least 1"),
            (attention_maps, [*maps, "--text", ""], "--text is empty"),
            (attention_maps, [*maps, "--other", str(tmp_path / "gone")], "cannot read --other .*gone: give a text in"),
            (attention_maps, [*maps, "--other", str(latin)], "cannot read --other .*latin.txt: give a text in UTF-8"),
            (attention_maps, [*maps, "--other", str(short)], "short.txt holds 32 tokens, a block takes 33: give a"),
            (attention_properties, [*maps, "--blocks", "0"], "--blocks must be at least 1, got 0"),
            (layers, [*conversion, "--tokens", "-5"], "--tokens must be 0, for all, or at least 2, got -5"),
            (layers, [*conversion, "--tokens", "1"], "--tokens must be 0"),
            (layers, attentive[:1], "no conversion in .*attentive, or none with distilled maps: make one")):
        with pytest.raises(ValueError, match=sentence):
            module.main(module.parse([*flags, "--out", str(tmp_path / "rows.json")]))
    assert not list(tmp_path.glob("maps/*/"))                                             # nothing was distilled first


# ---------------------------------------------------------------- properties and pictures


def test_entropy_and_rank_correlation_are_what_they_are_called():
    assert attention_properties.entropy(torch.tensor([0.5, 0.5, 0.0])).item() == pytest.approx(math.log(2))
    x = torch.tensor([0.1, 0.7, 0.3, 0.2])
    correlation = attention_properties.rank_correlation
    assert correlation(x, x.exp()).item() == pytest.approx(1)
    assert correlation(x, -x ** 3).item() == pytest.approx(-1)
    assert correlation(x, torch.ones(4)).item() == 0
    # Ranks 1 4 3 2 and 2 3 4 1: 1 - 6 (1 + 1 + 1 + 1) / (4 * 15), by Spearman's formula.
    assert correlation(x, torch.tensor([0.2, 0.3, 0.9, 0.1])).item() == pytest.approx(1 - 24 / 60)
    assert attention_properties.ranks(torch.tensor([5.0, 1.0, 5.0])).tolist() == [2.0, 0.5, 2.0]


def test_softmax_has_its_own_entropy_and_is_monotone_in_q_k():
    torch.manual_seed(0)
    layers = [torch.randn(2, 1, 2, 16, 4).unbind()]
    rows, _ = attention_properties.properties(None, layers)
    assert rows[0]["entropy_gap"] == 0 and rows[0]["rank_correlation"] == pytest.approx(1, abs=1e-6)


def test_a_maps_entropy_gap_and_curve_are_its_own(monkeypatch):
    def weights(model, layer, q, k):
        return students.weights(None, layer, torch.zeros_like(q) if model == "uniform" else q, k)
    monkeypatch.setattr(attention_properties, "weights", weights)
    q, k = torch.zeros(2, 1, 2, 16, 4).unbind()
    q[..., 0], k[:, :, 0, 0] = 4.0, 4.0                                                   # q.k / sqrt(D) is 8, or 0
    rows, curve = attention_properties.properties("uniform", [(q, k)])
    p = [1 / (1 + t * math.exp(-8)) for t in range(16)]                                   # softmax, of the first token
    gaps = [math.log(t + 1) + p[t] * math.log(p[t]) + (1 - p[t]) * math.log((1 - p[t]) / t) for t in range(1, 16)]
    assert rows[0]["entropy"] == pytest.approx(sum(math.log(t + 1) for t in range(1, 16)) / 15)
    assert [rows[0][key] for key in ("entropy_gap", "entropy_gap_abs")] == pytest.approx([sum(gaps) / 15] * 2)
    assert rows[0]["rank_correlation"] == 0
    assert [(point["log_softmax"], point["n"]) for point in curve] == [(-0.25, 2 * 12)]   # two heads, a dozen queries
    assert curve[0]["mean"] == pytest.approx(sum(1 / (t + 1) for t in range(4, 16)) / 12)
    monkeypatch.setattr(attention_properties, "weights", lambda model, *args: weights(
        None if model == "uniform" else "uniform", *args))
    assert attention_properties.properties("uniform", [(q, k)])[0][0]["entropy_gap"] == pytest.approx(-sum(gaps) / 15)


def test_kl_is_zero_against_itself_and_a_picture_holds_the_past_alone():
    p = torch.rand(5, 5).tril()
    p /= p.sum(-1, keepdim=True)
    uniform = torch.ones(5, 5).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    assert attention_maps.kl(p, p) == 0 and attention_maps.kl(p, uniform) > 0
    assert [len(row) for row in attention_maps.triangle(p)] == [1, 2, 3, 4, 5]


def test_the_spikiest_heads_of_the_first_middle_and_last_layer_are_shown():
    q = torch.zeros(5, 1, 3, 8, 4)                                                        # five layers of three heads
    for layer, spiky in enumerate((2, 0, 1, 0, 0)):
        q[layer, :, spiky, :, 0] = 9.0
    k = torch.eye(8)[:, :4].expand(1, 3, 8, 4)
    assert attention_maps.pick_heads([(q[layer], k) for layer in range(5)]) == [(0, 2), (2, 1), (4, 0)]


def test_properties_of_every_map_are_measured(attentive, tmp_path, capsys):
    out = tmp_path / "properties.json"
    flags = [*attentive, "--maps", str(tmp_path / "maps"), "--blocks", "1", "--out", str(out)]
    attention_properties.main(attention_properties.parse(flags))
    found = json.loads(out.read_text())
    names = {row["map"] for row in found["rows"]}
    assert names == {"softmax", *attention_properties.MAPS} == set(found["curves"])
    mean = {row["map"]: row for row in found["rows"] if row["layer"] == "mean"}
    for key in ("entropy", "rank_correlation"):                                           # each map's own
        values = [round(row[key], 7) for name, row in mean.items() if name != "t2r, not distilled"]  # that is relu
        assert len(set(values)) == len(values) == 13
    assert mean["softmax"]["entropy_gap"] == 0 != mean["elu"]["entropy_gap"]
    rates = {name: row["distill_lr"] for name, row in mean.items() if row["distill_lr"]}
    assert rates == {"hedgehog, distilled": 1e-2, "hedgehog_exp, distilled": 1e-2, "t2r, distilled": 1e-3}
    if common.plt:
        assert {path.name for path in tmp_path.glob("*.png")} == {"properties.png", "properties_monotone.png"}
    before = out.read_text()
    attention_properties.main(attention_properties.parse(flags))  # the distilled maps are read again, not made again
    again = json.loads(before)["rows"], json.loads(out.read_text())["rows"]
    assert again[0] == again[1]
    with pytest.raises(ValueError, match="were distilled with --distill-lr 0.01: choose"):
        attention_properties.main(attention_properties.parse([*flags, "--distill-lr", "0.5"]))
    with pytest.raises(ValueError, match="t2r/distilled were distilled with --distill-lr-t2r 0.001: choose another"):
        attention_properties.main(attention_properties.parse([*flags, "--distill-lr-t2r", "0.5"]))


def test_attention_maps_are_measured_and_drawn(attentive, tmp_path, capsys, monkeypatch):
    out, compiled = tmp_path / "attention_maps.json", []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)  # a stand-in: the true one takes a minute
    flags = [*attentive, "--maps", str(tmp_path / "maps"), "--seed", "3", "--text", "the fox", "--short", "8",
             "--compile", "--distill-lr", "0.2"]
    attention_maps.main(attention_maps.parse([*flags, "--out", str(out)]))
    found = json.loads(out.read_text())
    assert {row["text"] for row in found["rows"]} == {"training", "held out", "other"}
    assert {row["context"] for row in found["rows"] if row["distilled_at"] == 8} == {8, 16, 32}
    assert all(row["mean"] > -1e-6 and row["seed"] == 3 for row in found["rows"])
    assert {row["map"] for row in found["rows"] if row["distilled_at"] == 8} == {
        "hedgehog after", "hedgehog_exp after", "t2r after"}
    assert {(row["map"], row["distill_lr"]) for row in found["rows"]} == {
        ("hedgehog before", None), ("hedgehog after", 0.2), ("hedgehog_exp after", 0.2), ("t2r after", 1e-3),
        ("elu", None)}
    assert len(compiled) == 6 and set(compiled) == {convert_gpt2.imitation_loss}          # of six distillations
    for name, lr in (("t2r-8", 1e-3), ("hedgehog-8", 0.2)):
        config = train_gpt.load_checkpoint(tmp_path / "maps" / name / "distilled" / "last.pt")["config"]
        assert (config["lr"], config["seed"], config["block_size"]) == (lr, 3, 8)
    assert "distilled at" in capsys.readouterr().out
    assert [layer for layer, head in found["heads"]] == [0, 1, 2] and len(found["maps"]["elu"][0]) == len("the fox")
    pictures = [json.dumps(found["maps"][name]) for name in attention_maps.PICTURES]
    assert len(set(pictures)) == len(pictures) == 4
    assert found["kl_of_heads"]["softmax"] == [0, 0, 0] and min(found["kl_of_heads"]["elu"]) > 0
    assert min(found["kl_of_heads"]["hedgehog before"]) > 0
    bars, tqdm = [], attention_maps.tqdm
    monkeypatch.setattr(attention_maps, "tqdm", lambda maps, *x, **o: bars.append(len(maps)) or tqdm(maps, *x, **o))
    attention_maps.main(attention_maps.parse([*flags, "--contexts-only", "--out", str(tmp_path / "some.json")]))
    assert bars == [0, 4]                                                                 # also when maps are kept
    some = json.loads((tmp_path / "some.json").read_text())
    assert "maps" not in some and some["rows"] == found["rows"][-len(some["rows"]):] and len(some["rows"]) == 12
    if common.plt:
        assert [path.name for path in tmp_path.glob("*.png")] == ["attention_maps.png"]


def given(teacher, tmp_path, steps):
    return attention_properties.parse([str(teacher / "run"), "--data", str(teacher / "data"), "--maps", str(tmp_path),
                                       "--distill-steps", str(steps), "--device", "cpu"])


def test_without_data_a_teachers_own_text_is_read(teacher, tmp_path, monkeypatch):
    flags = ["--maps", str(tmp_path / "maps"), "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher / "run", tmp_path / "runs" / "tiny-softmax")
    found = []
    for run in ([str(teacher / "run")], [str(teacher / "run" / "last.pt")], []):
        found.append(students.teacher_and_text(attention_properties.parse([*run, *flags]))[1]["meta"])
    assert found == [json.loads((teacher / "data" / "meta.json").read_text())] * 3
    gone = train_gpt.load_checkpoint(teacher / "run" / "best.pt")
    gone["config"]["data"] = "gone"
    torch.save(gone, "gone.pt")
    with pytest.raises(ValueError, match="gone.pt learned the text in gone, which is not there: name one with --data"):
        students.teacher_and_text(attention_properties.parse(["gone.pt", *flags]))
    given = ["gone.pt", "--data", str(teacher / "data"), *flags]
    assert students.teacher_and_text(attention_properties.parse(given))[1]["meta"] == found[0]


def test_what_is_measured_is_what_the_teachers_attention_used(teacher, tmp_path):
    model, _, _ = students.teacher_and_text(given(teacher, tmp_path, 0))
    idx, attention, seen = torch.randint(100, (1, 32)), model.transformer.h[1].attn, []
    attention.register_forward_hook(lambda module, args, y: seen.extend((args[0], y)))
    model(idx)
    v = attention.split_heads(seen[0])[2]
    q, k = students.read(model, idx)[1]
    torch.testing.assert_close(attention.merge_heads(students.weights(None, 1, q, k) @ v), seen[1])


def test_half_distilled_maps_are_finished_and_those_of_another_recipe_refused(teacher, tmp_path, monkeypatch):
    def maps(steps):
        model, data, device = students.teacher_and_text(config := given(teacher, tmp_path, steps))
        student = students.student(model, data, config, device, attention="t2r", name="kept")
        return student.state_dict()["transformer.h.0.attn.linear.map_q.weight"]

    real, calls = students.distill, []
    monkeypatch.setattr(students, "distill", lambda *args: (calls.append(args[2]), real(*args)))
    whole = maps(3)
    assert not torch.equal(whole, torch.eye(8).expand(2, 8, 8)) and torch.equal(maps(3), whole)
    assert [stage.resume for stage in calls] == [False, True]
    path = tmp_path / "kept" / "distilled" / "last.pt"
    saved = torch.load(path, weights_only=True)
    saved["state"]["step"] = 2  # as if it had been stopped there: one more step is due
    torch.save(saved, path)
    assert not torch.equal(maps(3), whole)
    with pytest.raises(ValueError, match="were distilled with --distill-steps 3: choose"):
        maps(5)
    find = students.load_teacher

    def another(config):
        model, tokenizer = find(config)
        return model.requires_grad_(False).apply(lambda m: m.weight.add_(1) if m is model.lm_head else None), tokenizer
    monkeypatch.setattr(students, "load_teacher", another)
    with pytest.raises(ValueError, match="distilled from another model or on another text: choose another --maps"):
        maps(3)


def test_a_stopped_distillation_says_how_to_go_on(teacher, tmp_path, monkeypatch, capsys):
    model, data, device = students.teacher_and_text(config := given(teacher, tmp_path, 3))
    monkeypatch.setattr(convert_gpt2, "interrupts", lambda say: stop_after(2))
    with pytest.raises(SystemExit):
        students.student(model, data, config, device, attention="hedgehog")
    assert "stopped after step 2, saved: give the same command again to go on" in capsys.readouterr().out


@needs_matplotlib
def test_titles_say_what_the_numbers_say(tmp_path, monkeypatch):
    titles = []
    for module in (associative_recall, attention_properties, plot):
        monkeypatch.setattr(module, "save", lambda fig, path, title: (titles.append(title), common.plt.close(fig)))
    for accuracy in (1.0, 0.5):
        rows = [dict(attention="hedgehog", seed=seed, accuracy=0.2, converted=accuracy) for seed in (0, "mean")]
        rows += [dict(attention="softmax", seed=seed, accuracy=1.0) for seed in (0, "mean")]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        associative_recall.draw(tmp_path / "rows.json")
    assert titles == [f"Associative recall by hedgehog: 20 % from scratch, {percent} % converted from softmax"
                      for percent in (100, 50)]
    rows = [{"form": form, "T": T, "pass": "forward+backward", "ms": ms * T, "peak_mib": 1.0, "B": 1}
            for T in (512, 1024) for form, ms in (("softmax", T), ("fused", 256), ("chunked", 512))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    plot.benchmark(tmp_path / "rows.json")
    assert "4.0x" in titles[-1] and "2.00x at 512" in titles[-1]                          # of the fused form
    rows = [dict(map=name, layer="mean", entropy=2.0, entropy_gap=gap, entropy_gap_abs=away, rank_correlation=rho)
            for name, gap, away, rho in (("softmax", 0.0, 0.0, 1.0), ("t2r", 0.01, 0.5, 0.7), ("elu", -0.1, 0.2, 0.6))]
    (tmp_path / "rows.json").write_text(json.dumps(dict(rows=rows, curves={row["map"]: [] for row in rows})))
    attention_properties.draw(tmp_path / "rows.json")
    assert titles[-2:] == ["Entropy closest to softmax's: elu, -0.10 nats on average, 0.20 away row by row",
                           "Most monotone in q·k: t2r (0.70), least: elu (0.60)"]


@needs_matplotlib
def test_pictures_of_attention_say_what_is_measured_and_tell_no_weight_from_the_future(tmp_path, monkeypatch):
    names = ("softmax", "hedgehog after")
    rows = [{"map": names[1], "text": text, "mean": mean} for text, mean in (("training", 9), ("held out", 0.2),
                                                                             ("held out", 7))]  # the last elsewhere
    (tmp_path / "rows.json").write_text(json.dumps(dict(
        rows=rows, text="a b", heads=[[2, 1]], maps={name: [[[1.0], [0.0, 1.0]]] for name in names},
        kl_of_heads=dict(zip(names, ([0.0], [0.07]))))))
    monkeypatch.setattr(attention_maps, "save", lambda fig, path, title: seen.append((fig, title.replace("\xa0", " "))))
    seen = []
    attention_maps.draw(tmp_path / "rows.json")
    (fig, title), = seen
    assert title == "KL from softmax in nats, held-out text, all heads: hedgehog after 0.20"
    softmax, after, bar = fig.axes
    assert [ax.get_xlabel() for ax in (softmax, after)] == ["key"] * 2 and "query" in softmax.get_ylabel()
    assert [text.get_text() for text in after.texts] == ["KL 0.07"] and "layer 2, head 1" in softmax.get_ylabel()
    assert "square root" in bar.get_xlabel() and "future" in bar.get_xlabel() and "“a b”" in bar.get_xlabel()
    image = after.images[0]
    future, zero = (image.cmap(image.norm(image.get_array()))[i] for i in ((0, 1), (1, 0)))
    assert all(0.3 < x < 0.7 for x in future[:3]) and all(x < 0.1 for x in zero[:3]) and future[3] == zero[3] == 1
    common.plt.close(fig)


@needs_matplotlib
def test_no_number_beside_a_bar_lies_on_a_line(tmp_path):
    fig, [[ax]] = common.figure()
    common.bars(ax, ["a", "b"], [-0.19, 2.46], "x")
    fig.canvas.draw()
    right = ax.get_window_extent().x1
    assert [text.get_text() for text in ax.texts] == ["-0.19", "2.46"]
    assert all(right < text.get_window_extent().x0 < text.get_window_extent().x1 <= fig.bbox.x1 for text in ax.texts)
    common.plt.close(fig)


@needs_matplotlib
def test_every_attention_there_is_gets_a_line_of_its_own(tmp_path, monkeypatch):
    for i, name in enumerate(ATTENTIONS):
        (tmp_path / f"{name}.csv").write_text(f"step,tokens,valid_nats\n0,0,9\n1,1000000,{5 + i / 10}\n")
    monkeypatch.setattr(wikitext103, "save", lambda fig, *_: drawn.extend(fig.axes[0].lines))
    drawn = []
    wikitext103.loss_curves(tmp_path)
    assert [line.get_label() for line in drawn] == list(ATTENTIONS)
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == len(ATTENTIONS)


def digest_in(path):
    from PIL import Image  # which matplotlib needs, too
    return Image.open(path).text.get("Digest")


@needs_matplotlib
def test_another_number_or_word_is_another_digest_and_another_place_is_not(tmp_path):
    def drawn(number=0.5, word="a", height=3.6):
        fig, [axes] = common.figure(columns=3, height=height)
        common.bars(axes[0], ["a"], [number if "bar" in word else 1], "x", form="")
        axes[1].plot([0, 1], [0, number if "line" in word else 1], label=word)
        axes[2].imshow([[number if "image" in word else 1, float("nan")]])
        common.save(fig, tmp_path / "a.png", "title")
        return digest_in(tmp_path / "a.png")
    assert drawn() == drawn(height=4) != drawn(word="b")
    for word in ("bar", "line", "image"):
        assert drawn(0.5, word) != drawn(0.50001, word)


@needs_matplotlib
def test_a_title_breaks_between_words_into_lines_of_one_length(tmp_path, monkeypatch):
    monkeypatch.setattr(common.plt.Figure, "savefig", lambda fig, *_, **options: lines.extend(
        fig.texts[-1].get_text().split("\n")))
    for title in ("Lowest final losses: softmax 3.50, hedgehog_exp-first2x64 3.59, hedgehog-first2x64 3.59",
                  "x softmax: hedgehog_exp-first2x64 1.095, hedgehog-first2x64 1.098, hedgehog_exp-bias 1.203"):
        lines = []
        common.save(common.figure()[0], tmp_path / "a.png", title)
        assert len(lines) == 2 and " ".join(lines) == title and min(map(len, lines)) > 30


def test_colors_tell_softmax_and_what_imitates_it_from_the_others():
    names = ("softmax", "softmax-earlier", "hedgehog", "hedgehog_exp, distilled", "elu", "t2r")
    assert [common.color(name) for name in names] == [common.GREY] * 2 + [common.COLORS[0]] * 2 + [common.COLORS[1]] * 2


@needs_matplotlib
def test_every_figure_is_drawn_from_the_committed_numbers_in_letters_as_large_as_the_pages(tmp_path, monkeypatch):
    savefig, sizes = common.plt.Figure.savefig, {}

    def spy(fig, path, **options):
        savefig(fig, path, **options)
        sizes.update({(path.name, text.get_text()): text.get_fontsize() * fig.get_dpi() / 72 * 880 / fig.bbox.width
                      for text in fig.findobj(common.matplotlib.text.Text) if text.get_text()})
    monkeypatch.setattr(common.plt.Figure, "savefig", spy)
    shutil.copytree(ROOT / "experiments" / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    for name, draw in plot.FIGURES:
        path = tmp_path / "results" / name
        if path.is_file() or any(path.glob("*.csv")):
            draw(path)
    drawn, committed = ({path.relative_to(folder) for path in folder.rglob("*.png")}
                        for folder in (tmp_path / "results", ROOT / "experiments" / "results"))
    assert drawn == committed
    stale = {path for path in drawn if digest_in(tmp_path / "results" / path)
             != digest_in(ROOT / "experiments" / "results" / path)}
    assert stale == set(), "python experiments/plot.py draws them again"
    assert {what: size for what, size in sizes.items() if size < 15.9} == {}              # GitHub's are 16 pixels high
    assert all(path.stat().st_size < 400_000 for path in (tmp_path / "results").rglob("*.png"))


def test_rows_are_refused_for_settings_of_their_own_table_alone(tmp_path):
    path = tmp_path / "rows.json"
    assert common.rows_so_far(path, dict(lr=1)) == []
    rows = [dict(task="cola", lr=1, layers=[1, 2]), dict(task="mrpc", lr=2, layers=[1, 2])]
    path.write_text(json.dumps(rows))
    assert common.rows_so_far(path, dict(lr=1, layers=(1, 2)), lambda row: row["task"] == "cola") == rows
    with pytest.raises(ValueError, match="rows.json holds rows made with --lr 2: give the same --lr, or choose"):
        common.rows_so_far(path, dict(lr=1, layers=(1, 2)))
    assert common.rows_so_far(path, dict(width=0), width=0) == rows                       # of before there was a width
    with pytest.raises(ValueError, match="rows made with --width 0: give"):
        common.rows_so_far(path, dict(width=1), width=0)


@pytest.mark.parametrize("text", ['{"rows": []}', "[1]", "# A page", "\udcff"])
def test_what_holds_no_rows_is_neither_gone_on_from_nor_written_over(text, converted, tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(text, errors="surrogateescape")
    before = path.read_bytes()
    for main in (lambda: recall(SMALL, path), lambda: conversion.main([converted], tmp_path),
                 lambda: conversion.main([tmp_path], tmp_path / "new"), lambda: wikitext103.main([], tmp_path)):
        with pytest.raises(ValueError, match="summary.json holds no table of rows: choose another, or mend the path"):
            main()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_maps_of_another_teacher_or_text_are_refused(tmp_path):
    teacher, data = GPT(GPTConfig(8, 16, 1, 1, 8)), dict(meta=dict(name="a text"))
    students.remember(teacher, data, tmp_path / "maps")
    students.remember(teacher, data, tmp_path / "maps")
    with pytest.raises(ValueError, match="distilled from another model or on another text: choose another --maps"):
        students.remember(teacher, dict(meta=dict(name="another")), tmp_path / "maps")
    with torch.no_grad():
        teacher.transformer.wte.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        students.remember(teacher, data, tmp_path / "maps")


def test_every_file_can_be_imported_from_the_root_of_the_repository():
    names = [path.stem for path in (ROOT / "experiments").glob("[!_]*.py") if not path.stem.startswith("convert_")
             and (path.stem != "hedgehog_llama" or find_spec("transformers"))]
    code = f"import importlib\nfor name in {names}: importlib.import_module('experiments.' + name)"
    assert "students" in names and subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
