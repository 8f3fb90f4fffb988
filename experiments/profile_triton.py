"""What bounds each fused kernel? Times from torch's profiler, counters from Nsight Compute, floors by counting bytes.

    python experiments/profile_triton.py              # on a GPU, with ncu on the PATH; a minute
    python experiments/profile_triton.py --csv FILE   # from an earlier `ncu --csv --page raw`, without running it

One forward and backward pass of the benchmark's shape at T = 1,024, the map included. A row a kernel, in
results/triton-ncu.json: `least_mb` is what this design has to read and write once, `floor_ms` the time of that at
3.0 TB/s, which a copy reaches on an H100, and `of_floor` is floor_ms / ms. ncu lowers the clock (`ncu_ghz`), so `ms`
is the profiler's.
"""

import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS

from hedgehog import LinearAttention
from train_gpt import provenance, save_json

B, H, T, D, L = 32, 12, 1024, 64, 64  # L: tokens of a chunk
TB_PER_S = 3.0
STATE = (2 * D * D * 2 + 2 * D * 4) / L  # bytes a token of S and z, or R and its z, written for every chunk
TILE = D * 2  # bytes a token of q, k, v, y or a gradient of theirs, in bfloat16
NUMBER = 4  # of a denominator or delta
LEAST = {  # bytes that must be read and written, a token and head
    "forward_kernel": 4 * TILE + NUMBER,                         # q, k, v, y; den
    "states_kernel": 5 * TILE + 2 * NUMBER + 2 * STATE,          # k, v; q, do, y; den, delta; S and R
    "grad_kv_kernel": 6 * TILE + 2 * NUMBER + STATE,             # q, k, v, do, dk, dv; den, delta; R
    "grad_q_kernel": 5 * TILE + 2 * NUMBER + STATE,              # q, k, v, do, dq; den, delta; S
}
COUNTERS = {  # name in the rows -> (ncu's name, what it is divided by)
    "dram_read_mb": ("dram__bytes_read.sum", 1e6),
    "dram_written_mb": ("dram__bytes_write.sum", 1e6),
    "dram_busy_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "tensor_percent": ("sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", 1),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "warps_per_multiprocessor": ("sm__warps_active.avg.per_cycle_active", 1),
    "instructions": ("smsp__inst_executed.sum", 1),
    "registers_per_thread": ("launch__registers_per_thread", 1),
    "shared_kib_per_program": ("launch__shared_mem_per_block_dynamic", 1024),
    "ncu_us": ("gpu__time_duration.sum", 1e3),
    "ncu_ghz": ("smsp__cycles_elapsed.avg.per_second", 1e9),
}
STALL = "smsp__pcsamp_warps_issue_stalled_"
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1, "us": 1e3, "ms": 1e6, "Mhz": 1e6, "Ghz": 1e9,
         "Kbyte/block": 1e3, "byte/block": 1, "cycle/nsecond": 1e9, "cycle/usecond": 1e6, "cycle/second": 1}


def passes():
    """A function that runs one forward and backward pass."""
    torch.manual_seed(0)
    layer = LinearAttention(H, D).cuda()
    q, k, v, g = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)] + list(layer.parameters())
    return lambda: torch.autograd.grad(layer(*inputs[:3]), inputs, g)


def milliseconds(run, repeats=10):
    """{kernel: mean ms of a launch}"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return {e.key: e.device_time_total / e.count / 1e3 for e in profile.key_averages() if e.key in LEAST}


def counters(text):
    """{kernel: {counter: value}} of ncu's CSV, whose second line has the units."""
    lines = text[text.index('"ID"'):]
    units, *launches = csv.DictReader(io.StringIO(lines))
    found = {}
    for launch in launches:
        values = {key: float(x.replace(",", "")) * UNITS.get(units[key], 1) for key, x in launch.items()
                  if key and x and x.replace(",", "").replace(".", "").replace("-", "").isdigit()}
        row = {name: round(values[key] / by, 4) for name, (key, by) in COUNTERS.items() if key in values}
        stalls = {key.removeprefix(STALL): x for key, x in values.items()
                  if key.startswith(STALL) and not key.endswith("not_issued")}
        total = sum(stalls.values()) or 1
        row["stall_samples_percent"] = {key: round(100 * x / total, 1) for key, x in
                                        sorted(stalls.items(), key=lambda item: -item[1]) if x > 0.02 * total}
        found[launch["Kernel Name"].split("(")[0]] = row
    return found


def main(args):
    run = passes()
    run(), torch.cuda.synchronize()                              # compiles
    if args.once:
        torch.cuda.profiler.start()
        run(), torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    ms = milliseconds(run)
    if args.csv:
        text = args.csv.read_text()
    else:
        command = ["ncu", "--set", "detailed", "--page", "raw", "--csv", "--profile-from-start", "off",
                   sys.executable, __file__, "--once"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        args.out.with_suffix(".csv").write_text(text)
    about = dict(shape=f"B={B} H={H} T={T} D={D} bfloat16, map included", **provenance(torch.device("cuda")))
    rows = []
    for kernel, least in LEAST.items():
        megabytes = least * B * H * T / 1e6
        floor = megabytes / TB_PER_S / 1e3
        rows.append(dict(kernel=kernel, ms=round(ms[kernel], 4), least_mb=round(megabytes, 1),
                         floor_ms=round(floor, 4), of_floor=round(floor / ms[kernel], 3),
                         **counters(text).get(kernel, {}), **about))
        print({key: rows[-1][key] for key in ("kernel", "ms", "least_mb", "floor_ms", "of_floor")})
    save_json(args.out, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="counters that ncu wrote before")
    parser.add_argument("--out", type=Path, default=RESULTS / "triton-ncu.json")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    main(parser.parse_args())
