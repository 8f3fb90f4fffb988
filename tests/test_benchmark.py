"""The benchmark at toy size, and its memory probe against a count by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import benchmark  # noqa: E402
import profile_triton  # noqa: E402

import hedgehog  # noqa: E402

TOY = "--T 64 128 --heads 2 --dim 8 --repeats 1 --warmup 1 --decode 5 10 --decode-tokens 2 --threads 1".split()


@pytest.fixture(scope="module", autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "deeper" / "rows.json"
    benchmark.main([*TOY, "--out", str(out)])
    return json.loads(out.read_text())


def test_every_row_says_what_was_measured_and_how(rows):
    for row in rows:
        assert {"form", "T", "pass", "ms", "B", "H", "D", "dtype", "threads", "repeats", "device", "torch", "command",
                "commit", "date"} <= row.keys()
        assert row["ms"] > 0 and row["peak_mib"] > 0 and (row["pass"] != "decode" or "state_bytes_per_layer" in row)
    measured = {(row["form"], row["T"], row["pass"]) for row in rows}
    assert len(measured) == len(rows)
    assert measured >= {(form, T, name) for form in ("softmax", "chunked", "chunked, all kept", "cumsum", "quadratic")
                        for T in (64, 128) for name in ("forward", "forward+backward")}


def test_generation_keeps_the_bytes_that_the_formula_says(rows):
    held = {(row["form"], row["T"]): row["state_bytes_per_layer"] for row in rows if row["pass"] == "decode"}
    H, D = 2, 8
    assert held["hedgehog decode", 5] == held["hedgehog decode", 10] == 4 * H * 2 * D * (D + 1)
    assert [held["softmax decode (kv cache)", p] for p in (5, 10)] == [4 * 2 * H * D * p for p in (5, 10)]


def test_the_total_of_generation_is_the_past_and_the_peak_beside_it(rows):
    for row in (row for row in rows if row["pass"] == "decode"):
        past = 2 * row["allocated_bytes_per_layer"] / 2**20                               # of two layers
        assert row["allocated_bytes_per_layer"] >= row["state_bytes_per_layer"] and row["total_mib"] == (
            pytest.approx(past + row["peak_mib"]))
    line = next(line for line in benchmark.table(rows).splitlines() if " decode " in line and "kv cache" not in line)
    assert len(line.split()) == 7 and "with past" in benchmark.table(rows)                # ms, the peak, and the total


def test_ms_is_the_median_of_the_turns_after_the_warm_up(monkeypatch):
    args = benchmark.parse([*TOY, "--decode", "5", "--decode-tokens", "3"])               # at T = 128 eight turns
    monkeypatch.setattr(benchmark, "time_ms", lambda run, device: next(squares))
    squares = (float(i * i) for i in range(10**6))
    rows = [row for row in benchmark.measure(128, args, {}) if row["pass"] == "forward"]
    assert rows[0]["ms"] == len(rows) ** 2 * (3**2 + 4**2) / 2 and rows[0]["ms_min"] == 0
    squares = (float(i * i) for i in range(10**6))
    rows = benchmark.measure_decoding(1, args, {})                                        # 0 4 16 36, and 1 9 25 49
    assert [row["ms"] for row in rows] == [16, 25]


@pytest.mark.parametrize("flags", ["--T 16 --decode", "--T --decode 3",
                                   "--T --decode --train 16 --train-layers 1 --train-steps 1 --train-forms softmax"])
def test_the_seed_is_that_of_every_random_number(flags, tmp_path):
    benchmark.main([*TOY, *flags.split(), "--seed", "7", "--out", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert torch.initial_seed() == 7 and {row["seed"] for row in rows} == {7}
    torch.manual_seed(0)


def test_a_past_that_is_filled_in_is_as_long_as_it_says(monkeypatch):
    args = benchmark.parse([*TOY, "--decode", "5", "12"])
    caches, f = [], benchmark.GPT.forward

    def forward(self, x, cache):
        caches.append(cache)
        return f(self, x, cache=cache)
    monkeypatch.setattr(benchmark.GPT, "forward", forward)
    rows = benchmark.measure_decoding(3, args, {})
    assert [(row["T"], row["B"]) for row in rows] == [(5, 3), (12, 3)] * 2
    steps = args.warmup + args.decode_tokens + 1
    for row, cache in zip(rows, caches, strict=False):                # the first token of each sequence
        assert [layer["offset"] for layer in cache] == [row["T"] + steps] * 2
        for x in cache[0].values():
            assert not torch.is_tensor(x) or x.isfinite().all()


def test_pasts_whose_keys_and_values_do_not_fit_together_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = benchmark.parse(["--device", "cuda"])
    assert [benchmark.pasts_that_fit(batch, 2, 63, args) for batch in (1, 64)] == [[1000, 4000, 16000, 64000]] * 2
    assert benchmark.pasts_that_fit(256, 2, 63, args) == [1000, 4000, 16000]
    assert "without position 64000, whose 94 GiB" in capsys.readouterr().out


def test_rows_say_whose_map_and_with_which_versions(monkeypatch):
    monkeypatch.setattr(benchmark.importlib.metadata, "version", lambda package: f"1 of {package}")
    assert benchmark.origin("chunked") == {}
    assert benchmark.origin("gpt, fused, hedgehog_exp") == {"map": "in the kernels", "triton": "1 of triton"}
    fla, given = benchmark.origin("fla"), benchmark.origin("fla, features given")
    assert "ours, by torch.compile" in fla["map"] and "none" in given["map"]
    assert fla["flash-linear-attention"] == given["flash-linear-attention"] == "1 of flash-linear-attention"
    made = [{"form": form, "T": 64, "pass": "forward", "ms": 1.0, "B": 1, "peak_mib": 1.0} for form in ("fused", "fla")]
    assert "fused against fla (the map ours, by torch.compile, in front of their kernels): 1.00x" in "\n".join(
        benchmark.findings(made))


def test_findings_are_computed_from_the_rows():
    speed = {"softmax": {1024: 10.0, 2048: 40.0}, "chunked": {1024: 20.0, 2048: 20.0}}
    made = [{"form": form, "T": T, "pass": "forward+backward", "ms": ms, "B": 1,
             "peak_mib": 3.0 if form == "chunked" else 2.0}
            for form, times in speed.items() for T, ms in times.items()]
    said = "\n".join(benchmark.findings(made))
    assert "0.50x at T=1024, 2.00x at T=2048; faster from T=2048 on" in said
    assert "chunked 3.0 MiB, softmax 2.0 MiB: 1.50x" in said
    assert "2.0x the length: 1.00x the time" in said


def test_memory_probe_counts_what_is_held_at_the_worst_moment():
    x = torch.zeros(256, 1024)                                        # 1 MiB, an input: not counted

    def three_then_one():
        y = torch.cat((x, x))                                         # 2 MiB
        z = x + 1                                                     # 1 MiB more: 3 MiB held
        del y, z
        return x * 2                                                  # 1 MiB: below the peak
    assert benchmark.peak_mib(three_then_one, "cpu") == pytest.approx(3.0, abs=0.01)


def test_a_form_too_large_for_the_limit_is_left_out_with_its_formula(tmp_path, capsys):
    benchmark.main([*TOY, "--limit-mib", "0.1", "--T", "128", "--peers", "64", "--decode", "--out",
                    str(tmp_path / "rows.json")])
    said = capsys.readouterr().out
    assert "without cumsum, whose formula says" in said
    assert "T=128: without other libraries, which join at the lengths of --peers" in said
    assert "cumsum" not in {row["form"] for row in json.loads((tmp_path / "rows.json").read_text())}


def test_a_wrong_form_is_not_timed():
    layer = benchmark.LinearAttention(2, 8)
    with pytest.raises(SystemExit, match="is not our form"):
        benchmark.check({"wrong": lambda q, k, v: layer(q, k, v) * 1.01}, layer, 1, 2, 128, 8, torch.float32, "cpu")


def test_help_and_a_missing_gpu():
    run = [sys.executable, "experiments/benchmark.py"]
    assert "--device" in subprocess.run([*run, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kernels = [[sys.executable, f"experiments/{name}_triton.py"] for name in ("check", "profile")]
    if not torch.cuda.is_available():
        for command in ([*run, "--device", "cuda"], *kernels):
            failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert failed.returncode == 2 and "sees no GPU" in failed.stderr


def test_rows_go_to_runs_or_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    assert benchmark.parse([]).out == "runs/benchmark-cpu.json"
    monkeypatch.setattr(benchmark, "measure", lambda *args: pytest.fail("it measures already"))
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="other.json holds no table of rows"):
        benchmark.main([*TOY, "--out", str(tmp_path / "other.json")])
    with pytest.raises(ValueError, match="cannot write --out .*file/rows.json"):
        benchmark.main([*TOY, "--out", str(tmp_path / "file" / "rows.json")])


def test_rows_of_other_lengths_and_passes_are_kept(tmp_path):
    out = tmp_path / "rows.json"
    benchmark.main([*TOY, "--T", "16", "--decode", "--out", str(out)])
    first = json.loads(out.read_text())
    benchmark.main([*TOY, "--T", "16", "24", "--decode", "--out", str(out)])
    second = json.loads(out.read_text())
    assert {row["T"] for row in second} == {16, 24} and not any(row in second for row in first)
    benchmark.main([*TOY, "--T", "--decode", "3", "--out", str(out)])
    assert json.loads(out.read_text())[:len(second)] == second


def test_training_is_measured_beside_softmax(tmp_path, capsys, monkeypatch):
    out, trained = tmp_path / "rows.json", []
    monkeypatch.setattr(benchmark, "GPT",
                        lambda c, make=benchmark.GPT: trained.append((c.attention, c.hybrid_window)) or make(c))
    benchmark.main(["--T", "--decode", "--train", "16", "--train-layers", "1", "--train-steps", "1", "--warmup", "1",
                    "--heads", "1", "--dim", "8", "--tokens", "16", "--train-forms", "softmax", "chunked",
                    "--train-attention", "hedgehog", "hedgehog_exp", "--train-hybrid-window", "0", "4",
                    "--out", str(out)])
    rows = {row["form"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["gpt, softmax", "gpt, chunked", "gpt, chunked, hybrid 4", "gpt, chunked, hedgehog_exp",
                          "gpt, chunked, hedgehog_exp, hybrid 4"]
    assert trained == [("softmax", 0), ("hedgehog", 0), ("hedgehog", 4), ("hedgehog_exp", 0), ("hedgehog_exp", 4)]
    assert all(row["tokens_per_second"] > 0 and row["peak_mib"] > 0 and "mfu" in row for row in rows.values())
    said = capsys.readouterr().out
    assert "training at T=16: gpt, chunked" in said and "training at T=16: gpt, chunked, hedgehog_exp" in said


def test_training_without_kernels_is_what_a_machine_without_triton_does():
    layer, (q, k, v) = hedgehog.LinearAttention(2, 32), torch.randn(3, 1, 2, 8, 32)
    kernels = hedgehog.fused_kernels
    with benchmark.no_kernels():
        assert hedgehog.fused_kernels(v, 32, True) is None
        assert torch.equal(layer(q, k, v), layer(q, k, v, form="chunked"))
    assert hedgehog.fused_kernels is kernels


def test_counters_of_ncu_become_rows_with_floors():
    columns = {key: "1,000" for key, _ in profile_triton.COUNTERS.values()} | {"gpu__time_duration.sum": "400,000"}
    columns |= {f"{profile_triton.STALL}wait": "30", f"{profile_triton.STALL}barrier": "10",
                f"{profile_triton.STALL}wait_not_issued": "99"}
    lines = ["==PROF== a line of its own"]
    lines += [",".join(f'"{x}"' for x in row) for row in (
        ["ID", "Kernel Name", *columns], ["", "", *["byte"] * len(columns)],
        *([str(i), kernel, *columns.values()] for i, kernel in enumerate((*profile_triton.LEAST, "another"))))]
    rows = {row["kernel"]: row for row in profile_triton.table("\n".join(lines), dict(device="none"))}
    assert rows.keys() == profile_triton.LEAST.keys()
    forward = rows["forward_kernel"]
    assert forward["ms"] == 0.4 and forward["dram_read_mb"] == 0.001 and forward["device"] == "none"
    assert forward["least_mb"] == round(32 * 12 * 1024 * (4 * 128 + 4) / 1e6, 1)       # q, k, v, y of 128 bytes, den
    assert forward["of_floor"] == round(forward["least_mb"] / 3000 / 0.4, 3)
    assert forward["stall_samples_percent"] == {"wait": 75.0, "barrier": 25.0}
