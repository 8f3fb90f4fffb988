"""What bounds each fused kernel? Time and counters from Nsight Compute (ncu, in the PATH), floors by counting bytes.

    python experiments/profile_triton.py    # on a GPU; a minute

One forward and backward pass of the benchmark's shape at T = 1,024, the map included, and one of the window of a
hybrid. A row a kernel, in results/triton-ncu.json: `least_mb` is what this design has to read and write once,
`floor_ms` the time of that at 3.0 TB/s, which a copy reaches on an H100, and `of_floor` is floor_ms / ms.
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

B, H, T, D, L, W = 32, 12, 1024, 64, 64, 64  # L: tokens of a chunk, W: of the window
TB_PER_S = 3.0
STATE = (2 * D * D * 2 + 2 * D * 4) / L  # bytes a token of S and z, or R and its z, written for every chunk
TILE = D * 2  # bytes a token of q, k, v, y or a gradient of theirs, in bfloat16
NUMBER = 4  # of a denominator or delta
WEIGHTS = D * D * 4 / (8 * L)  # of dW, a float32 matrix for every 8 chunks
LEAST = {  # bytes that must be read and written, a token and head
    "forward_kernel": 4 * TILE + NUMBER,                         # q, k, v, y; den
    "states_kernel": 5 * TILE + 2 * NUMBER + 2 * STATE,          # k, v; q, do, y; den, delta; S and R
    "grad_kv_kernel": 6 * TILE + 2 * NUMBER + STATE + WEIGHTS,   # q, k, v, do, dk, dv; den, delta; R; dW
    "grad_q_kernel": 5 * TILE + 2 * NUMBER + STATE + WEIGHTS,    # q, k, v, do, dq; den, delta; S; dW
    # The hybrid's, as if all tokens had a past beyond the window: log_den, log_total; and dlog_den, delta.
    "window_kernel": 5 * TILE + 2 * NUMBER,                      # q, k, v, far, y
    "window_grad_q_kernel": 8 * TILE + 4 * NUMBER + D * 4 / L,   # q, k, v, far, y, do, dq, dfar; dgate
    "window_grad_kv_kernel": 6 * TILE + 2 * NUMBER,              # q, k, v, do, dk, dv
}
COUNTERS = {  # name in the rows -> (ncu's name, what it is divided by)
    "dram_read_mb": ("dram__bytes_read.sum", 1e6),
    "dram_written_mb": ("dram__bytes_write.sum", 1e6),
    "dram_busy_percent": ("dram__cycles_active.avg.pct_of_peak_sustained_elapsed", 1),
    "tensor_percent": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1),
    "issue_percent": ("sm__issue_active.avg.pct_of_peak_sustained_elapsed", 1),
    "warps_per_multiprocessor": ("sm__warps_active.avg.per_cycle_active", 1),
    "instructions": ("smsp__inst_executed.sum", 1),
    "registers_per_thread": ("launch__registers_per_thread", 1),
    "shared_kib_per_program": ("launch__shared_mem_per_block_dynamic", 1024),
    "spill_requests": ("derived__local_spilling_requests", 1),
    "ms": ("gpu__time_duration.sum", 1e6),
    "ghz": ("smsp__cycles_elapsed.avg.per_second", 1e9),
}
STALL = "smsp__pcsamp_warps_issue_stalled_"


def passes():
    """A function that runs one forward and backward pass of the attention, and one of a hybrid's window."""
    torch.manual_seed(0)
    layer = LinearAttention(H, D).cuda()
    q, k, v, g = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)] + list(layer.parameters())
    far = torch.randn(B, T - W, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    others = (torch.randn(*shape, device="cuda") for shape in ((B, H, T - W), (H, D), (H,)))  # log_den, gate, its bias
    near = [x.detach().requires_grad_() for x in (q, k, v, far, *others)]

    def run():
        torch.autograd.grad(layer(*inputs[:3]), inputs, g)
        torch.autograd.grad(torch.ops.hedgehog.window(*near, W)[0], near, g)
    return run


def counters(text):
    """{kernel: {counter: value}} of ncu's raw page as CSV. Its line of units is left out: --print-units base."""
    _, *launches = csv.DictReader(io.StringIO(text[text.index('"ID"'):]))
    found = {}
    for launch in launches:
        value = {key: float(launch[key].replace(",", "")) for key in launch
                 if key in dict(COUNTERS.values()) or key.startswith(STALL) and not key.endswith("not_issued")}
        row = {name: round(value[key] / by, 4) for name, (key, by) in COUNTERS.items()}
        stalls = {key.removeprefix(STALL): x for key, x in value.items() if key.startswith(STALL)}
        share = {key: round(100 * x / sum(stalls.values()), 1) for key, x in stalls.items()}
        row["stall_samples_percent"] = dict(sorted(share.items(), key=lambda item: -item[1])[:7])
        found[launch["Kernel Name"]] = row
    return found


def table(text, about):
    rows, found = [], counters(text)
    for kernel, least in LEAST.items():
        row, megabytes = found[kernel], least * B * H * T / 1e6
        floor = megabytes / TB_PER_S / 1e3
        rows.append(dict(kernel=kernel, ms=row["ms"], least_mb=round(megabytes, 1), floor_ms=round(floor, 4),
                         of_floor=round(floor / row["ms"], 3)) | row | about)
    return rows


def main(args):
    run = passes()
    run(), torch.cuda.synchronize()                              # compiles
    if args.once:
        torch.cuda.profiler.start()
        run(), torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    command = ["ncu", "--set", "detailed", "--page", "raw", "--csv", "--print-units", "base", "--profile-from-start",
               "off", "--clock-control", "none", sys.executable, __file__, "--once"]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = table(text, dict(shape=f"B={B} H={H} T={T} D={D} bfloat16, map included")
                 | provenance(torch.device("cuda")))
    for row in rows:
        print(*(f"{key} {row[key]}" for key in ("kernel", "ms", "floor_ms", "of_floor", "ghz")))
    save_json(args.out, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "triton-ncu.json")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here, on which the kernels are to be profiled")
    main(options)
