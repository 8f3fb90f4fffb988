"""train_gpt.py and sample.py: a run can be stopped, resumed, spread and sampled, and bad input costs nothing."""

import csv
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt
from conftest import stop_after
from data.prepare import main as prepare_main
from hedgehog import ATTENTIONS, GPT, GPTConfig
from sample import sample
from train_gpt import PRESETS, TrainConfig, evaluate, load_checkpoint, parse_config, train

CPU = torch.device("cpu")
SMALL = ("--n-layer 2 --n-head 2 --n-embd 16 --block-size 32 --segment-size 16 --chunk-size 8 --batch-size 4 --steps 6 "
         "--eval-every 3 --warmup 2 --device cpu --dropout 0.1 --sample-tokens 2").split()


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = folder / "story.txt"
    text.write_text("".join(f"The hedgehog counts {i} apples, and the fox counts {i * i % 97}.\n" for i in range(60)))
    assert prepare_main([str(text), "--test", str(text), "--out", str(folder / "bin")]) == 0
    return folder / "bin"


def config(text_dir, out, *flags):
    return parse_config(TrainConfig, PRESETS, [*SMALL, "--data", str(text_dir), "--out", str(out), *flags])


def rows(out):
    """What must not depend on how often a run was stopped: everything in log.csv but the clock."""
    return [(r["step"], r["lr"], r["train_nats"], r["valid_nats"]) for r in csv.DictReader((out / "log.csv").open())]


def script(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS="1"), **options)


def two_processes(program, *flags):
    return script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program, *flags)


def changed_script(folder, change):
    """train_gpt.py, as `t`, after this change."""
    path = folder / "changed.py"
    path.write_text("import sys\nsys.path.insert(0, '.')\nimport train_gpt as t\n"
                    f"{change}\nt.train(t.parse_config(t.TrainConfig, t.PRESETS))\n")
    return str(path)


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("attention, ahead, flags", [
    ("hedgehog", 0, []), ("softmax", 0, []), ("performer", 0, []), ("hedgehog", 1, []),
    ("hedgehog_exp", 0, ["--hybrid-window", "4"])])
def test_a_resumed_run_continues_to_the_last_bit(text_dir, tmp_path, monkeypatch, attention, ahead, flags):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(text_dir, whole, "--attention", attention, *flags))
    monkeypatch.setattr(train_gpt, "steps_ahead", lambda device: ahead)  # as on a GPU: the same curve
    with monkeypatch.context() as m:
        m.setattr(train_gpt, "interrupts", lambda say: stop_after(4))  # not at an evaluation
        with pytest.raises(SystemExit) as stopped:
            train(config(text_dir, parts, "--attention", attention, *flags))
    assert stopped.value.code == 130 and load_checkpoint(parts / "last.pt")["state"]["step"] == 4
    summary = train(parse_config(TrainConfig, PRESETS, ["--out", str(parts), "--resume"]))
    assert rows(parts) == rows(whole) and len(rows(whole)) == 3 and summary["resumed"] == 1
    a, b = load_checkpoint(whole / "last.pt"), load_checkpoint(parts / "last.pt")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for p, q in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(p[k], q[k]) for k in p)


def test_a_finished_run_is_trained_further_by_command_and_an_unfinished_one_only_to_its_end(text_dir, tmp_path,
                                                                                            monkeypatch):
    out, more = tmp_path / "run", ["--out", str(tmp_path / "run"), "--resume", "--steps"]
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train_gpt, "interrupts", lambda say: stop_after(5))
        train(config(text_dir, out, "--eval-every", "4"))
    with pytest.raises(ValueError, match="has made 5 of its 6 steps: --resume goes on without --steps"):
        train(parse_config(TrainConfig, PRESETS, [*more, "9"]))
    train(parse_config(TrainConfig, PRESETS, more[:-1]))
    before = rows(out)
    with pytest.raises(ValueError, match="has made 6 of its 6 steps.*with a larger one"):
        train(parse_config(TrainConfig, PRESETS, [*more, "5"]))
    result = script("train_gpt.py", *more, "7")
    assert result.returncode == 0, result.stderr
    assert [r[0] for r in rows(out)] == ["0", "4", "6", "7"] and rows(out)[:3] == before
    assert load_checkpoint(out / "last.pt")["state"]["loss_count"] == 1                  # that of step 6 alone
    assert json.loads((out / "summary.json").read_text())["steps"] == 7
    train(parse_config(TrainConfig, PRESETS, [*more, "9"]))
    c = parse_config(TrainConfig, PRESETS, more[:-1])                                    # as it is resumed from now on
    assert c.steps == 9 and [r[0] for r in rows(out)] == ["0", "4", "6", "7", "8", "9"]
    assert float(rows(out)[4][1]) == pytest.approx(train_gpt.learning_rate(8, c), rel=1e-5)


def test_a_run_leaves_what_a_reader_needs(text_dir, tmp_path):
    summary = train(config(text_dir, tmp_path / "run"))
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "log.csv", "last.pt", "best.pt", "summary.json"}
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved == summary and saved["tokens"] == 6 * 4 * 32 and saved["test_ppl"] == math.exp(saved["test_nats"])
    meta = json.loads((text_dir / "meta.json").read_text())
    words = sum(len(line.split()) + 1 for line in (text_dir.parent / "story.txt").read_text().splitlines())
    per_word = math.exp(saved["test_nats"] * (meta["tokens"]["test"] - 1) / words)
    assert saved["test_ppl_per_word"] == pytest.approx(per_word)
    assert {"command", "commit", "device", "torch", "mfu", "peak_gib", "epochs"} <= saved.keys()
    assert saved["mfu"] is saved["peak_gib"] is None and saved["resumed"] == 0
    row = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))[-1]
    assert row["device"] == saved["device"] and row["commit"] == saved["commit"] and row["peak_gib"] == "-"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["vocab_size"] == 256
    best = min(float(r[3]) for r in rows(tmp_path / "run"))
    assert saved["valid_nats"] == pytest.approx(best, rel=1e-5)


def test_an_earlier_run_is_moved_aside_and_not_overwritten(text_dir, tmp_path):
    train(config(text_dir, tmp_path / "run", "--steps", "0"))
    train(config(text_dir, tmp_path / "run", "--steps", "0", "--seed", "1"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"] == 1
    assert json.loads((tmp_path / "run-1" / "config.json").read_text())["config"]["seed"] == 0
    assert (tmp_path / "run-1" / "last.pt").exists()


def test_nothing_is_compiled_for_a_run_without_steps(text_dir, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    for steps in (0, 1):
        train(config(text_dir, tmp_path / str(steps), "--steps", str(steps), "--compile"))
        assert len(compiled) == steps


def test_ctrl_c_saves_before_it_leaves(text_dir, tmp_path):
    flags = [*SMALL, "--data", str(text_dir), "--out", str(tmp_path), "--steps", "100000", "--eval-every", "100000"]
    process = subprocess.Popen([sys.executable, "train_gpt.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (tmp_path / "best.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in output
    assert load_checkpoint(tmp_path / "last.pt")["state"]["step"] > 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_two_processes_train_the_same_curve_as_one(text_dir, tmp_path, ahead):
    flags = [*SMALL, "--data", str(text_dir), "--dropout", "0"]
    train(parse_config(TrainConfig, PRESETS, [*flags, "--out", str(tmp_path / "one")]))
    as_on_gpus = changed_script(tmp_path, "t.steps_ahead = lambda device: 1")
    two = two_processes(as_on_gpus if ahead else "train_gpt.py", *flags, "--out", str(tmp_path / "two"), "--accum", "2")
    assert two.returncode == 0, two.stderr
    a, b = np.array(rows(tmp_path / "one"), float), np.array(rows(tmp_path / "two"), float)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert abs(a[0, 3] - a[-1, 3]) > 1e-3  # and it did train


def test_a_gpu_has_its_next_step_begun_before_the_last_is_waited_for():
    assert train_gpt.steps_ahead(torch.device("cuda")) == 1 and train_gpt.steps_ahead(torch.device("cpu")) == 0


def test_two_processes_that_are_stopped_save_before_either_leaves(text_dir, tmp_path):
    # A slow disk, and both processes are stopped in the first step, as a cluster does it.
    program = changed_script(tmp_path, """
import os, signal, time
write, step = t.write_atomically, t.train_step
def slow(path, f):
    if path.name == "last.pt" and stopped:
        time.sleep(2)
    write(path, f)
def stop(*args):
    stopped.append(os.kill(os.getpid(), signal.SIGTERM))
    return step(*args)
stopped, t.write_atomically = [], slow
t.train_step = lambda *args: step(*args) if stopped else stop(*args)
""")
    done = two_processes(program, *SMALL, "--data", str(text_dir), "--out", str(tmp_path / "run"))
    assert done.returncode and "stopped after step 1, saved" in done.stdout + done.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt")["state"]["step"] == 1


def test_accumulation_leaves_the_curve_as_it_is(text_dir, tmp_path):
    train(config(text_dir, tmp_path / "one", "--dropout", "0"))
    train(config(text_dir, tmp_path / "four", "--dropout", "0", "--accum", "4"))
    one, four = (np.array(rows(tmp_path / name), float) for name in ("one", "four"))
    np.testing.assert_allclose(one, four, rtol=1e-5)


def test_the_default_run_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "HERE", tmp_path)  # so that the text is made here, from nothing
    whole = train_gpt.evaluate  # on a part of the text: most of the time went there
    monkeypatch.setattr(train_gpt, "evaluate", lambda model, tokens, *rest: whole(model, tokens[:8200], *rest))
    summary = train(parse_config(TrainConfig, PRESETS, ["--steps", "20", "--eval-every", "20", "--device",
                                                        "cpu", "--out", str(tmp_path / "run"), "--warmup", "8",
                                                        "--sample-tokens", "20"]))
    assert float(rows(tmp_path / "run")[0][3]) > 5  # nats; 256 equally likely bytes have 5.5
    assert summary["valid_nats"] < 3.8


def test_evaluation_counts_every_token_of_the_split_once():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8)).eval()
    tokens = np.random.default_rng(0).integers(0, 11, 8 * 7 + 4).astype("<u2")
    nats = []
    for start in range(0, len(tokens) - 1, 8):
        piece = torch.from_numpy(tokens[start:start + 9].astype(np.int64))[None]
        loss = model(piece[:, :-1], piece[:, 1:])[1].item()
        nats += [loss] * (piece.shape[1] - 1)
    assert len(nats) == len(tokens) - 1
    for batch_size in (1, 3, 100):
        assert evaluate(model, tokens, 8, batch_size, torch.device("cpu")) == pytest.approx(np.mean(nats), rel=1e-6)


def test_an_epoch_shows_every_block_once_and_each_epoch_in_another_order():
    first, second = (train_gpt.epoch_starts(1000, 32, 5, epoch) for epoch in (0, 1))
    for starts in (first, second):
        offsets = np.sort(starts)
        assert (np.diff(offsets) == 32).all() and offsets[0] >= 0 and offsets[-1] + 33 <= 1000 and len(starts) == 30
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("n_parts", [1, 2])
def test_the_steps_of_an_epoch_read_every_block_once_and_no_two_the_same(n_parts):
    c = TrainConfig(block_size=32, batch_size=6, seed=5)
    tokens = np.arange(1000, dtype="<u2")                                # each is its own place
    steps = []
    for step in range(10):                                               # 5 steps of 6 are an epoch of 30 blocks
        parts = [train_gpt.get_batch(tokens, c, step, part, n_parts, CPU) for part in range(n_parts)]
        assert all(torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(32)) for x, y in parts)
        steps.append([start for x, _ in parts for start in x[:, 0].tolist()])
    assert not set(steps[0]) & set(steps[1])
    for epoch in (0, 1):
        seen = [start for step in steps[5 * epoch:5 * epoch + 5] for start in step]
        assert seen == train_gpt.epoch_starts(1000, 32, 5, epoch).tolist()


def test_only_matrices_decay_and_maps_have_their_own_learning_rate():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8, feature_bias=True, short_conv=3,
                          hybrid_window=2))
    groups = train_gpt.make_optimizer(model, TrainConfig(map_lr_scale=10.0), torch.device("cpu")).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            decays = name.endswith("weight") and "ln_" not in name and "short_conv" not in name
            assert (group["weight_decay"] > 0) == decays, name
            assert group["lr_scale"] == (10.0 if "map_" in name else 1.0), name
    assert sum(len(g["params"]) for g in groups) == len(names)
    groups = train_gpt.make_optimizer(model, TrainConfig(map_decay=False), torch.device("cpu")).param_groups
    kept = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"] if p.ndim > 2}
    assert kept == {name for name in names.values() if name.endswith(("map_q.weight", "map_k.weight"))}


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    c = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [train_gpt.learning_rate(step, c) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert train_gpt.learning_rate(100, TrainConfig(steps=100, warmup=10, lr=1.0, final_lr=0.0)) == pytest.approx(0)


def test_model_flops_are_those_of_the_equations():
    def flops(**options):
        with torch.device("meta"):
            return train_gpt.training_flops(GPT(GPTConfig(1024, 50257, 2, 12, 768, **options)))
    weights = 6 * (2 * 12 * 768 ** 2 + 768 * 50257)                  # four matrices of the attention, eight of the MLP
    assert flops(attention="softmax") == weights + 2 * 6 * 1024 * 768          # PaLM's 12 L C T, halved by the mask
    assert flops(attention="hedgehog") == weights + 2 * 3 * 12 * (4 * 128 * 65 + 4 * 64 * 64)
    assert flops(attention="elu") == weights + 2 * 3 * 12 * 4 * 64 * 65
    assert flops(attention="elu", softmax_layers=1) == weights + 6 * 1024 * 768 + 3 * 12 * 4 * 64 * 65
    assert flops(attention="softmax", softmax_layers=2, window=64) == weights + 2 * 3 * 4 * (64 - 64 / 32) * 768
    more = flops(attention="hedgehog", hybrid_window=64) - flops(attention="hedgehog")
    assert more == flops(attention="softmax", softmax_layers=2, window=64) - weights
    for window in (1024, 9999):
        assert flops(attention="softmax", softmax_layers=2, window=window) == flops(attention="softmax")
    assert flops(attention="hedgehog", tie_head=False, tie_qk=True) == flops(attention="hedgehog")


def test_utilisation_is_known_for_the_gpus_in_the_list_alone(monkeypatch):
    model, gpu = GPT(GPTConfig(8, 11, 1, 1, 8)), torch.device("cuda")
    monkeypatch.setattr(train_gpt, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert train_gpt.utilisation(model, 1e6, gpu) == pytest.approx(train_gpt.training_flops(model) * 1e6 / 989e12)
    monkeypatch.setattr(train_gpt, "device_name", lambda device: "NVIDIA H100 PCIe")
    assert train_gpt.utilisation(model, 1e6, gpu) == pytest.approx(train_gpt.training_flops(model) * 1e6 / 756e12)
    two = train_gpt.utilisation(model, 1e6, gpu, world=2)  # the tokens a second of both
    assert two == pytest.approx(train_gpt.utilisation(model, 1e6, gpu) / 2)
    monkeypatch.setattr(train_gpt, "device_name", lambda device: "Quadro")
    assert train_gpt.utilisation(model, 1e6, gpu) is None and train_gpt.utilisation(model, 1e6, CPU) is None


# ---------------------------------------------------------------- the command line


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(TrainConfig, PRESETS, ["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    for f in fields(TrainConfig):
        assert train_gpt.flag(f.name) in text and f.metadata["help"].split(";")[0][:20] in " ".join(text.split())


def test_a_flag_overrides_a_preset_and_a_preset_the_defaults():
    assert parse_config(TrainConfig, PRESETS, ["--preset", "wikitext103"]).n_layer == 12
    assert parse_config(TrainConfig, PRESETS, ["--preset", "wikitext103", "--n-layer", "3"]).n_layer == 3
    assert parse_config(TrainConfig, PRESETS, []).n_layer == TrainConfig.n_layer


def test_the_wikitext103_preset_is_the_published_recipe():
    c = parse_config(TrainConfig, PRESETS, ["--preset", "wikitext103"])
    assert c.steps == 100 * round(117_920_140 / (512 * 1024)) and (c.batch_size, c.block_size) == (512, 1024)
    assert (c.lr, c.weight_decay, c.beta2, c.clip, c.dropout) == (6e-4, 0.1, 0.999, 1.0, 0.1)
    assert c.warmup == c.steps // 100


def test_the_fast_preset_is_the_same_model_on_200_million_tokens():
    whole, fast = (parse_config(TrainConfig, PRESETS, ["--preset", f"wikitext103{x}"]) for x in ("", "-fast"))
    same = ("data", "n_layer", "n_head", "n_embd", "block_size", "map_scale", "map_lr_scale", "feature_bias", "tie_qk")
    assert all(getattr(whole, name) == getattr(fast, name) for name in same)
    assert fast.steps * fast.batch_size * fast.block_size == pytest.approx(200e6, rel=0.02)


@pytest.mark.parametrize("flags", [["--colour", "red"], ["--preset", "huge"], ["--attention", "sofmax"],
                                   ["--steps", "many"], ["--step", "9"]])
def test_an_unknown_flag_preset_or_attention_exits_with_2(flags, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(TrainConfig, PRESETS, flags)
    assert e.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--steps -1", "--batch-size 0", "--accum 0", "--eval-every 0", "--seed -1",
                                   "--lr nan", "--seed 2147483648", "--beta2 1", "--clip 0", "--n-head 0",
                                   "--n-layer 0", "--dropout 1"])
def test_a_number_that_cannot_be_is_refused_before_anything_is_written(text_dir, tmp_path, flags):
    with pytest.raises(ValueError, match=flags.split()[0][2:].replace("-", ".")):
        train(config(text_dir, tmp_path / "run", *flags.split()))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- bad input


def damage(source, target, change):
    """A copy of a prepared text in which change(meta, target) has spoilt something."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    meta = json.loads((target / "meta.json").read_text())
    change(meta, target)
    (target / "meta.json").write_text(json.dumps(meta))
    return target


def spoil_token(meta, folder):
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[7] = 256
    tokens.tofile(folder / "train.bin")


@pytest.mark.parametrize("change, words", [
    (lambda meta, folder: (folder / "train.bin").unlink(), "missing or empty"),
    (lambda meta, folder: (folder / "valid.bin").write_bytes(b""), "missing or empty"),
    (lambda meta, folder: (folder / "train.bin").write_bytes(b"\0\0"), "holds 2 bytes"),
    (lambda meta, folder: (folder / "train.bin").write_bytes(b"\0\0\0"), "holds 3 bytes"),
    (lambda meta, folder: meta.clear(), "meta.json is damaged"),
    (lambda meta, folder: meta.update(tokens=[1, 2]), "meta.json is damaged"),
    (lambda meta, folder: meta["tokens"].pop("valid"), "meta.json is damaged"),
    (spoil_token, "beyond the vocabulary"),
])
def test_damaged_data_is_refused_with_the_remedy(text_dir, tmp_path, change, words):
    folder = damage(text_dir, tmp_path / "data", change)
    with pytest.raises(ValueError, match=words) as e:
        train(config(folder, tmp_path / "run"))
    assert "prepare" in str(e.value) and not (tmp_path / "run").exists()


def test_missing_and_short_data_are_refused(text_dir, tmp_path):
    with pytest.raises(ValueError, match="prepare.py"):
        train(config(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(ValueError, match="--block-size"):
        train(config(text_dir, tmp_path / "run", "--block-size", "5000"))
    with pytest.raises(ValueError, match="--batch-size"):
        train(config(text_dir, tmp_path / "run", "--accum", "3"))
    with pytest.raises(ValueError, match="n_head"):
        train(config(text_dir, tmp_path / "run", "--n-head", "3"))
    with pytest.raises(ValueError, match="performer beyond do not go together.*choose one of hedgehog"):
        train(config(text_dir, tmp_path / "run", "--attention", "performer", "--hybrid-window", "8"))
    with pytest.raises(ValueError, match="--prompt is empty"):  # before the run, not after it
        train(config(text_dir, tmp_path / "run", "--prompt", ""))
    with pytest.raises(ValueError, match="--softmax-layers 2 leaves none of 2 layers to hedgehog: take fewer"):
        train(config(text_dir, tmp_path / "run", "--softmax-layers", "2"))
    with pytest.raises(ValueError, match="--lora-rank finetunes a trained model.*convert_gpt2.py --lora-rank"):
        train(config(text_dir, tmp_path / "run", "--lora-rank", "2"))
    assert not (tmp_path / "run").exists()
    damage(text_dir, tmp_path / "data", lambda meta, folder: None)
    (tmp_path / "data" / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json is damaged"):
        train(config(tmp_path / "data", tmp_path / "run"))


def test_resume_refuses_another_configuration_text_or_nothing(text_dir, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no checkpoint"):
        config(text_dir, out, "--resume")
    train(config(text_dir, out, "--steps", "0"))
    with pytest.raises(ValueError, match="n_embd=16.*--n-embd"):
        parse_config(TrainConfig, PRESETS, ["--out", str(out), "--resume", "--n-embd", "32"])
    older = {key: value for key, value in train_gpt.asdict(config(text_dir, out)).items() if key != "short_conv"}
    flags = ["--out", str(out), "--resume", "--short-conv"]  # of a run that is older than the option
    with pytest.raises(ValueError, match="short_conv=0.*--short-conv"):
        parse_config(TrainConfig, PRESETS, [*flags, "3"], saved_config=lambda config: older)
    assert parse_config(TrainConfig, PRESETS, [*flags, "0"], saved_config=lambda config: older).n_embd == 16
    other = damage(text_dir, tmp_path / "gpt2", lambda meta, folder: meta.update(tokenizer="gpt2"))
    with pytest.raises(ValueError, match="tokenizer was bytes"):
        train(parse_config(TrainConfig, PRESETS, ["--out", str(out), "--resume", "--data", str(other)]))
    other = damage(text_dir, tmp_path / "other", lambda meta, folder: meta["sha256"].update({"train.bin": "0"}))
    with pytest.raises(ValueError, match="another text"):
        train(parse_config(TrainConfig, PRESETS, ["--out", str(out), "--resume", "--data", str(other)]))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"(K\x01(", "cut", "pickle", "another dict"])
def test_a_damaged_checkpoint_says_what_to_do(text_dir, tmp_path, content, capsys):
    train(config(text_dir, tmp_path / "run", "--steps", "0"))
    path = tmp_path / "run" / "last.pt"
    if content == "cut":
        content = path.read_bytes()[:-2000]
    if content == "pickle":  # an object that runs code when it is loaded
        torch.save(Code(tmp_path / "it ran"), path)
    elif content == "another dict":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.*best.pt"):
        parse_config(TrainConfig, PRESETS, ["--out", str(tmp_path / "run"), "--resume"])
    with pytest.raises(SystemExit) as e:
        train_gpt.cli(lambda: sample(path, device="cpu"))
    assert e.value.code == 2 and "damaged" in capsys.readouterr().err and not (tmp_path / "it ran").exists()


def test_a_checkpoint_with_a_changed_weight_is_damaged(text_dir, tmp_path):
    train(config(text_dir, tmp_path / "run", "--steps", "0"))
    path = tmp_path / "run" / "best.pt"
    whole = path.read_bytes()
    some = load_checkpoint(path)["model"]["transformer.wte.weight"][3].numpy().tobytes()
    at = whole.index(some)
    path.write_bytes(whole[:at] + bytes(4) + whole[at + 4:])  # a finite number, in the place of another
    with pytest.raises(ValueError, match="best.pt is damaged"):
        train_gpt.load_model(path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(text_dir, tmp_path):
    flags = ("--lr", "1e30", "--clip", "1e30", "--warmup", "1")
    with pytest.raises(ValueError, match=r"at step \d+, learning rate 1e\+30.*lower --lr"):
        train(config(text_dir, tmp_path / "run", *flags))
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["state"]["step"] == 0 and all(p.isfinite().all() for p in saved["model"].values())


def test_a_full_disk_leaves_the_earlier_checkpoint(text_dir, tmp_path):
    train(config(text_dir, tmp_path / "run", "--steps", "0"))
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # stands in for a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    result = script("train_gpt.py", "--out", str(tmp_path / "run"), "--resume", preexec_fn=small_files_only)
    assert result.returncode == 2 and "free some space" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_out_of_memory_names_the_flags_that_help(text_dir, tmp_path, monkeypatch, capsys):
    def no_memory(*args, **kwargs):
        torch.empty(10 ** 15)
    monkeypatch.setattr(train_gpt, "get_batch", no_memory)
    with pytest.raises(SystemExit) as e:
        train_gpt.cli(lambda: train(config(text_dir, tmp_path / "run")))
    assert e.value.code == 2 and re.search("--accum.*--batch-size", capsys.readouterr().err)


@pytest.mark.parametrize("error, code, words", [
    (OSError(28, "No space left on device", "log.csv"), 2, "No space left on device: 'log.csv': free some space"),
    (MemoryError(), 2, "--accum"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), 2, "--accum"),
    (KeyboardInterrupt(), 130, "interrupted"),
])
def test_every_way_out_is_a_sentence_and_a_code(error, code, words, capsys):
    def run():
        raise error
    with pytest.raises(SystemExit) as e:
        train_gpt.cli(run)
    assert e.value.code == code and words in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    def run():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        train_gpt.cli(run)


def test_a_row_that_cannot_be_written_comes_after_its_checkpoint_and_is_made_good(text_dir, tmp_path, monkeypatch):
    train(config(text_dir, tmp_path / "whole"))
    with monkeypatch.context() as m:
        def full(log, step, *rest, row=train_gpt.Log.row):
            if step == 3:
                raise OSError(28, "No space left on device")
            row(log, step, *rest)
        m.setattr(train_gpt.Log, "row", full)
        with pytest.raises(OSError):
            train(config(text_dir, tmp_path / "parts"))
    train(parse_config(TrainConfig, PRESETS, ["--out", str(tmp_path / "parts"), "--resume"]))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_log_older_than_some_columns_keeps_its_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,valid\n0,5\n3,4\n4,3,2\n5\n6,3\n")                             # two are damaged
    train_gpt.Log(path, 6, ("step", "valid", "commit"))
    assert path.read_text().split() == ["step,valid,commit", "0,5,-", "3,4,-"]


def test_a_log_is_cut_without_a_moment_in_which_it_is_lost(text_dir, tmp_path, monkeypatch):
    train(config(text_dir, tmp_path / "run"))
    before = (tmp_path / "run" / "log.csv").read_bytes()

    def crash(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_gpt.os, "fsync", crash)
    with pytest.raises(ValueError, match="free some space"):
        train_gpt.Log(tmp_path / "run" / "log.csv", start=3)
    assert (tmp_path / "run" / "log.csv").read_bytes() == before


def test_a_file_is_complete_before_it_gets_its_name(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"earlier")

    def write(f):
        f.write(b"later")
        f.flush()
        assert path.read_bytes() == b"earlier"
    train_gpt.write_atomically(path, write)
    assert path.read_bytes() == b"later" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_best_and_last_are_one_file_where_there_are_links_and_part_when_last_moves_on(tmp_path, monkeypatch, links):
    if not links:
        def no_links(*args):
            raise OSError(95, "Operation not supported")
        monkeypatch.setattr(train_gpt.os, "link", no_links)
    best, last = tmp_path / "best.pt", tmp_path / "last.pt"
    last.write_bytes(b"earlier")
    best.write_bytes(b"one")
    train_gpt.second_name(best, last)
    assert last.read_bytes() == b"one" and last.samefile(best) == links
    train_gpt.write_atomically(last, lambda f: f.write(b"two"))
    assert best.read_bytes() == b"one" and sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_best_is_the_checkpoint_of_the_lowest_validation_loss_and_not_the_last(text_dir, tmp_path, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 2.5, 2.5])  # steps 0, 3 and 6, then validation and test at the end
    monkeypatch.setattr(train_gpt, "evaluate", lambda *args: next(losses))
    assert train(config(text_dir, tmp_path / "run"))["best_step"] == 3
    best, last = (load_checkpoint(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    assert best["state"]["step"] == 3 and best["state"]["best"] == last["state"]["best"] == 3.0
    assert last["state"]["step"] == 6


def test_the_gradient_is_clipped(text_dir, tmp_path):
    c = config(text_dir, tmp_path, "--clip", "0.01", "--dropout", "0")
    data = train_gpt.load_data(text_dir, c.block_size)
    model, optimizer, _ = train_gpt.build(c, data["meta"], CPU)
    norms = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: norms.append(
        torch.stack([p.grad.norm() for g in opt.param_groups for p in g["params"]]).norm().item()))
    loss, norm = train_gpt.train_step(model, optimizer, data["train"], c, 0, CPU, train_gpt.nullcontext(), 0, 1)
    assert norms[0] == pytest.approx(0.01, rel=1e-3) and norm > 0.01
    assert loss.item() == pytest.approx(math.log(256), rel=0.1)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("bad_step", [1, 2])  # the next evaluation, before step 3, saves
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(text_dir, tmp_path, monkeypatch, ahead,
                                                                              bad_step):
    real = train_gpt.train_step

    def step(model, optimizer, tokens, c, step, *rest):
        if step != bad_step:
            return real(model, optimizer, tokens, c, step, *rest)
        hook = next(model.parameters()).register_hook(lambda g: g * math.inf)  # the loss is finite, its gradient is not
        try:
            return real(model, optimizer, tokens, c, step, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(train_gpt, "train_step", step)
    monkeypatch.setattr(train_gpt, "steps_ahead", lambda device: ahead)
    with pytest.raises(ValueError, match=f"the loss or its gradient is .* at step {bad_step}, .* is good: lower --lr"):
        train(config(text_dir, tmp_path, "--eval-every", "3"))
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["state"]["step"] == 0 and all(p.isfinite().all() for p in last["model"].values())


def test_the_optimizer_follows_the_schedule_and_the_maps_their_own(text_dir, tmp_path):
    c = config(text_dir, tmp_path, "--map-lr-scale", "3", "--beta2", "0.7")
    data = train_gpt.load_data(text_dir, c.block_size)
    model, optimizer, _ = train_gpt.build(c, data["meta"], torch.device("cpu"))
    assert optimizer.defaults["betas"] == (0.9, 0.7)
    names = {id(p): name for name, p in model.named_parameters()}
    for step in (0, 1, 5):
        train_gpt.train_step(model, optimizer, data["train"], c, step, CPU, train_gpt.nullcontext(), 0, 1)
        for group in optimizer.param_groups:
            scale = 3 if ".map_" in names[id(group["params"][0])] else 1
            assert group["lr"] == pytest.approx(scale * train_gpt.learning_rate(step, c))


def test_dropout_draws_another_mask_at_every_step(text_dir, tmp_path):
    c = config(text_dir, tmp_path, "--lr", "0", "--dropout", "0.5")
    data = train_gpt.load_data(text_dir, c.block_size)
    model, optimizer, _ = train_gpt.build(c, data["meta"], torch.device("cpu"))
    masks = []
    model.transformer.drop.register_forward_hook(lambda module, x, y: masks.append(y == 0))
    for step in (0, 1, 1):
        train_gpt.train_step(model, optimizer, data["train"], c, step, CPU, train_gpt.nullcontext(), 0, 1)
    assert not torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])


def test_the_summary_is_that_of_the_best_checkpoint(text_dir, tmp_path, monkeypatch):
    whole, calls = train_gpt.evaluate, []

    def worse_and_worse(*args):
        calls.append(1)
        return whole(*args) + (100 if len(calls) in (2, 3) else 0)  # so that step 0 is the best
    monkeypatch.setattr(train_gpt, "evaluate", worse_and_worse)
    summary = train(config(text_dir, tmp_path / "run"))
    log = rows(tmp_path / "run")
    assert summary["best_step"] == 0 and summary["valid_nats"] == pytest.approx(float(log[0][3]), rel=1e-5)


def test_a_finished_run_that_is_resumed_keeps_its_speed_and_a_row_cut_short_is_dropped(text_dir, tmp_path):
    before = train(config(text_dir, tmp_path / "run"))
    log = tmp_path / "run" / "log.csv"
    kept = rows(tmp_path / "run")
    log.write_text(log.read_text() + "6,768")
    after = train(parse_config(TrainConfig, PRESETS, ["--out", str(tmp_path / "run"), "--resume"]))
    assert before["tokens_per_second"] > 0 and after["tokens_per_second"] > 0 and rows(tmp_path / "run") == kept


def test_a_machine_without_git_trains_all_the_same(text_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train_gpt.provenance(torch.device("cpu"))["commit"] == "unknown"


def test_a_result_of_several_processes_says_so(monkeypatch):
    alone = train_gpt.provenance(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = train_gpt.provenance(torch.device("cpu"))
    assert both["command"] == alone["command"].replace("python", "torchrun --nproc-per-node 2", 1)
    assert both["device"] == f"2 x {alone['device']}"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train_gpt.provenance(torch.device("cpu"))["command"].startswith("torchrun --nnodes 2 --nproc-per-node 4 ")


def test_a_loss_beyond_the_range_of_exp_is_still_written():
    assert train_gpt.perplexity(0.0) == 1.0 and math.isfinite(train_gpt.perplexity(1e6))


# ---------------------------------------------------------------- sampling


def test_sample_ends_quietly_when_its_reader_leaves_and_prints_on_an_ascii_terminal(text_dir, tmp_path):
    train(config(text_dir, tmp_path / "run", "--steps", "0"))
    command = [sys.executable, "sample.py", str(tmp_path / "run"), "--device", "cpu", "--prompt", "The fox é"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    result = subprocess.run([*command, "--tokens", "5"], cwd=ROOT, capture_output=True, env=environment, timeout=120)
    assert result.returncode == 0 and result.stdout.startswith(b"The fox ?")
    with subprocess.Popen([*command, "--tokens", "100000"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=60) == 141 and process.stderr.read() == b""


def test_arguments_that_are_not_utf8_are_told_of_and_recorded(text_dir, tmp_path):
    data = tmp_path / "caf\udce9"                                         # what Python makes of the byte e9
    data.symlink_to(text_dir)
    run = script("train_gpt.py", *SMALL, "--data", str(data), "--out", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert "caf\\xe9" in json.loads((tmp_path / "run/summary.json").read_text())["command"]
    for command in (["sample.py", str(tmp_path / "run")], ["train_gpt.py", *SMALL, "--data", str(text_dir)]):
        run = script(*command, "--prompt", "\udcff")
        assert run.returncode == 2 and "error: --prompt is not UTF-8" in run.stderr and "Traceback" not in run.stderr


def test_a_run_in_the_folder_one_is_in_is_never_overwritten(text_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(config(text_dir.resolve(), ".", "--steps", "0"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="--out . is a folder you are in, and holds an earlier run: choose another"):
        train(config(text_dir.resolve(), ".", "--steps", "0"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options", [dict(temperature=math.nan), dict(temperature=-1), dict(temperature=math.inf),
                                     dict(top_k=-1), dict(tokens=-5), dict(prompt="")])
def test_sample_refuses_what_cannot_be_drawn(text_dir, tmp_path, options):
    train(config(text_dir, tmp_path / "run", "--steps", "0"))
    with pytest.raises(ValueError, match="temperature|prompt"):
        sample(tmp_path / "run", device="cpu", **options)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_trains_and_is_sampled(text_dir, tmp_path, attention):
    summary = train(config(text_dir, tmp_path / "run", "--attention", attention, "--dropout", "0", "--steps", "2"))
    assert math.isfinite(summary["valid_nats"])
    pieces = []
    text = sample(tmp_path / "run", prompt="The fox é", tokens=40, device="cpu", write=pieces.append)
    assert text.startswith("The fox é") and "".join(pieces) == text
    likeliest = [sample(tmp_path / "run" / "last.pt", "The fox é", 40, temperature=0, seed=seed, device="cpu",
                        write=pieces.append) for seed in (0, 9)]
    assert likeliest[0] == likeliest[1]


def test_two_runs_do_not_write_to_one_folder(text_dir, tmp_path, monkeypatch):
    run, finish, tried = tmp_path / "run", train_gpt.finish, []

    def full_disk(*arguments):
        raise RuntimeError("full")

    def another_starts(*arguments):  # as late as it can
        for flags in ([], ["--resume"]) if (run / "last.pt").exists() else ():
            with pytest.raises(ValueError, match="another run is writing to .*run: wait for it, or choose another --o"):
                train(config(text_dir, run, *flags))
            tried.append(flags)
        return finish(*arguments)

    monkeypatch.setattr(train_gpt, "finish", another_starts)
    train(config(text_dir, run))
    assert tried == [[], ["--resume"]]
    monkeypatch.setattr(train_gpt, "finish", finish)
    train(config(text_dir, run))                                  # the first has let go of it, and is moved aside
    assert (tmp_path / "run-1/summary.json").exists() and (run / "summary.json").exists()
    with pytest.raises(RuntimeError), monkeypatch.context() as patch:
        patch.setattr(train_gpt, "Log", full_disk)
        train(config(text_dir, run))
    train(config(text_dir, run))                                  # and so has one that failed


def test_help_names_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainConfig, PRESETS, ["--preset", "wikitext103-fast", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 0.0015)" in words and "(default: )" not in words


@pytest.mark.parametrize("name, source", [("wikitext103", "wikitext103"), ("pydoc", "pydoc"), ("book", "FILE...")])
def test_missing_text_is_answered_with_the_command_that_makes_it(name, source, tmp_path):
    with pytest.raises(ValueError, match=f"prepare.py {source} --out"):
        train_gpt.load_data(tmp_path / name, 8)
