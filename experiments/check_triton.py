"""Check the fused kernels on this GPU: forward and every gradient against the quadratic form in float64.

    python experiments/check_triton.py                 # about two minutes; exit code 1 if anything is out of bounds
    compute-sanitizer --tool memcheck  python experiments/check_triton.py --small
    compute-sanitizer --tool racecheck python experiments/check_triton.py --small

Errors are relative: |ours - exact| / |exact|. For bfloat16 and float16 the bound is twice what rounding alone costs: of
the inputs (the exact function of rounded inputs against that of the inputs) or of the result, whichever is more.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the top-level files are not an installed package
from hedgehog import linear_attention  # noqa: E402
from hedgehog_triton import fused_attention  # noqa: E402
from train_gpt import provenance  # noqa: E402

NAMES = ("y", "state", "dq", "dk", "dv", "dwq", "dwk", "dbq", "dbk", "dstate")


def exact(q, k, v, wq, wk, bq, bk, state):
    """The quadratic form in the dtype of its inputs, a head at a time to save memory."""
    def phi(x, w, b):
        u = x if w is None else x @ w + b[:, None]
        return x if w is None else torch.cat((u.softmax(-1), (-u).softmax(-1)), -1)
    q, k = phi(q, wq, bq), phi(k, wk, bk)
    v1 = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    if q.shape[2] > 4096:  # (T, T) weights do not fit: chunks, in float64
        return linear_attention(q, k, v, state=state, return_state=True)
    y = (q @ k.mT).tril() @ v1 + q @ state
    return y[..., :-1] / y[..., -1:], state + k.mT @ v1


def fused(q, k, v, wq, wk, bq, bk, state):
    return fused_attention(q, k, v, wq, wk, bq, bk, state, return_state=True)


def values_and_gradients(function, inputs, cotangents):
    """[y, state, gradients of all inputs], None where the input is None."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y, state = function(*inputs)
    loss = (y.double() * cotangents[0]).sum() + (state.double() * cotangents[1]).sum()
    grads = iter(torch.autograd.grad(loss, [x for x in inputs if x is not None]))
    return [y.detach(), state.detach(), *(None if x is None else next(grads) for x in inputs)]


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


def check(B, H, T, D, dtype, P=None, magnitude=1.0, poison=True):
    """One row: the shape and the worst error of every output, in units of its bound."""
    torch.manual_seed(B * H * T + D)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float64)  # noqa: E731
    # As they come out of the projection: views of one (B, T, 3, H, D) tensor, heads not contiguous.
    q, k, v = (magnitude * make(B, T, 3, H, P or D)).permute(2, 0, 3, 1, 4)
    v = v[..., :D]
    maps = [None] * 4
    if P is None:
        maps = [torch.eye(D, device="cuda", dtype=torch.float64) + 0.3 / D ** 0.5 * make(H, D, D) for _ in range(2)]
        maps += [0.3 * make(H, D) for _ in range(2)]
    else:
        q, k = q.abs(), k.abs()
    state = make(B, H, P or 2 * D, D + 1).abs()
    inputs, cotangents = [q, k, v, *maps, state], (make(B, H, T, D), make(B, H, P or 2 * D, D + 1))
    rounded = [x if x is None or i == 7 else x.to(dtype).double() for i, x in enumerate(inputs)]
    reference = values_and_gradients(exact, rounded, cotangents)
    if poison:  # memory that the outputs are likely to land in holds NaN, so that an element left out is seen
        for _ in range(3):
            torch.full((B * H * T * D * 8 // 4 + 1024,), torch.nan, device="cuda")
    mixed = [None if x is None else x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(rounded)]
    ours = values_and_gradients(fused, mixed, cotangents)
    again = values_and_gradients(fused, mixed, cotangents)
    if dtype == torch.float32:
        bounds = [1e-4] * len(NAMES)
    else:
        unrounded = values_and_gradients(exact, inputs, cotangents)
        written = lambda n, a: a.to(dtype) if n in ("y", "dq", "dk", "dv") else a  # noqa: E731
        bounds = [0.0 if a is None else 2 * max(error(a, b), error(written(n, a), a))
                  for n, a, b in zip(NAMES, reference, unrounded)]
    errors = {n: error(a, b) for n, a, b in zip(NAMES, ours, reference) if a is not None}
    ratios = {n: errors[n] / max(bound, 1e-12) for (n, bound) in zip(NAMES, bounds) if n in errors and bound}
    identical = all(torch.equal(a, b) for a, b in zip(ours, again) if a is not None)
    worst = max(ratios, key=ratios.get)
    finite = all(a.isfinite().all().item() for a in ours if a is not None)
    return dict(B=B, H=H, T=T, D=D, P=P, dtype=str(dtype)[6:], magnitude=magnitude, errors=errors, of_bound=ratios,
                worst=worst, identical=identical, ok=finite and identical and ratios[worst] <= 1)


def cases(small):
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    if small:
        return [(1, 2, 70, D, dtype) for D in (32, 64) for dtype in (bf16, fp32)] + [(1, 2, 70, 64, bf16, 128)]
    rows = [(1, 2, T, D, dtype) for dtype in (bf16, fp32) for D in (32, 64, 128)
            for T in (1, 15, 16, 17, 63, 64, 65, 127, 1000, 1024)]
    rows += [(B, H, 200, 64, dtype) for dtype in (bf16, fp32) for B, H in ((1, 1), (3, 5), (8, 12), (32, 12))]
    rows += [(1, 2, T, 64, dtype) for dtype in (bf16, fp32) for T in (4096, 32768)]
    rows += [(1, 2, 200, 64, fp16), (1, 2, 200, 128, fp16)]
    rows += [(2, 3, 333, 64, dtype, P) for dtype in (bf16, fp32) for P in (32, 64, 128, 256)]
    return rows + [(1, 2, 200, 64, dtype, None, 100.0) for dtype in (bf16, fp32)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few small shapes, for compute-sanitizer")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "triton-check.json")
    options = parser.parse_args()
    rows = []
    for case in cases(options.small):
        try:
            rows.append(check(*case))
        except Exception as e:  # the others are still worth knowing
            worst = f"{type(e).__name__}: {str(e)[:300]}"
            rows.append(dict(case=str(case), ok=False, worst=worst, identical=None, errors={}))
        row = rows[-1]
        if not row["ok"] or options.small:
            print(case[:4], str(case[4])[6:], case[5:], "ok" if row["ok"] else "FAILED", row["worst"],
                  f"identical={row['identical']}", {n: f"{e:.1e}" for n, e in row["errors"].items()}, flush=True)
    about = provenance(torch.device("cuda"))
    if not options.small:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([dict(row, **about) for row in rows], indent=1) + "\n")
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    sys.exit(failed > 0)
