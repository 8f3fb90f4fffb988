"""Conversion: the loss is the paper's and has its floor, weights come and go unharmed, every stage can be resumed."""

import csv
import hashlib
import http.server
import json
import math
import re
import shutil
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import convert_gpt2
import data
import train_gpt
from conftest import stop_after
from convert_gpt2 import PRESETS, ConvertConfig, convert, imitate, imitation_loss, maps_of, saved_config, swap
from data import gpt2_weights, prepare
from data.gpt2_weights import export, load_gpt2
from data.prepare import main as prepare_main
from hedgehog import GPT, FeatureMap, GPTConfig, linear_attention
from sample import sample
from train_gpt import (
    TrainConfig, add_lora, cli, get_batch, load_checkpoint, load_model, merge_lora, parse_config, train)

MODEL = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 32 --device cpu".split()
SMALL = ("--sample-tokens 2 --steps 4 --distill-steps 6 --batch-size 4 --distill-batch-size 4 --eval-every 3 "
         "--segment-size 16 --chunk-size 8 --device cpu").split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = folder / "story.txt"
    text.write_text("".join(f"The hedgehog counts {i} apples, and the fox counts {i * i % 97}.\n" for i in range(60)))
    assert prepare_main([str(text), "--test", str(text), "--out", str(folder / "bin")]) == 0
    return folder / "bin"


@pytest.fixture(scope="module")
def teacher(text_dir, tmp_path_factory):
    """A run of train_gpt.py with softmax attention, trained long enough that its attention is not uniform."""
    out = tmp_path_factory.mktemp("teacher") / "softmax"
    flags = [*MODEL, "--attention", "softmax", "--steps", "60", "--eval-every", "60", "--warmup", "5", "--lr", "1e-2"]
    train(parse_config(TrainConfig, {}, [*flags, "--data", str(text_dir), "--out", str(out)]))
    return out


@pytest.fixture
def command(text_dir, teacher, tmp_path):
    """convert_gpt2.py with these flags, on the small teacher. Returns its Results."""
    def run(*flags):
        argv = [*SMALL, "--teacher", str(teacher), "--data", str(text_dir), "--out", str(tmp_path / "table"), *flags]
        if "--resume" in flags:
            argv = ["--out", str(tmp_path / "table"), *flags]
        return convert(parse_config(ConvertConfig, PRESETS, argv, saved_config, convert_gpt2.MAY_CHANGE))
    return run


def small_gpt(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=16) | options))
    with torch.no_grad():
        for p in model.parameters():  # GPT-2's start is so near zero that every attention is uniform
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


# ---------------------------------------------------------------- the loss


def loss_by_hand(q, k, phi_q, phi_k, window=0, log_gate=None):
    """One query and one key after the other, as the equation is written."""
    cross_entropy, entropy, n = 0.0, 0.0, 0
    for b, h, i in np.ndindex(q.shape[:3]):
        s = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[-1]) for j in range(i + 1)])
        gate = log_gate[b, h, i].exp() if window else 1
        a = torch.stack([s[j].exp().view(1) if i - j < window else gate * (phi_q[b, h, i] @ phi_k[b, h, j]).view(1)
                         for j in range(i + 1)]).squeeze(1)
        p = s.exp() / s.exp().sum()
        cross_entropy, entropy, n = cross_entropy - p @ (a / a.sum()).log(), entropy - p @ p.log(), n + 1
    return cross_entropy / n, entropy / n


@pytest.mark.parametrize("window", [0, 1, 3])
def test_the_loss_and_its_gradient_are_those_of_the_equation(window):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 7, 4, dtype=torch.float64)
    maps = [FeatureMap(3, 4).double() for _ in range(2)]
    for m in maps:
        m.weight.data.add_(0.5 * torch.randn_like(m.weight))
    gradients, log_gate = [], torch.randn(2, 3, 7, 1, dtype=torch.float64, requires_grad=True)
    hybrid = dict(window=window, log_gate=log_gate) if window else {}
    for function in (imitation_loss, loss_by_hand):
        losses = function(q, k, maps[0](q), maps[1](k), **hybrid)
        inputs = [m.weight for m in maps] + [log_gate] * bool(window)
        gradients.append([*losses, *torch.autograd.grad(losses[0], inputs)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_a_key_nor_a_query_and_without_causality_all_keys_are_seen(causal, side):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 7, 4, dtype=torch.float64)
    phi_q, phi_k = torch.rand(2, 2, 3, 7, 8, dtype=torch.float64).requires_grad_()
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, slice(3) if side == "left" else slice(4, None)] = False                       # 4 of 7 tokens, and 7 of 7
    cross_entropy, entropy, n = 0, 0, keep.sum()
    for b in range(2):
        x, y, phi_x, phi_y = (z[b][:, keep[b]] for z in (q, k, phi_q, phi_k))             # (H, 4 or 7, ...)
        for i in range(x.shape[1]):
            seen = slice(i + 1) if causal else slice(None)
            p = (x[:, i:i + 1] @ y[:, seen].mT / 2).softmax(-1)                           # (H, 1, seen)
            a = phi_x[:, i:i + 1] @ phi_y[:, seen].mT
            cross_entropy -= (p * (a / a.sum(-1, keepdim=True)).log()).sum() / 3 / n
            entropy -= (p * p.log()).sum() / 3 / n
    found = imitation_loss(q, k, phi_q, phi_k, keep, causal)
    torch.testing.assert_close(found, (cross_entropy, entropy), rtol=1e-10, atol=0)
    padded = torch.autograd.grad(found[0], phi_k)[0].transpose(1, 2)[~keep]
    assert (padded == 0).all()


ADVERSARIES = {
    "no feature at all": lambda phi: 0 * phi,
    "features of 1e-30": lambda phi: 1e-30 * phi,
    "products about the bound": lambda phi: 3e-19 * phi,
    "features of 1e30": lambda phi: 1e30 * phi,
    "a head without any feature": lambda phi: phi * (torch.arange(2)[:, None, None] == 0),
    "a head collapsed to one feature": lambda phi: phi * (torch.arange(32).view(2, 1, 16) <= 16),
    "only the last key has features": lambda phi: phi * (torch.arange(phi.shape[2])[:, None] == phi.shape[2] - 1),
    "every other feature is zero": lambda phi: phi * (torch.arange(phi.shape[-1]) % 2),
    "one key outweighs all": lambda phi: phi * torch.where(torch.arange(phi.shape[2]) == 3, 1e15, 1.0)[:, None],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spoil", ADVERSARIES.values(), ids=ADVERSARIES.keys())
@pytest.mark.parametrize("sides", ["both", "keys"])
@pytest.mark.parametrize("gate", [None, -300.0, 0.0, 60.0, 300.0])  # of a hybrid
def test_no_maps_bring_the_loss_below_the_teachers_entropy(dtype, spoil, sides, gate):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 40, 8, dtype=dtype)
    phi_q, phi_k = (torch.rand(1, 2, 40, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    log_gate = torch.full((1, 2, 40, 1), gate or 0.0, dtype=dtype, requires_grad=True)
    hybrid = {} if gate is None else dict(window=8, log_gate=log_gate)
    cross_entropy, entropy = imitation_loss(q, k, spoil(phi_q) if sides == "both" else phi_q, spoil(phi_k), **hybrid)
    assert 1 < entropy < math.log(40) and cross_entropy >= entropy and cross_entropy.isfinite()
    for gradient in torch.autograd.grad(cross_entropy, (phi_q, phi_k, *[log_gate] * bool(hybrid))):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hybrid_reaches_the_floor_and_its_faint_features_are_raised(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=dtype)
    phi_q, phi_k = (q @ k.mT / 2).exp(), torch.eye(9, dtype=dtype).expand(1, 2, 9, 9)     # softmax itself
    for log_scale in (0.0, 30.0, -60.0):  # which the gate takes back; e^-60 is below what linear_attention sees
        log_scale = torch.tensor(log_scale, dtype=dtype, requires_grad=True)
        log_gate = -log_scale.detach().expand(1, 2, 9, 1)
        cross_entropy, entropy = imitation_loss(q, k, log_scale.exp() * phi_q, phi_k, window=3, log_gate=log_gate)
        torch.testing.assert_close(cross_entropy, entropy, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)
        slope = torch.autograd.grad(cross_entropy, log_scale)[0].item()
        assert slope == pytest.approx(-6 / 9 if log_scale < -50 else 0, abs=1e-5)         # six of nine see beyond three


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimizer_that_only_wants_a_small_loss_stays_above_the_entropy(dtype):
    torch.manual_seed(0)
    q, k = 3 * torch.randn(2, 1, 2, 12, 8, dtype=dtype)
    # As many features as keys: these can become softmax itself. Their scale is free, which is where it went wrong.
    log_phi = torch.full((2, 1, 2, 12, 12), -16.0, dtype=dtype).add_(torch.randn(2, 1, 2, 12, 12, dtype=dtype))
    log_phi.requires_grad_(True)
    optimizer = torch.optim.Adam([log_phi], lr=0.3)
    for _ in range(300):
        cross_entropy, entropy = imitation_loss(q, k, *log_phi.exp())
        assert cross_entropy >= entropy - 1e-5
        optimizer.zero_grad()
        cross_entropy.backward()
        optimizer.step()
    assert cross_entropy < entropy + 0.1  # and it did come near


def test_maps_that_are_softmax_itself_reach_the_floor():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    phi_q, phi_k = (q @ k.mT / 2).exp(), torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9)
    cross_entropy, entropy = imitation_loss(q, k, 1e-14 * phi_q, 1e-14 * phi_k)  # at any scale
    torch.testing.assert_close(cross_entropy, entropy, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_too_faint_for_linear_attention_are_raised_without_a_change_of_the_loss(dtype):
    # Seen on a GPT of 124M: the loss was good, and a head attended to nothing, since all its weights were below 1e-30.
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=dtype)
    phi_q, phi_k = (q @ k.mT / 2).exp(), torch.eye(9, dtype=dtype).expand(1, 2, 9, 9)     # which are softmax itself
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for faint in ({}, dict(faint=1e-300)):  # the default, and none
        log_scale = torch.full((1, 2, 9, 1), -75.0, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.SGD([log_scale], lr=5)  # of which a row sees 1 / 18
        for _ in range(150):
            cross_entropy, entropy = imitation_loss(q, k, log_scale.exp() * phi_q, phi_k, **faint)
            torch.testing.assert_close(cross_entropy, entropy, rtol=1e-4, atol=0)
            optimizer.zero_grad()
            cross_entropy.backward()
            optimizer.step()
        y = linear_attention(log_scale.detach().exp() * phi_q, phi_k, v)
        if not faint:
            assert 1e-22 < log_scale.exp().min() and log_scale.exp().max() < 1e-15        # and not raised any further
            torch.testing.assert_close(y, softmax, rtol=1e-4, atol=1e-4)
        else:
            assert (y == 0).all(dim=-1).float().mean() > 0.8


# ---------------------------------------------------------------- stage 1


def spoilt_maps(model):
    with torch.no_grad():
        for p in maps_of(model).values():
            p.add_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("short_conv", [0, 3])
def test_every_layer_is_compared_with_what_the_teacher_computes(short_conv):
    softmax = small_gpt(attention="softmax", short_conv=short_conv).double()
    student = spoilt_maps(swap(softmax, ConvertConfig())).double()
    seen = []
    for block in softmax.transformer.h:
        (block.attn.short_conv or block.attn.c_attn).register_forward_hook(lambda module, args, out: seen.append(out))
    idx = torch.randint(256, (3, 32))
    softmax(idx)
    losses = imitate(student.eval(), idx, nullcontext())
    for block, c_attn, loss in zip(student.transformer.h, seen, losses, strict=True):
        q, k, _ = c_attn.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        expected = imitation_loss(q, k, block.attn.linear.map_q(q), block.attn.linear.map_k(k))
        torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-10, atol=0)
    assert losses[1, 0] > losses[1, 1] + 0.01


@pytest.mark.parametrize("attention", ["hedgehog_exp", "elu"])
@pytest.mark.parametrize("window", [1, 5])
def test_a_hybrid_is_compared_by_the_weights_that_it_attends_with(attention, window):
    softmax = small_gpt(attention="softmax").double()
    student = spoilt_maps(swap(softmax, ConvertConfig(attention=attention, hybrid_window=window))).double().eval()
    idx, x = torch.randint(256, (3, 32)), []
    for block in softmax.transformer.h:
        block.ln_1.register_forward_hook(lambda module, args, out: x.append(out))
    softmax(idx)
    losses = imitate(student, idx, nullcontext())
    with torch.autocast("cpu", torch.bfloat16):
        assert imitate(student.float(), idx, torch.autocast("cpu", torch.bfloat16)).dtype == torch.float32
    for block, x_i, loss in zip(student.double().transformer.h, x, losses, strict=True):
        q, k, _ = block.attn.split_heads(x_i)
        one_hot = torch.eye(32, dtype=torch.float64).expand(3, 2, 32, 32)                 # values that tell the weights
        p = torch.nn.functional.scaled_dot_product_attention(q, k, one_hot, is_causal=True)
        log_w = block.attn.linear(q, k, one_hot).clamp(min=1e-300).log()
        torch.testing.assert_close(loss[0], -(p * log_w).sum(-1).mean(), rtol=1e-6, atol=0)
        assert loss[0] > loss[1] + 1e-3


@pytest.mark.parametrize("attention", ["hedgehog", "t2r"])
def test_memory_of_a_distillation_step_does_not_grow_with_the_layers(attention):
    class Held:
        """A tensor that the graph keeps for the backward pass, for as long as it keeps it."""
        now = peak = 0

        def __init__(self, tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            Held.now += self.size
            Held.peak = max(Held.peak, Held.now)

        def __del__(self):
            Held.now -= self.size

    peaks = []
    for n_layer in (1, 2, 5):
        model, Held.now, Held.peak = small_gpt(attention=attention, n_layer=n_layer), 0, 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            imitate(model, torch.randint(256, (2, 32)), nullcontext(), learn=True)
        assert all(p.grad is not None for p in maps_of(model).values())
        peaks.append(Held.peak)
    weights = 2 * 2 * 32 * 32 * 4  # bytes of one (B, H, T, T) tensor: 384 MiB for GPT-2 124M at 8 x 1,024
    assert weights < peaks[0] == peaks[1] == peaks[2] < 6 * weights


def log_rows(path):
    """What must not depend on how often a run was stopped: all but the clock."""
    return [{k: v for k, v in row.items() if k != "seconds" and k != "tokens_per_second"}
            for row in csv.DictReader(path.open())]


def test_a_conversion_leaves_what_a_reader_needs(command, tmp_path, teacher):
    results, out = command(), tmp_path / "table"
    rows = json.loads((out / "summary.json").read_text())
    assert rows == results.rows
    assert [(r["name"], r["attention"], r["stage"], r["tokens"]) for r in rows] == [
        ("teacher", "softmax", "teacher", 0), ("softmax", "softmax", "finetuned", 512),
        ("hedgehog", "hedgehog", "swapped", 0), ("hedgehog", "hedgehog", "distilled", 768),
        ("hedgehog", "hedgehog", "finetuned", 512)]
    needed = {"valid_ppl", "test_ppl", "seconds", "peak_gib", "device", "command", "commit"}
    assert all(needed <= r.keys() and math.isfinite(r["test_ppl"]) and r["seconds"] > 0 for r in rows)
    _, _, swapped, distilled, finetuned = rows
    for r in (swapped, distilled):
        for c, e, kl in zip(r["cross_entropy"], r["entropy"], r["kl"], strict=True):
            assert kl == c - e and kl > 0 and e > 0
        assert len(r["kl"]) == 2
    assert all(a < b for a, b in zip(distilled["kl"], swapped["kl"])) and distilled["entropy"] == swapped["entropy"]
    log = log_rows(out / "hedgehog" / "distilled" / "log.csv")
    assert [r["step"] for r in log] == ["0", "3", "6"] and log[0]["train_cross_entropy"] == "nan"
    assert [float(log[-1][f"kl_{i}"]) for i in range(2)] == pytest.approx(distilled["kl"], rel=1e-4)
    for stage in ("distilled", "finetuned"):
        for r in log_rows(out / "hedgehog" / stage / "log.csv"):
            assert all(r[key] == finetuned[key] for key in ("command", "commit", "torch", "python", "device"))
    assert rows[0]["valid_nats"] == pytest.approx(json.loads((teacher / "summary.json").read_text())["valid_nats"])
    table = str(results).splitlines()
    assert len(table) == 6 and f"{finetuned['test_ppl'] / rows[1]['test_ppl']:.3f}" in table[-1].split()


def test_every_row_has_its_seconds_and_its_peak_memory(command, tmp_path, monkeypatch):
    peaks, evaluations = [], iter((7.0, 5.0, 100.0))                 # of memory; of the teacher, swapped and distilled
    clock, whole = [0.0], convert_gpt2.evaluate_splits

    def evaluate(*args):
        clock[0] += next(evaluations)
        peaks[-1] += 0.5                                             # what is not above the peak of something before
        return whole(*args)
    monkeypatch.setattr(convert_gpt2, "evaluate_splits", evaluate)
    monkeypatch.setattr(convert_gpt2, "reset_peak", lambda device: peaks.append(float(len(peaks))))
    monkeypatch.setattr(convert_gpt2, "peak_gib", lambda device: peaks[-1])
    monkeypatch.setattr(train_gpt, "peak_gib", lambda device: peaks[-1])
    monkeypatch.setattr(convert_gpt2.time, "perf_counter", lambda: clock[0])
    rows = command("--no-reference", "--steps", "1").rows
    assert [(r["stage"], r["seconds"], r["peak_gib"]) for r in rows] == [
        ("teacher", 7.0, 0.5), ("swapped", 5.0, 1.5), ("distilled", 0.0, 2.0), ("finetuned", 0.0, 4.0)]


def test_stage_1_trains_the_maps_alone_and_stage_2_everything(command, tmp_path, teacher):
    command("--no-reference")
    before = load_model(teacher / "best.pt")[0].state_dict()
    checkpoint = load_checkpoint(tmp_path / "table" / "hedgehog" / "distilled" / "last.pt")
    maps = checkpoint["model"]
    groups = checkpoint["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(checkpoint["optimizer"]["state"]) == 4
    assert len(maps) == 4 and all(".map_" in name for name in maps)
    assert not any(torch.equal(p, torch.eye(8).expand_as(p)) for p in maps.values())
    # At step 0 of stage 2 the model is the teacher and those maps.
    first = log_rows(tmp_path / "table" / "hedgehog" / "finetuned" / "log.csv")[0]
    distilled = json.loads((tmp_path / "table" / "summary.json").read_text())[2]
    assert float(first["valid_nats"]) == pytest.approx(distilled["valid_nats"], rel=1e-5)
    path = str(tmp_path / "table" / "hedgehog" / "distilled" / "last.pt")
    model = swap(load_model(teacher / "best.pt")[0], ConvertConfig(maps=path))
    assert all(torch.equal(p, before.get(name, maps.get(name))) for name, p in model.state_dict().items())
    after = load_checkpoint(tmp_path / "table" / "hedgehog" / "finetuned" / "last.pt")["model"]
    assert not any(torch.equal(after[name], {**before, **maps}[name]) for name in after if "wpe" not in name)


def test_a_convolution_starts_as_the_identity_and_learns_while_finetuning(command, tmp_path, teacher):
    softmax, idx = load_model(teacher / "best.pt")[0], torch.randint(256, (2, 32))
    plain, student = swap(softmax, ConvertConfig()), swap(softmax, ConvertConfig(short_conv=3))
    torch.testing.assert_close(student(idx)[0], plain(idx)[0])
    # With the rows of the first command there, the second needs no reference of its own, and is compared with that.
    command("--attention", "softmax")
    results = command("--short-conv", "3")
    assert [(r["name"], r["short_conv"], r["stage"]) for r in results.rows[1:]] == [("softmax", 0, "finetuned")] + [
        ("hedgehog-conv3", 3, stage) for stage in ("swapped", "distilled", "finetuned")]
    assert not (tmp_path / "table/softmax-1").exists()                                   # where a second would move it
    assert not any("short_conv" in n for n in load_checkpoint(
        tmp_path / "table/hedgehog-conv3/distilled/last.pt")["model"])
    trained = load_model(tmp_path / "table/hedgehog-conv3/finetuned/last.pt")[0]
    for block in trained.transformer.h:
        assert not torch.equal(block.attn.short_conv.weight[1], torch.zeros(48)) and trained.config.short_conv == 3
    before = swap(trained_softmax := small_gpt(attention="softmax", short_conv=3), ConvertConfig())
    assert before.config.short_conv == 3 and trained_softmax.config.short_conv == 3      # a teacher keeps its own
    with pytest.raises(ValueError, match="--short-conv 4: the teacher has one of 3 tokens"):
        swap(trained_softmax, ConvertConfig(short_conv=4))


def test_first_layers_that_keep_softmax_are_not_distilled(command, tmp_path, teacher):
    softmax = load_model(teacher / "best.pt")[0]
    names = maps_of(swap(softmax, ConvertConfig(softmax_layers=1)))
    assert {name.split(".")[2] for name in names} == {"1"}                                # of two layers, the second
    results = command("--softmax-layers", "1", "--window", "8")
    assert [(r["name"], r["stage"]) for r in results.rows[1:]] == [("softmax", "finetuned")] + [
        ("hedgehog-first1x8", stage) for stage in ("swapped", "distilled", "finetuned")]
    assert results.rows[1]["window"] == 0 and results.rows[1]["softmax_layers"] == 0      # the reference is plain
    again = command("--softmax-layers", "1", "--window", "8", "--resume")                 # nothing is left to do
    assert again.rows[-1]["valid_nats"] == results.rows[-1]["valid_nats"]
    distilled = results.find(stage="distilled")[0]
    assert distilled["kl"][0] == 0 < distilled["kl"][1] and (distilled["softmax_layers"], distilled["window"]) == (1, 8)
    trained = load_model(tmp_path / "table/hedgehog-first1x8/finetuned/last.pt")[0]
    assert trained.config.window == 8 and trained.transformer.h[0].attn.linear is None
    # The second layer learns from the teacher as it is, whose first layer has no window: as if that had been swapped.
    every = command("--no-reference", "--steps", "1").find(name="hedgehog", stage="distilled")[0]
    assert distilled["kl"][1] == pytest.approx(every["kl"][1], rel=1e-6)
    # Softmax with a window is another model, and no reference.
    rows = command("--attention", "softmax", "--softmax-layers", "2", "--window", "8").find(stage="finetuned")
    assert rows[-1]["name"] == "softmax-first2x8" and rows[-1] not in convert_gpt2.references(rows, 0)
    with pytest.raises(ValueError, match="first layers see 8 tokens: give one with plain softmax"):
        command("--teacher", str(tmp_path / "table/softmax-first2x8/finetuned/best.pt"), "--out", str(tmp_path / "b"))


@pytest.mark.parametrize("attention", ["hedgehog_exp", "elu"])
def test_a_conversion_to_the_hybrid_distils_its_gates_too(command, tmp_path, attention):
    flags = ["--attention", attention, "--hybrid-window", "4", "--export", str(tmp_path / "exported")]
    results, name = command(*flags), f"{attention}-hybrid4"
    assert [(r["name"], r["stage"], r["hybrid_window"]) for r in results.rows[1:]] == [
        ("softmax", "finetuned", 0), *((name, stage, 4) for stage in ("swapped", "distilled", "finetuned"))]
    swapped, distilled, finetuned = results.rows[2:]
    assert all(0 < a < b for a, b in zip(distilled["kl"], swapped["kl"]))
    maps = load_checkpoint(tmp_path / "table" / name / "distilled/last.pt")["model"]
    weights = set() if attention == "elu" else {"map_q.weight", "map_k.weight"}
    assert {key.split("linear.")[1] for key in maps} == {"map_gate", "map_gate_bias"} | weights
    assert all(p.all() for p in maps.values())                                            # no map_gate is still 0
    model, idx = load_model(tmp_path / "table" / name / "finetuned/best.pt")[0], torch.randint(256, (2, 32))
    assert model.config.hybrid_window == 4
    assert torch.equal(load_gpt2(tmp_path / "exported")(idx)[0], model(idx)[0])
    flags = ["--maps", str(tmp_path / "table" / name / "distilled/last.pt"), "--attention", attention, "--no-reference"]
    with pytest.raises(ValueError, match="--hybrid-window or none" if weights else "elu learns no maps.*leave out --m"):
        command(*flags, "--name", "other")
    rows = command(*flags, "--hybrid-window", "8", "--distill-steps", "0", "--steps", "1").rows   # another length fits
    assert rows[-1]["name"] == f"{attention}-hybrid8" and rows[-2]["stage"] == "distilled"


def test_a_conversion_older_than_some_flags_resumes(command, tmp_path):
    before = command("--attention", "softmax").rows
    path = tmp_path / "table/softmax/config.json"
    about = json.loads(path.read_text())
    for name in ("short_conv", "softmax_layers", "window", "learn_temperature", "hybrid_window"):
        assert not about["config"].pop(name)
    path.write_text(json.dumps(about))
    assert [r["valid_nats"] for r in command("--attention", "softmax", "--resume").rows] == [
        r["valid_nats"] for r in before]


def test_softmax_with_a_convolution_is_no_reference(command):
    results = command("--attention", "softmax", "--short-conv", "3")
    assert [(r["name"], r["short_conv"]) for r in results.rows[1:]] == [("softmax", 0), ("softmax-conv3", 3)]
    row = results.rows[2]
    results.add(**{k: v for k, v in row.items() if k not in ("valid_nats", "valid_ppl", "test_ppl")},
                valid_nats=0.0, valid_ppl=1.0, test_ppl=1.0)
    assert "1.000" in str(results).splitlines()[2].split() and "1.000" not in str(results).splitlines()[3].split()


@pytest.mark.parametrize("name, new", [("hedgehog", ["--dropout", "0.1"]),
                                       ("hedgehog-hybrid4", ["--hybrid-window", "4"])])
def test_each_stage_resumes_to_the_last_bit(command, tmp_path, monkeypatch, name, new):
    command(*new)
    whole, parts = tmp_path / "whole", tmp_path / "table"
    parts.rename(whole)
    steps = dict(learned=0, trained=0)

    def count(key, function, counts=lambda *args, **kwargs: True):
        def counted(*args, **kwargs):
            steps[key] += counts(*args, **kwargs)
            return function(*args, **kwargs)
        return counted
    learns = (lambda *args, learn=False: learn)
    monkeypatch.setattr(convert_gpt2, "imitate", count("learned", convert_gpt2.imitate, learns))
    monkeypatch.setattr(train_gpt, "train_step", count("trained", train_gpt.train_step))
    # Stopped while the reference is finetuned, while the maps are distilled and while the result is finetuned.
    resume = ["--name", name, "--resume"]
    for module, n, flags in ((train_gpt, 2, new), (convert_gpt2, 4, resume), (train_gpt, 3, resume)):
        with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
            m.setattr(module, "interrupts", lambda say: stop_after(n))
            command(*flags)
        assert stopped.value.code == 130
    assert load_checkpoint(parts / name / "finetuned" / "last.pt")["state"]["step"] == 3
    command(*resume)
    assert steps == dict(learned=6, trained=2 * 4)  # none is made again
    for stage in (f"{name}/distilled", f"{name}/finetuned", "softmax/finetuned"):
        a, b = load_checkpoint(whole / stage / "last.pt"), load_checkpoint(parts / stage / "last.pt")
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        assert log_rows(whole / stage / "log.csv") == log_rows(parts / stage / "log.csv")
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (whole, parts))
    keys = ("name", "stage", "tokens", "valid_nats", "test_nats")
    assert [[r[k] for k in keys] for r in a] == [[r[k] for k in keys] for r in b]


def test_a_resumed_conversion_tells_of_what_began_it_and_makes_no_row_again(command, tmp_path, monkeypatch):
    def at(device, *flags):
        monkeypatch.setattr(sys, "argv", ["convert_gpt2.py", *flags])
        monkeypatch.setattr(train_gpt, "device_name", lambda _: device)

    out, first = tmp_path / "table", "python convert_gpt2.py --first"
    at("GPU", "--first")
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(convert_gpt2, "interrupts", lambda say: stop_after(1))
        command("--no-reference")
    swapped = json.loads((out / "summary.json").read_text())[1]
    for path in (out / "hedgehog/distilled").iterdir():
        path.unlink()  # as if it had been killed before its first checkpoint
    at("CPU", "--resume")
    rows = command("--resume").rows
    assert [(r["stage"], r["command"], r["device"], r["resumed"]) for r in rows] == [
        ("teacher", first, "GPU", 0), ("swapped", first, "GPU", 0), ("distilled", first, "CPU", 1),
        ("finetuned", first, "CPU", 1)]
    assert rows[1] == swapped                                            # to the last digit of its seconds
    about = json.loads((out / "hedgehog/config.json").read_text())
    assert (about["command"], about["device"], about["resumed"]) == (first, "GPU", 1)
    stages = [out / "hedgehog" / stage for stage in ("distilled", "finetuned")]
    assert all(row["command"] == first for stage in stages for row in log_rows(stage / "log.csv"))
    assert json.loads((stages[1] / "summary.json").read_text())["command"] == first
    before = {path: path.read_bytes() for path in [out / "summary.json", *(p for s in stages for p in s.iterdir())]}
    at("laptop", "--resume", "--export")
    for name in ("evaluate_splits", "imitate"):
        monkeypatch.setattr(convert_gpt2, name, None)                    # nothing is measured
    assert command("--resume", "--export", str(tmp_path / "exported")).rows == rows
    assert {path: path.read_bytes() for path in before} == before and (tmp_path / "exported").exists()


def test_peak_memory_of_a_distillation_is_that_of_its_steps_also_after_a_resumption(command, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_gpt2, "peak_gib", lambda device: 9.0)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(convert_gpt2, "interrupts", lambda say: stop_after(6))
        command("--no-reference")
    monkeypatch.setattr(convert_gpt2, "peak_gib", lambda device: 1.0)    # of the evaluation, which is all that is left
    assert command("--resume").find(stage="distilled")[0]["peak_gib"] == 9.0
    assert {row["peak_gib"] for row in log_rows(tmp_path / "table/hedgehog/distilled/log.csv")} == {"9"}


def test_maps_that_diverge_name_their_own_rate_and_a_checkpoint_if_there_is_one(command, tmp_path, monkeypatch):
    real = convert_gpt2.imitate
    monkeypatch.setattr(convert_gpt2, "imitate", lambda *args, learn=False: real(*args) * (math.nan if learn else 1))
    with pytest.raises(ValueError, match="at step 0, .*the last checkpoint in .* is good: lower --distill-lr or"):
        command("--no-reference")
    monkeypatch.setattr(convert_gpt2, "mean_of_layers", lambda *_: math.nan)              # in the first evaluation
    with pytest.raises(ValueError, match="at step 0, learning rate 0.03: lower --distill-lr or lengthen --warmup"):
        command("--no-reference")


def test_dropout_is_on_while_finetuning_a_distilled_model(command, tmp_path, monkeypatch):
    training, real = [], train_gpt.train_step
    monkeypatch.setattr(train_gpt, "train_step", lambda model, *rest: training.append(model.training) or
                        real(model, *rest))
    command("--no-reference", "--dropout", "0.1")
    assert training == 4 * [True]


def test_two_conversions_do_not_write_to_one_folder(command, tmp_path):
    run = tmp_path / "table" / "hedgehog"
    for held in (run, run / "finetuned"):  # by another conversion; by `train_gpt.py --resume`
        with train_gpt.lock_folder(held), pytest.raises(ValueError, match="another run is writing"):
            command("--no-reference")
        assert not (run / "finetuned" / "summary.json").exists() and not run.with_name("hedgehog-1").exists()


@pytest.mark.parametrize("flags", [[], ["--lora-rank", "2"]])
def test_the_result_is_sampled_and_trained_further(command, tmp_path, flags):
    command("--no-reference", *flags)
    out = tmp_path / "table" / "hedgehog" / "finetuned"
    assert out.name == "finetuned"
    for folder in (out, out.parent):  # of the conversion, too
        assert sample(folder, prompt="The fox", tokens=5, device="cpu", write=lambda text: None).startswith("The fox")
    saved = load_checkpoint(out / "last.pt")
    assert any(".lora_" in name for name in saved["model"]) == bool(flags)
    longer = parse_config(TrainConfig, train_gpt.PRESETS, ["--out", str(out), "--resume", "--steps", "6"])
    train(longer)
    assert load_checkpoint(out / "last.pt")["state"]["step"] == 6 and longer.lora_rank == 2 * bool(flags)
    rows = command("--resume").find(stage="finetuned")  # a row of its own: the first is of the conversion's steps
    assert [row["tokens"] for row in rows] == [4 * 4 * 32, 6 * 4 * 32]
    assert rows[1]["test_nats"] == json.loads((out / "summary.json").read_text())["test_nats"] != rows[0]["test_nats"]
    assert command("--resume").rows[-2:] == rows


@pytest.mark.parametrize("flags", [["--attention", "elu"], ["--attention", "performer"], ["--attention", "cosformer"],
                                   ["--attention", "softmax"]])
def test_a_map_without_parameters_skips_distillation_with_a_sentence(command, flags, capsys, tmp_path):
    rows = command(*flags, "--no-reference", "--steps", "1").rows
    skipped = "has no parameters that could be distilled: stage 1 is skipped" in capsys.readouterr().out
    assert skipped == (flags[1] != "softmax") and not (tmp_path / "table" / flags[1] / "distilled").exists()
    assert [r["stage"] for r in rows] == ["teacher"] + ["swapped"] * skipped + ["finetuned"]
    assert not skipped or len(rows[1]["kl"]) == 2


@pytest.mark.parametrize("flags, name", [
    (["--attention", "t2r"], "t2r"), (["--attention", "hedgehog_exp", "--tie-qk"], "hedgehog_exp"),
    (["--feature-bias", "--map-scale", "0.5", "--name", "biased"], "biased"),
    (["--learn-temperature", "--name", "warm"], "warm"),
    (["--distill-steps", "0"], "hedgehog-undistilled"), (["--block-size", "16"], "hedgehog")])
def test_named_options_and_other_maps_are_converted(command, flags, name):
    rows = command(*flags, "--no-reference", "--steps", "1").rows
    assert {r["name"] for r in rows[1:]} == {name} and all(math.isfinite(r["test_ppl"]) for r in rows)
    assert ("distilled" in [r["stage"] for r in rows]) == (name != "hedgehog-undistilled")


def test_a_learned_temperature_is_distilled_with_the_maps(command, tmp_path):
    command("--learn-temperature", "--no-reference", "--steps", "1")
    maps = load_checkpoint(tmp_path / "table" / "hedgehog" / "distilled" / "last.pt")["model"]
    learned = [p for name, p in maps.items() if name.endswith("log_temperature")]
    assert len(learned) == 4 and all(p.abs().max() > 0 for p in learned)                  # q and k of two layers
    with pytest.raises(ValueError, match="does not hold the feature maps of this model.*--learn-temperature"):
        command("--maps", str(tmp_path / "table" / "hedgehog" / "distilled" / "last.pt"), "--name", "without")


def test_conversions_that_run_side_by_side_keep_each_others_rows(tmp_path):
    one, two = (convert_gpt2.Results(tmp_path, CPU) for _ in range(2))
    for results, name in ((one, "elu"), (two, "relu"), (one, "t2r")):
        results.add(name=name, attention=name, stage="swapped", tokens=0, valid_nats=1.0, valid_ppl=math.e)
    assert [row["name"] for row in one.rows] == ["elu", "relu", "t2r"]


def test_a_row_waits_until_another_conversion_has_written_its_own(tmp_path):
    results = convert_gpt2.Results(tmp_path, CPU)
    row = dict(name="elu", attention="elu", stage="swapped", tokens=0, valid_nats=1.0, valid_ppl=math.e)
    adding = threading.Thread(target=lambda: results.add(**row))
    with train_gpt.lock_folder(tmp_path):
        adding.start()
        adding.join(0.2)
        assert adding.is_alive() and not results.path.exists()
    adding.join()
    assert [r["name"] for r in results.read()] == ["elu"]


def test_maps_of_an_earlier_run_are_taken_over_and_measured_elsewhere(command, tmp_path):
    first = command("--no-reference", "--block-size", "16").find(stage="distilled")[0]
    path = str(tmp_path / "table" / "hedgehog" / "distilled" / "last.pt")
    flags = ["--no-reference", "--maps", path, "--distill-steps", "0", "--steps", "0"]
    same = command(*flags, "--block-size", "16", "--name", "same").find(name="same")
    assert [r["stage"] for r in same] == ["distilled"] and same[0]["kl"] == first["kl"]
    longer = command(*flags, "--out", str(tmp_path / "longer")).find(stage="distilled")[0]
    assert len(longer["kl"]) == 2 and longer["kl"] != first["kl"]
    for other in (["--feature-bias"], ["--attention", "hedgehog_exp"]):                  # which has the same weights
        with pytest.raises(ValueError, match="does not hold the feature maps of this model.*--attention"):
            command(*flags, *other, "--block-size", "16", "--name", "other")


def test_a_conversion_of_another_length_gets_a_reference_of_that_length(command):
    flags = ["--distill-steps", "0", "--steps"]
    command(*flags, "1")
    rows = command(*flags, "2", "--name", "longer").rows
    assert [r["tokens"] for r in convert_gpt2.references(rows, 0)] == [128, 256]
    assert len(command(*flags, "2", "--name", "again").rows) == len(rows) + 2              # that has one already


def test_low_rank_updates_are_compared_with_low_rank_updates(command):
    flags = ["--distill-steps", "0", "--steps", "1"]
    full = command(*flags).rows
    rows = command(*flags, "--lora-rank", "2").rows
    found = {(r["name"], r["stage"], r["lora_rank"]): r for r in rows[1:]}
    pairs = {0: ("hedgehog-undistilled-1", "softmax"), 2: ("hedgehog-undistilled", "softmax-lora2")}
    keys = {(name, "finetuned", rank) for rank, names in pairs.items() for name in names}
    assert {key for key in found if key[1] == "finetuned"} == keys
    for rank, names in pairs.items():
        pair = [found[name, "finetuned", rank] for name in names]
        assert convert_gpt2.ratio(pair[0], rows) == pair[0]["test_ppl"] / pair[1]["test_ppl"]
    for r in full[1:]:  # of before this was told: all weights
        del r["lora_rank"]
    assert convert_gpt2.ratio(full[-1], full) == pytest.approx(full[-1]["test_ppl"] / full[1]["test_ppl"])
    assert convert_gpt2.ratio(full[-1] | dict(lora_rank=2), full) is None


def test_both_stages_read_on_in_the_text(command, monkeypatch):
    read = {train_gpt: [], convert_gpt2: []}
    for module, steps in read.items():
        monkeypatch.setattr(module, "get_batch", lambda tokens, config, step, *rest, steps=steps:
                            steps.append(step) or get_batch(tokens, config, step, *rest))
    command("--no-reference")
    assert read == {train_gpt: [*range(4)], convert_gpt2: [*range(6)]}


def test_the_default_trains_its_teacher_first(tmp_path, monkeypatch, text_dir, capsys):
    monkeypatch.chdir(tmp_path)
    small = dict(zip([f[2:].replace("-", "_") for f in MODEL[::2]], [2, 2, 16, 32, "cpu"]))
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", dict(small, steps=2, data=str(text_dir)))
    config = parse_config(ConvertConfig, PRESETS, [*SMALL, "--data", str(text_dir)])
    assert (config.teacher, config.out, config.preset) == ("", "", "tiny")
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train_gpt, "interrupts", lambda say: stop_after(1))
        convert(config)
    stopped = capsys.readouterr().out
    convert(config)
    first = capsys.readouterr().out
    assert "saved: give the same command again to go on" in stopped
    convert(replace(config, name="again"))
    assert "training it first" in first and "training it first" not in capsys.readouterr().out
    assert (tmp_path / "runs/tiny-softmax/summary.json").exists()
    rows = json.loads((tmp_path / "runs/convert-tiny/summary.json").read_text())
    assert [r["name"] for r in rows] == ["teacher", "softmax"] + 3 * ["hedgehog"] + 3 * ["again"]


def test_the_text_is_the_teachers_own_unless_another_is_named(command, tmp_path, text_dir, teacher, monkeypatch):
    given, read = ["--data", "", "--no-reference", "--steps", "1"], []

    def stop(config, **kwargs):
        read.append(config.data)
        raise InterruptedError

    command(*given)
    path = tmp_path / "table/hedgehog/config.json"
    about = json.loads(path.read_text())
    assert about["config"]["data"] == str(text_dir)
    about["config"]["data"] = ""                                  # of a conversion that read data/pydoc all the same
    path.write_text(json.dumps(about))
    monkeypatch.setattr(convert_gpt2, "find_data", stop)
    for flags in (["--resume"], [*given, "--data", "another"], [*given, "--teacher", "gpt2"]):
        with pytest.raises(InterruptedError):
            command(*flags)
    assert read == ["", "another", ""]
    checkpoint = load_checkpoint(teacher / "best.pt")
    torch.save(checkpoint | dict(config=checkpoint["config"] | dict(data="gone")), tmp_path / "moved.pt")
    with pytest.raises(ValueError, match="learned the text in gone, which is not there: name one with --data"):
        command(*given, "--teacher", str(tmp_path / "moved.pt"))


def test_maps_start_from_the_identity_and_random_features_from_the_seed():
    teacher = small_gpt(attention="softmax")
    for scale in (1.0, 0.5):
        maps = maps_of(swap(teacher, ConvertConfig(map_scale=scale)))
        assert len(maps) == 4 and all(torch.equal(p, scale * torch.eye(8).expand(2, 8, 8)) for p in maps.values())
    a, b, c = (swap(teacher, ConvertConfig(attention="performer", seed=seed)).state_dict() for seed in (1, 1, 2))
    name = "transformer.h.0.attn.linear.map_q.projection"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_the_ratio_is_to_the_best_teacher_finetuned_for_as_many_tokens(tmp_path):
    results = convert_gpt2.Results(tmp_path, torch.device("cpu"))
    for name, tokens, nats in (("softmax", 10, 2.0), ("softmax-2", 10, 1.9), ("softmax", 20, 1.0), ("elu", 10, 2.9)):
        attention = name.split("-")[0]
        row = dict(name=name, attention=attention, stage="finetuned", tokens=tokens)
        results.add(**row, valid_nats=nats, valid_ppl=math.exp(nats))
    lines = str(results).splitlines()
    assert convert_gpt2.ratio(results.rows[0] | dict(stage="swapped", tokens=7), results.rows) == pytest.approx(math.e)
    assert convert_gpt2.ratio(row | dict(tokens=7, test_ppl=None, valid_ppl=9.0), results.rows) is None
    untested = [row | dict(attention="softmax", stage="finetuned", valid_nats=1.0, test_ppl=None)]
    assert convert_gpt2.ratio(row | dict(stage="finetuned", test_ppl=9.0), untested) is None
    assert f"{math.e:.3f}" in lines[-1].split() and "1.000" in lines[2].split() and "1.000" in lines[3].split()
    results.add(**row, valid_nats=1.9, valid_ppl=math.exp(1.9))  # in place of the last
    assert len(convert_gpt2.Results(tmp_path, torch.device("cpu")).rows) == 4
    assert "1.000" in str(results).splitlines()[-1].split()
    results.add(**row, valid_nats=1.9, valid_ppl=math.exp(1.9), seconds=12.0, peak_gib=3.25)
    assert str(results).splitlines()[-1].split()[-2:] == ["12", "3.2"] and lines[-1].split()[-2:] == ["-", "-"]


def test_the_gpt2_preset_distils_for_two_epochs_of_the_papers_batch():
    c = parse_config(ConvertConfig, PRESETS, ["--preset", "gpt2"])
    assert c.distill_steps == 2 * (117_920_140 // (8 * 1024)) and (c.distill_batch_size, c.lr) == (8, 6e-4)
    assert (c.teacher, c.feature_bias, c.tie_qk, c.map_scale, c.lora_rank) == ("gpt2", False, False, 1.0, 0)


# ---------------------------------------------------------------- low-rank updates


def test_low_rank_updates_start_at_nothing_train_alone_and_merge_into_plain_weights():
    model, idx = small_gpt(), torch.randint(256, (2, 32))
    before, plain = model(idx)[0], {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, 3)
    assert torch.equal(model(idx)[0], before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all(re.search(r"attn\.c_(attn|proj)\.lora_[AB]$", name) for name in trained)
    optimizer = train_gpt.make_optimizer(model, TrainConfig(lr=0.1), CPU)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    model(idx, idx)[1].backward()
    optimizer.step()
    after = model(idx)[0]
    merged = merge_lora(model.state_dict())
    assert merged.keys() == plain.keys() and not torch.allclose(after, before, atol=1e-3)
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {f"transformer.h.{i}.attn.{c}.weight" for i in range(2) for c in ("c_attn", "c_proj")}
    other = small_gpt()
    other.load_state_dict(merged)
    torch.testing.assert_close(other(idx)[0], after, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="--lora-rank 17 is no low rank for matrices of width 16"):
        TrainConfig(n_embd=16, lora_rank=17)


def test_a_run_that_is_being_trained_further_is_not_exported(command, tmp_path, monkeypatch):
    exported, out = tmp_path / "exported", tmp_path / "table/hedgehog/finetuned"
    command("--no-reference")
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train_gpt, "interrupts", lambda say: stop_after(1))
        train(parse_config(TrainConfig, train_gpt.PRESETS, ["--out", str(out), "--resume", "--steps", "6"]))
    with pytest.raises(ValueError, match=f"on its way to 6 steps: python train_gpt.py --resume --out {out}"):
        command("--resume", "--export", str(exported))
    assert not exported.exists()
    train(parse_config(TrainConfig, train_gpt.PRESETS, ["--out", str(out), "--resume"]))
    command("--resume", "--export", str(exported))
    idx = torch.randint(256, (2, 32))
    assert torch.equal(load_gpt2(exported)(idx)[0], load_model(out / "best.pt")[0](idx)[0])


def test_a_resumed_conversion_leaves_its_export_as_it_is(command, tmp_path, capsys):
    rows = command("--no-reference", "--export", str(tmp_path / "exported")).rows
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "exported").iterdir()}
    assert command("--resume").rows == rows and "exported is there already, and stays" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "exported").iterdir()} == before
    (tmp_path / "exported").rename(tmp_path / "moved")
    command("--resume")                                                                   # the flag is remembered
    assert (tmp_path / "exported/model.safetensors").read_bytes() == (
        tmp_path / "moved/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--export .*moved is there already: choose another"):
        command("--resume", "--export", str(tmp_path / "moved"))


def test_a_conversion_that_train_gpt_finished_and_extended_is_resumed(command, tmp_path, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train_gpt, "interrupts", lambda say: stop_after(3))
        command("--no-reference")
    out = ["--out", str(tmp_path / "table/hedgehog/finetuned"), "--resume"]
    for flags in ([], ["--steps", "6"]):
        with monkeypatch.context() as m:
            m.setattr(train_gpt, "device_name", lambda _: "another computer")
            train(parse_config(TrainConfig, train_gpt.PRESETS, [*out, *flags]))
    rows = command("--resume").rows
    assert [r["device"] == "another computer" for r in rows[-2:]] == [False, True]
    assert [(r["stage"], r["tokens"]) for r in rows[-2:]] == [("distilled", 6 * 4 * 32), ("finetuned", 6 * 4 * 32)]


def test_a_finetuning_with_low_rank_updates_is_exported_merged(command, tmp_path):
    command("--no-reference", "--lora-rank", "2", "--export", str(tmp_path / "exported"))
    path = tmp_path / "table" / "hedgehog" / "finetuned" / "best.pt"
    finetuned, checkpoint = load_model(path)
    exported, idx = load_gpt2(tmp_path / "exported"), torch.randint(256, (2, 32))
    assert exported.config.attention == "hedgehog" and torch.equal(exported(idx)[0], finetuned(idx)[0])
    unmerged = GPT(GPTConfig(**checkpoint["model_config"]))       # as it was trained: the updates beside the weights
    add_lora(unmerged, 2)
    unmerged.load_state_dict(checkpoint["model"])
    trained = unmerged.eval()(idx)[0]
    torch.testing.assert_close(exported(idx)[0], trained, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, p in unmerged.named_parameters():
            p.mul_(not name.endswith("lora_B"))
    assert (trained - unmerged(idx)[0]).abs().max() > 1e-2        # and they matter


# ---------------------------------------------------------------- GPT-2's files


@pytest.mark.parametrize("options", [
    dict(attention="softmax"), dict(attention="softmax", tie_head=False), dict(attention="hedgehog"),
    dict(attention="t2r", tie_qk=True), dict(attention="hedgehog", bias=False, feature_bias=True),
    dict(attention="performer"), dict(attention="hedgehog", short_conv=3), dict(attention="softmax", short_conv=3),
    dict(attention="hedgehog", learn_temperature=True), dict(attention="softmax", softmax_layers=1, window=4),
    dict(attention="hedgehog_exp", hybrid_window=4, softmax_layers=1)])
def test_an_exported_model_is_read_back_to_the_last_bit(tmp_path, options):
    model, idx = small_gpt(**options), torch.randint(256, (2, 32))
    export(model, tmp_path / "exported")
    back = load_gpt2(tmp_path / "exported")
    assert back.config == model.config and torch.equal(back(idx)[0], model(idx)[0])
    plain = options in (dict(attention="softmax"), dict(attention="softmax", tie_head=False))
    said = json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"]  # what transformers goes by
    assert said == ("gpt2" if plain else "hedgehog_gpt2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported"]
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == [
        name + end for name in ("config.json", "model.safetensors") for end in ("", ".sha256")]


def test_an_exported_softmax_model_is_a_teacher_and_a_linear_one_is_not(command, tmp_path):
    command("--attention", "softmax", "--export", str(tmp_path / "softmax"))
    rows = command("--teacher", str(tmp_path / "softmax"), "--out", str(tmp_path / "other"), "--no-reference").rows
    assert [r["stage"] for r in rows] == ["teacher", "swapped", "distilled", "finetuned"]
    folder = ["--teacher", str(tmp_path / "table" / "softmax"), "--out", str(tmp_path / "of the folder"), "--data", ""]
    again = command(*folder, "--no-reference").rows               # the same teacher, whose text is known here
    assert [r["valid_nats"] for r in again] == [r["valid_nats"] for r in rows]
    command("--export", str(tmp_path / "linear"))
    with pytest.raises(ValueError, match="linear already"):
        command("--teacher", str(tmp_path / "linear"))
    with pytest.raises(ValueError, match="linear already"):
        command("--teacher", str(tmp_path / "table" / "hedgehog" / "finetuned"))


def test_an_export_that_fails_leaves_nothing_and_one_never_replaces_another(command, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(gpt2_weights, "save_json", full)  # after the weights were written
        with pytest.raises(ValueError, match="free some space"):
            export(small_gpt(), tmp_path / "exported")
    assert not list(tmp_path.iterdir())
    (tmp_path / "exported").mkdir()
    with pytest.raises(ValueError, match="--export .* is there already"):
        command("--export", str(tmp_path / "exported"))
    assert not (tmp_path / "table").exists()


def test_an_export_leaves_what_is_beside_it_alone(tmp_path):
    theirs = [tmp_path / "exported.tmp", tmp_path / "exported-1.tmp"]
    for folder in theirs:
        folder.mkdir()
        (folder / "mine").write_text("not ours")
    export(small_gpt(), tmp_path / "exported")
    assert set(tmp_path.iterdir()) == {tmp_path / "exported", *theirs}
    assert all((folder / "mine").read_text() == "not ours" for folder in theirs)
    with pytest.raises(ValueError, match="could not write .*choose another --export"):
        export(small_gpt(), tmp_path / ("e" * 250))  # no room for the .tmp
    assert len({p.stat().st_mode for p in (tmp_path / "exported").iterdir()}) == 1  # may be read alike


@pytest.mark.parametrize("where", [".", "hedgehog", "hedgehog/distilled", "hedgehog/finetuned", "softmax",
                                   "softmax/finetuned", "../table/hedgehog"])
def test_an_export_into_the_conversion_is_refused_before_anything_is_made(command, tmp_path, where):
    with pytest.raises(ValueError, match="--export .* is where the conversion itself goes: choose another folder"):
        command("--export", str(tmp_path / "table" / where))
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("where", ["runs/convert-tiny/elu", "runs/tiny-softmax", "runs"])
def test_an_export_into_the_default_folders_is_refused(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is where the conversion itself goes"):
        convert(parse_config(ConvertConfig, PRESETS, ["--attention", "elu", "--export", where], None))
    assert not (tmp_path / "runs").exists()


def test_an_export_beside_the_stages_is_fine(command, tmp_path):
    command("--no-reference", "--export", str(tmp_path / "table/hedgehog/exported"))
    assert load_gpt2(tmp_path / "table/hedgehog/exported").config.attention == "hedgehog"


def huggingface_gpt2(folder, **options):
    """A random GPT-2 of the transformers library, saved by it, with weights large enough for its logits to differ."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=48, **options)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", [
    dict(n_layer=2, n_head=2, n_embd=32), dict(n_layer=3, n_head=5, n_embd=40),
    dict(n_layer=2, n_head=4, n_embd=64, tie_word_embeddings=False),
    *(dict(n_layer=1, n_head=n_head, n_embd=64 * n_head, tie_word_embeddings=tied)        # the widths of GPT-2's four
      for n_head, tied in ((12, True), (16, True), (20, False), (25, True)))])
def test_the_transformers_library_computes_the_same_and_writes_the_same_text(tmp_path, options):
    theirs = huggingface_gpt2(tmp_path / "hub", **options)
    ours, idx = load_gpt2(tmp_path / "hub"), torch.randint(300, (2, 20))
    assert ours.config.tie_head == options.get("tie_word_embeddings", True)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=0, atol=1e-4)
        text = theirs.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0,
                               attention_mask=torch.ones_like(idx))
        assert torch.equal(ours.generate(idx, 20, temperature=0), text) and len(text[0].unique()) > 5
        export(ours, tmp_path / "exported")
        back = type(theirs).from_pretrained(tmp_path / "exported").eval()
        torch.testing.assert_close(back(idx).logits, theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.fixture
def hub_folder(tmp_path):
    """GPT-2's two files, as the hub has them: no prefix, the causal mask as a buffer."""
    model = small_gpt(attention="softmax")
    export(model, tmp_path / "made")
    folder = tmp_path / "gpt2"
    folder.mkdir()
    tensors = {n.removeprefix("transformer."): p for n, p in load_file(tmp_path / "made" / "model.safetensors").items()}
    for i in range(2):
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    del config["hedgehog"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_the_files_of_the_hub_are_read(hub_folder):
    folder, model = hub_folder
    idx = torch.randint(256, (2, 32))
    assert torch.equal(load_gpt2(folder)(idx)[0], model(idx)[0])
    tensors = {name: p.clone() for name, p in load_file(folder / "model.safetensors").items()}  # not mapped
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, folder / "model.safetensors")
    assert torch.equal(load_gpt2(folder)(idx)[0], model(idx)[0])
    for dtype in (torch.float16, torch.bfloat16):
        save_file({name: p.to(dtype) for name, p in tensors.items()}, folder / "model.safetensors")
        assert torch.equal(load_gpt2(folder).lm_head.weight, model.lm_head.weight.to(dtype).float())


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return spoil


def change_config(**values):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | values).items() if v is not ...}))
    return spoil


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def tamper(folder):
    gpt2_weights.save_sha256(folder / "model.safetensors")
    change_tensors(lambda tensors: tensors["wte.weight"].add_(1))(folder)


def tamper_config(folder):
    gpt2_weights.save_sha256(folder / "config.json")
    change_config(n_head=4)(folder)  # which fits every shape


def transpose(tensors):
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"].T.contiguous()


def without(name):
    return lambda folder: (folder / name).unlink()


BAD_FOLDERS = {
    "no weights": (without("model.safetensors"), "has no model.safetensors"),
    "no config": (without("config.json"), "has no config.json"),
    "cut": (cut, "truncated or no safetensors file.*get it again"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_text("<html>"), "truncated or no safetensors file"),
    "tampered": (tamper, "not the file that model.safetensors.sha256"),
    "a tampered config": (tamper_config, "config.json is not the file that config.json.sha256 beside it tells of"),
    "missing": (change_tensors(lambda t: t.pop("h.0.ln_1.bias")),
                r"missing: transformer\.h\.0\.ln_1\.bias; left over: none"),
    "left over": (change_tensors(lambda t: t.update(extra=torch.zeros(1))),
                  r"missing: none; left over: transformer\.extra"),
    "transposed": (change_tensors(transpose), r"another shape: transformer\.h\.1\.mlp\.c_fc\.weight"),
    "not finite": (change_tensors(lambda t: t["ln_f.weight"].fill_(math.nan)), "ln_f.weight.*not finite"),
    "integers": (change_tensors(lambda t: t.update({"wte.weight": t["wte.weight"].int()})),
                 r"not floating-point: transformer\.wte\.weight \(I32\): get the file again"),
    "a head of its own": (change_tensors(lambda t: t.update({"lm_head.weight": t["wte.weight"] + 1})),
                          "tie_word_embeddings"),
    "too many layers": (change_config(n_layer=3), r"missing: transformer\.h\.2.*and 7 more"),
    "no layers": (change_config(n_layer=...), "damaged, or not GPT-2's.*n_layer"),
    "half a token": (change_config(vocab_size=2.5), "config.json: vocab_size is 2.5, it must be a whole number"),
    "less than no layers": (change_config(n_layer=-1), "config.json: n_layer is -1, it must be a whole number"),
    "half a position in ours": (change_config(hedgehog=dict(block_size=2.5)), "config.json: block_size is 2.5, it"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "damaged, or not GPT-2's"),
    "not json": (lambda f: (f / "config.json").write_bytes(b"\xff{"), "damaged, or not GPT-2's"),
    "another gelu": (change_config(activation_function="relu"), "not of a plain GPT-2 .activation_function=relu"),
    "another model": (change_config(model_type="llama"), "not of a plain GPT-2"),
    "another width inside": (change_config(n_inner=99), "not of a plain GPT-2 .n_inner=99"),
    "heads that do not divide": (change_config(n_head=3), "config.json: n_embd=16 must be divisible by n_head=3"),
    "ours that is none": (change_config(hedgehog=3), "damaged, or not GPT-2's"),
}


@pytest.mark.parametrize("spoil, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_folder_that_is_not_whole_is_refused_by_name(hub_folder, command, spoil, words, tmp_path):
    folder, _ = hub_folder
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        command("--teacher", str(folder))
    assert not (tmp_path / "table").exists()


# ---------------------------------------------------------------- the hub, on this machine


class Hub(http.server.BaseHTTPRequestHandler):
    """Redirects a large file to a store, and names its sha256 on the way, as huggingface.co does."""
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        server.requests.append((self.command, self.path, self.headers["Range"]))
        content = server.files.get(name)
        if content is None:
            return self.send_error(404)
        if name == "model.safetensors" and not self.path.startswith("/store"):
            self.send_response(302)
            self.send_header("Location", f"/store/{name}")
            if server.sha256:
                self.send_header("X-Linked-Etag", f'"{server.sha256}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            end = start + server.cuts.pop(0) if name == "model.safetensors" and server.cuts else None
            self.wfile.write(content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(hub_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in hub_folder[0].iterdir()}
    server.sha256 = hashlib.sha256(server.files["model.safetensors"]).hexdigest()
    server.requests, server.cuts = [], []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(gpt2_weights, "HUB", f"http://127.0.0.1:{server.server_port}" + "/{}/resolve/main/{}")
    monkeypatch.setattr(gpt2_weights, "HERE", tmp_path / "here")
    monkeypatch.setattr(convert_gpt2, "GPT2_TOKENS", 256)
    yield server
    server.shutdown()
    server.server_close()


def test_gpt2_is_downloaded_once_in_pieces_and_converted(hub, command, tmp_path, hub_folder):
    hub.cuts = [1000, 2000]
    rows = command("--teacher", "gpt2-medium", "--no-reference", "--steps", "1").rows
    assert [r["stage"] for r in rows] == ["teacher", "swapped", "distilled", "finetuned"]
    folder = tmp_path / "here" / "data" / "gpt2-medium"
    assert [r for _, path, r in hub.requests if "/store" in path] == [None, "bytes=1000-", "bytes=3000-"]
    assert hub.requests[0][1] == "/gpt2-medium/resolve/main/config.json"
    assert {p.name for p in folder.iterdir()} == {name + end for name in hub.files for end in ("", ".sha256")}
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    hub.files = {}
    assert torch.equal(convert_gpt2.load_teacher(ConvertConfig(teacher="gpt2-medium"))[0].lm_head.weight,
                       hub_folder[1].lm_head.weight)


def test_a_file_whose_record_was_not_written_gets_it_at_the_next_use(hub, monkeypatch, tmp_path):
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(gpt2_weights, "save_sha256", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        gpt2_weights.download_teacher("gpt2")
    folder = tmp_path / "here/data/gpt2"
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    gpt2_weights.download_teacher("gpt2")
    assert {p.name for p in folder.iterdir()} == {name + end for name in hub.files for end in ("", ".sha256")}
    (folder / "config.json").write_text("{}")
    gpt2_weights.download_teacher("gpt2")                     # which makes no record of what was changed
    with pytest.raises(ValueError, match="config.json is not the file"):
        load_gpt2(folder)


def test_a_download_that_is_not_what_the_hub_announced_is_refused_and_leaves_no_file(hub, command, tmp_path):
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-1] + b"?"
    with pytest.raises(ValueError, match="another file, or a damaged one.*put it at"):
        command("--teacher", "gpt2")
    assert {p.name for p in (tmp_path / "here/data/gpt2").iterdir()} == {"config.json", "config.json.sha256"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_page_in_place_of_a_file_is_noticed_without_its_sha256_too(hub, command, tmp_path, name):
    hub.files[name], hub.sha256 = b"<html>Log in to this network</html>", None
    with pytest.raises(ValueError, match="another file, or a damaged one"):
        command("--teacher", "gpt2")
    assert not (tmp_path / "here/data/gpt2" / name).exists()


def test_without_a_network_the_message_says_what_to_put_where(command, monkeypatch, tmp_path):
    monkeypatch.setattr(gpt2_weights, "HUB", "http://127.0.0.1:9/{}/{}")
    monkeypatch.setattr(gpt2_weights, "HERE", tmp_path)
    monkeypatch.setattr(convert_gpt2, "GPT2_TOKENS", 256)
    with pytest.raises(ValueError, match=f"get http://.*/gpt2/config.json elsewhere and put it at {tmp_path}/data/"):
        command("--teacher", "gpt2")
    assert not (tmp_path / "data/gpt2").exists()


# ---------------------------------------------------------------- the command line


BAD_FLAGS = {
    "no teacher": (["--teacher", "nowhere"], "no teacher at nowhere: give one of gpt2"),
    "another vocabulary": (["--data", "other"], r"7 different tokens.*the teacher 256 \(bytes\).*--data"),
    "another tokenizer": (["--data", "renamed"], r"256 different tokens \(letters\).*the teacher 256 \(bytes\)"),
    "too long": (["--block-size", "64"], "--block-size 64: the teacher knows 32 positions"),
    "no text": (["--data", "nothing"], "no prepared text in nothing.*prepare.py"),
    "negative": (["--distill-steps", "-1"], "--distill-steps must be at least 0, got -1"),
    "negative lr": (["--distill-lr", "-1"], "--distill-lr must be at least 0"),
    "no batch": (["--distill-batch-size", "0"], "--distill-batch-size must be at least 1"),
    "warmup in steps": (["--warmup", "100"], "--warmup 100.0 is a part of the steps"),
    "accum": (["--accum", "3"], "--batch-size 4 must be a multiple of --accum 3"),
    "no maps": (["--maps", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    "a name that is a path": (["--name", "../elsewhere"], "--name '../elsewhere' must be letters"),
    "the name of the finetuned teacher": (["--name", "softmax"], "softmax that of the finetuned teacher"),
    "the name of the teacher": (["--name", "teacher"], "teacher is the name of the teacher's row"),
    "that name for softmax with a convolution": (
        ["--attention", "softmax", "--short-conv", "3", "--name", "softmax"], "softmax that of the finetuned teacher"),
    "a convolution that nothing trains": (["--short-conv", "3", "--lora-rank", "2"], "leave out one of them"),
    "a convolution of less than nothing": (["--short-conv", "-1"], "--short-conv must be at least 0, got -1"),
    "a window of no layers": (["--window", "8"], "--window 8 is that of the first layers.*--softmax-layers"),
    "layers that are softmax anyway": (["--attention", "softmax", "--softmax-layers", "1"], "changes nothing"),
    "a hybrid of nothing": (["--hybrid-window", "-1"], "hybrid_window=-1 must be at least 0"),
    "a hybrid of softmax": (["--attention", "softmax", "--hybrid-window", "8"], "choose one of hedgehog,.*or no"),
    "a hybrid with an unknown scale": (["--attention", "exp", "--hybrid-window", "8"], "exp beyond do not go together"),
    "no layer left to convert": (["--softmax-layers", "2"], "leaves none of the teacher's 2 layers to hedgehog"),
    "a scale that is no number": (["--map-scale", "nan"], "--map-scale nan must be finite"),
    "a temperature without end": (["--temperature", "inf"], "--temperature inf and"),
    "no prompt": (["--prompt", ""], "--prompt is empty"),
    "a rank that is not low": (["--lora-rank", "17"], "--lora-rank 17 is no low rank for matrices of width 16"),
    "a vocabulary out of reach": (["--data", "far"], "the vocabulary is nowhere"),
    "nothing to resume": (["--resume"], "no conversion at .*leave out --resume"),
}


@pytest.mark.parametrize("flags, words", BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_what_cannot_work_is_told_before_anything_is_written(command, text_dir, tmp_path, monkeypatch, flags, words,
                                                             capsys):
    def far():
        raise prepare.InputError("the vocabulary is nowhere")

    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "valid", "test"):
        np.zeros(100, "<u2").tofile(other / f"{name}.bin")
    meta = json.loads((text_dir / "meta.json").read_text())
    counts = dict.fromkeys(meta["tokens"], 100)
    (other / "meta.json").write_text(json.dumps(meta | dict(vocab_size=7, tokens=counts)))
    for folder, tokenizer in (("renamed", "letters"), ("far", "gpt2")):
        shutil.copytree(text_dir, tmp_path / folder)
        (tmp_path / folder / "meta.json").write_text(json.dumps(meta | dict(tokenizer=tokenizer)))
    monkeypatch.setitem(prepare.TOKENIZERS, "letters", prepare.ByteTokenizer)
    monkeypatch.setitem(prepare.TOKENIZERS, "gpt2", far)
    with pytest.raises(SystemExit) as e:
        cli(lambda: command(*flags))
    assert e.value.code == 2 and re.search(words, capsys.readouterr().err) and not (tmp_path / "table").exists()


@pytest.mark.parametrize("flags, words", [
    (["--teacher", "gpt2"], "256 different tokens.*the teacher 50257"),
    (["--export", "{}/file/exported"], "--export: .*/file/exported cannot be made"),
    (["--out", "{}/file"], "--out: .*/file/hedgehog cannot be made")])
def test_what_needs_no_teacher_is_told_before_one_is_fetched(command, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(convert_gpt2, "load_teacher", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=words):
        command(*[text.format(tmp_path) for text in flags])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_can_be_made_is_neither_left_behind_nor_taken_away(tmp_path):
    (tmp_path / "there/full").mkdir(parents=True)
    for folder in ("new/deep", "there", "there/full"):
        convert_gpt2.check_can_be_made(tmp_path / folder, "--out")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["there", "there/full"]


def test_results_of_another_teacher_are_not_mixed_in_and_other_flags_do_not_resume(command, tmp_path, text_dir):
    command("--no-reference", "--steps", "1")
    other = tmp_path / "other"
    flags = [*MODEL, "--attention", "softmax", "--steps", "0", "--data", str(text_dir), "--out", str(other)]
    train(parse_config(TrainConfig, {}, flags))
    with pytest.raises(ValueError, match="results of another teacher.*--out"):
        command("--teacher", str(other), "--name", "second")
    with pytest.raises(ValueError, match="started with distill_steps=6: leave out --distill-steps"):
        command("--resume", "--distill-steps", "7")
    with pytest.raises(ValueError, match="damaged, or of train_gpt.py"):
        command("--out", str(other))
    (tmp_path / "table" / "hedgehog" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        command("--resume")


def test_an_earlier_conversion_is_moved_aside_and_its_rows_with_it(command, tmp_path, monkeypatch):
    first = command("--no-reference", "--steps", "1").rows
    rows = command("--no-reference", "--steps", "2", "--seed", "1").rows
    table, stages = tmp_path / "table", ["swapped", "distilled", "finetuned"]
    assert json.loads((table / "hedgehog-1" / "config.json").read_text())["config"]["seed"] == 0
    assert rows[:4] == [r | dict(name=r["name"].replace("hedgehog", "hedgehog-1")) for r in first]
    assert [(r["name"], r["stage"]) for r in rows[4:]] == [("hedgehog", stage) for stage in stages]
    assert [r["tokens"] for r in rows if r["stage"] == "finetuned"] == [128, 256]
    assert command("--resume", "--name", "hedgehog-1").rows == rows
    shutil.rmtree(table / "hedgehog")                               # whose rows are not those of another one either
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(convert_gpt2, "interrupts", lambda say: stop_after(1))
        command("--no-reference", "--steps", "3")
    finetuned = command("--resume").find(name="hedgehog", stage="finetuned")
    assert [(r["tokens"], r["resumed"]) for r in finetuned] == [(384, 1)]


def test_a_teacher_of_train_gpt_needs_no_safetensors_and_an_export_says_that_it_does(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # what an import finds when it is not installed
    monkeypatch.delitem(sys.modules, "data.gpt2_weights")
    monkeypatch.delattr(data, "gpt2_weights")
    command("--no-reference", "--steps", "1")
    with pytest.raises(ValueError, match="pip install safetensors"):
        command("--export", str(tmp_path / "exported"))


def test_help_tells_of_what_both_scripts_have_after_what_is_their_own(capsys):
    for config_class, own in ((TrainConfig, "--n-layer"), (ConvertConfig, "--teacher")):
        with pytest.raises(SystemExit):
            parse_config(config_class, PRESETS, ["--help"])
        flags = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M)
        order = [flags.index(f) for f in ("--preset", own, "--eval-every", "--dropout", "--sample-tokens")]
        assert order == sorted(order) and order[0] == 0


def test_several_processes_are_sent_to_train_gpt(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun train_gpt.py --resume"):
        command()


def test_stage_2_begins_with_the_distilled_maps_also_after_a_resumption(command, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    whole = command("--no-reference").rows
    shutil.rmtree(tmp_path / "table")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(convert_gpt2, "train", killed)
        command("--no-reference")
    assert command("--resume").rows[-1]["valid_nats"] == whole[-1]["valid_nats"]


def test_rows_of_a_deleted_folder_do_not_pass_for_those_of_one_moved_to_its_name(command, tmp_path, monkeypatch):
    command("--no-reference")
    command("--no-reference", "--seed", "1")
    for name in ("hedgehog", "hedgehog-1"):
        shutil.rmtree(tmp_path / "table" / name)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(convert_gpt2, "interrupts", lambda say: stop_after(1))
        command("--no-reference", "--seed", "2")
    rows = command("--no-reference", "--seed", "3").find(name="hedgehog-1")
    assert [r["stage"] for r in rows] == ["swapped"]


def test_a_reference_can_be_asked_for_later(command):
    command("--no-reference")
    assert command("--resume", "--reference").find(name="softmax", stage="finetuned")


def test_maps_alone_are_no_model_to_sample_from(command, tmp_path):
    command("--no-reference", "--steps", "0")
    with pytest.raises(ValueError, match="feature maps alone: give the conversion's folder"):
        load_model(tmp_path / "table/hedgehog/distilled/last.pt")
