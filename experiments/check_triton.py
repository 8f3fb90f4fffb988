"""Check the fused kernels on this GPU: forward and every gradient against the quadratic form in float64.

    python experiments/check_triton.py --workers 12    # minutes, most of them compiling; exit code 1 if anything is off
    compute-sanitizer --tool memcheck  --log-file memcheck.log  python experiments/check_triton.py --small
    compute-sanitizer --tool racecheck --log-file racecheck.log python experiments/check_triton.py --small

The last two take a few shapes of a few KiB. Each tensor gets memory of its own from CUDA there, and gives it back at
once, so that an access beyond its end is seen, and memory does not run out. What the sanitizer found is the end of its
log; with --out FILE the rows are kept, too, and say under which sanitizer (its command line) they were made.

Errors are relative: |ours - exact| / |exact|; a gradient that is zero must be below 2 % of |dv|. For bfloat16 and
float16 the bound is twice what rounding alone costs: of the inputs, the incoming gradient among them (exact results
for rounded inputs against those for the inputs), or of the result, whichever is more. For float32 it is 1e-4. Each case
runs twice at least, and all runs must agree to the last bit. A row holds each error over its bound (`of_bound`) and,
for bfloat16 and float16, over what rounding the inputs alone costs (`of_inputs`). The latter decides nothing: below 1
the kernels add less than their inputs have lost.
"""

import argparse
import contextlib
import itertools
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the top-level files are not an installed package
from hedgehog import FUSED_MAPS, HybridAttention, LinearAttention, divide, safe_exp  # noqa: E402
from train_gpt import provenance, save_json  # noqa: E402

if torch.cuda.is_available():  # PyTorch's CPU build has no Triton; that there is no GPU is told at the end of the file
    from hedgehog_triton import fused_attention

NAMES = ("y", "state", "dq", "dk", "dv", "dwq", "dwk", "dbq", "dbk", "dstate")
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32


def phi(x, w, b, kind, is_query=False):
    if w is None:
        return x
    u = x @ w if b is None else x @ w + b[:, None]
    if kind == "hedgehog":
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), -1)
    return safe_exp(torch.cat((u, -u), -1), is_query)


def weigh(q, k, v, start):
    """Rows of the quadratic form, from `start` on."""
    return (q @ k.mT).tril(start) @ v


def exact(q, k, v, wq, wk, bq, bk, state, kind, numbers=2**25):
    """The quadratic form in the dtype of its inputs, by blocks of rows, of which only one holds its weights at a time,
    `numbers` of them at most."""
    q, k = phi(q, wq, bq, kind, is_query=True), phi(k, wk, bk, kind)
    v1 = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    B, H, T, _ = q.shape
    n = max(1, numbers // (B * H * T))
    y = torch.cat([checkpoint(weigh, q[:, :, t:t + n], k[:, :, :t + n], v1[:, :, :t + n], t, use_reentrant=False)
                   for t in range(0, T, n)], 2)
    S = k.mT @ v1
    if state is not None:
        y, S = y + q @ state, S + state
    return divide(y[..., :-1], y[..., -1:], 1e-30), S  # as in linear_attention: below it a row attends to nothing


def fused(q, k, v, wq, wk, bq, bk, state, kind):
    """Without a state, as in training, none is asked for either: other kernels run."""
    y = fused_attention(q, k, v, wq, wk, bq, bk, state, return_state=state is not None, kind=kind)
    return y if state is not None else (y, None)


def values_and_gradients(function, inputs, cotangents, kind, unit):
    """{name: y, state or gradient of an input}, of those there are. `unit`: what a key's features are like, which the
    given state and the gradient of the last must be like, too: beside e^30 they would not be seen."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y, state = function(*inputs[:-1], None if inputs[-1] is None else unit * inputs[-1], kind)
    loss = (y.double() * cotangents[0]).sum()
    if inputs[-1] is not None:
        loss = loss + (state.double() / unit * cotangents[1]).sum()
    grads = iter(torch.autograd.grad(loss, [x for x in inputs if x is not None]))
    state = None if inputs[-1] is None else state.detach()
    found = y.detach(), state, *(None if x is None else next(grads) for x in inputs)
    return {name: x for name, x in zip(NAMES, found) if x is not None}


def error(a, b, other=None):
    """`other`: what to measure by where b is zero but for rounding, as dq and dk are at T = 1."""
    scale = b.norm() if other is None or b.norm() > 1e-9 * other.norm() else other.norm()
    return ((a.double() - b).norm() / scale.clamp(min=1e-30)).item()


def poison(numbers):
    """NaN where outputs of as many numbers are likely to land, so that an element left out is seen."""
    [torch.full((2 * numbers + 1024,), torch.nan, device="cuda") for _ in range(3)]  # held at once, then given up


def judge(case, dtype, results, reference, unrounded=None):
    """The row of a case, from {name: tensor} of each run, of the exact function of the rounded inputs, and where that
    makes the bound, not for float32, of the exact function of the inputs as they were."""
    bounds, of_rounding, dv = dict.fromkeys(reference, 1e-4), {}, reference["dv"]
    if dtype != fp32:
        for n, a in reference.items():
            bounds[n] = 0.02
            if a.norm() > 1e-9 * dv.norm():
                written = a.to(dtype) if n in ("y", "dq", "dk", "dv") else a
                of_rounding[n] = error(a, unrounded[n])                                   # of the inputs alone
                bounds[n] = 2 * max(of_rounding[n], error(written, a))
    errors = {n: error(results[0][n], a, dv) for n, a in reference.items()}
    ratios = {n: errors[n] / max(bound, 1e-12) for n, bound in bounds.items()}
    of_inputs = {n: errors[n] / max(rounding, 1e-12) for n, rounding in of_rounding.items()}
    identical = all(torch.equal(a, again[n]) for again in results[1:] for n, a in results[0].items())
    finite, worst = all(a.isfinite().all().item() for a in results[0].values()), max(ratios, key=ratios.get)
    return dict(case=case, runs=len(results), worst=worst, of_bound=ratios, of_inputs=of_inputs, errors=errors,
                identical=identical, ok=finite and identical and ratios[worst] <= 1)


def check(B, H, T, D, dtype, P=None, magnitude=1.0, full=True, kind="hedgehog", runs=2):
    """One row: the shape and the worst error of every output against its bound. `full`: with biases and a state."""
    torch.manual_seed(B * H * T + D)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float64)  # noqa: E731
    # As they come out of the projection: views of one (B, T, 3, H, D) tensor, heads not contiguous.
    q, k, v = (magnitude * make(B, T, 3, H, P or D)).permute(2, 0, 3, 1, 4)
    v = v[..., :D] if P is None or P >= D else magnitude * make(B, T, H, D).transpose(1, 2)
    wq = wk = bq = bk = state = None
    if P is None:
        wq, wk = (torch.eye(D, device="cuda", dtype=torch.float64) + 0.3 / D ** 0.5 * make(H, D, D) for _ in range(2))
        bq, bk = (0.3 * make(H, D) for _ in range(2)) if full else (None, None)
    else:
        q, k = q.abs(), k.abs()
    unit = 1.0
    if full:
        state = make(B, H, P or 2 * D, D + 1).abs()
        if kind == "hedgehog_exp":  # where one feature is all of a query, no denominator may be next to zero
            unit, state = phi(k, wk, bk, kind).mean(), 1 + state
    inputs, cotangents = [q, k, v, wq, wk, bq, bk, state], (make(B, H, T, D), make(B, H, P or 2 * D, D + 1))
    rounded = [x if x is None or i == 7 else x.to(dtype).double() for i, x in enumerate(inputs)]
    given = cotangents[0].to(dtype).double(), cotangents[1]
    reference = values_and_gradients(exact, rounded, given, kind, unit)
    mixed = [None if x is None else x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(rounded)]
    results = []
    for _ in range(runs):
        poison(B * H * T * D)
        results.append(values_and_gradients(fused, mixed, given, kind, unit))
    unrounded = None if dtype == fp32 else values_and_gradients(exact, inputs, cotangents, kind, unit)
    case = (f"B={B} H={H} T={T} D={D} P={P} {str(dtype)[6:]}" + f", {kind}" * (kind != "hedgehog")
            + ", biases and state" * full + f", magnitude {magnitude:g}" * (magnitude != 1))
    return judge(case, dtype, results, reference, unrounded)


def small_cases():
    maps = itertools.product((32, 64), (bf16, fp32), (False, True), FUSED_MAPS)
    rows = [(1, 2, 70, D, dtype, None, 1.0, full, kind) for D, dtype, full, kind in maps] + [(1, 2, 70, 64, bf16, 128)]
    return rows + [partial(hybrid, 90, window, dtype, "hedgehog") for dtype in (bf16, fp32) for window in (9, 64)]


def cases():
    """Lists of cases that compile the same kernels."""
    lengths = (1, 15, 16, 17, 63, 64, 65, 127, 1000, 1024, 4096, 32768)
    for dtype, D, full, kind in itertools.product((bf16, fp32, fp16), (64, 128, 32), (False, True), FUSED_MAPS):
        # float16 runs the kernels of float32. Lengths that 16 divides are compiled once more.
        few = (17, 200, 1000) if dtype == fp16 and (D != 64 or full) else lengths
        # At T = 1 more sequences: a query that is nearly one feature has next to no gradient, but roundings like all.
        rows = [(1 if T > 1 else 16, 2, T, D, dtype, None, 1.0, full, kind) for T in few]
        # Nearly all features as large or as small as they can be; of the exponential map, at 10, also only a few.
        rows += [(1, 2, 200, D, dtype, None, x, full, kind) for x in ((100.0, 10.0) if "exp" in kind else (100.0,))]
        rows += [(2, 4, 2001, D, dtype, None, 1.0, full, kind, 10)]
        if D == 64:
            rows += [(B, H, 200, D, dtype, None, 1.0, full, kind) for B, H in ((1, 1), (3, 5), (8, 12), (32, 12))]
        if D == 64 and dtype == bf16:
            rows += [(32, 12, 1024, D, dtype, None, 1.0, full, kind)]
        yield rows
    given = [(dtype, 64, P) for dtype in (bf16, fp32) for P in (32, 64, 128, 256)]
    for dtype, D, P in (*given, (fp16, 64, 128), (bf16, 32, 32), (bf16, 128, 128), (bf16, 128, 256)):
        yield [(2, 3, T, D, dtype, P, 1.0, full) for T in (65, 333) for full in (False, True)]


def check_all(rows):
    out = []
    for case in rows:
        try:
            out.append(case() if callable(case) else check(*case))
        except Exception as e:  # the others are still worth knowing
            out.append(dict(case=str(case), ok=False, worst=f"{type(e).__name__}: {str(e)[:300]}", identical=None,
                            errors={}))
        torch.cuda.empty_cache()  # float64 references take several GiB, and each worker would keep them
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The logarithm of the denominators, and the hybrid that needs it


def compare(case, ours, exact, inputs, outputs, dtype, runs=2):
    """A row as `check` makes it. ours, exact: functions of `inputs` (name -> float64) that return a dict of `outputs`.
    Of the inputs q, k, v are given in `dtype`, the maps' weights rounded to it."""
    torch.manual_seed(1)
    narrow = lambda name, x: x.to(dtype) if name in ("q", "k", "v") else x.float()  # noqa: E731
    rounded = {n: x.to(dtype).double() if n in ("q", "k", "v") or n.endswith("weight") else x.float().double()
               for n, x in inputs.items()}

    def run(function, given):
        given = {n: x.detach().requires_grad_() for n, x in given.items()}
        found = function(**given)
        loss = sum((found[n].double() * g).sum() for n, g in cotangents.items())
        grads = torch.autograd.grad(loss, list(given.values()))
        return {n: y.detach() for n, y in found.items()} | {f"d{n}": g for n, g in zip(given, grads)}
    cotangents = {n: torch.randn(shape, device="cuda", dtype=torch.float64) for n, shape in outputs.items()}
    unrounded = None if dtype == fp32 else run(exact, inputs)
    cotangents["y"] = cotangents["y"].to(dtype).double()
    results = []
    for _ in range(runs):
        poison(inputs["q"].numel())
        results.append(run(ours, {n: narrow(n, x) for n, x in rounded.items()}))
    return judge(case, dtype, results, run(exact, rounded), unrounded)


def raw(H, T, D, seed=0):
    """q, k, v as they come out of the projection, views of one tensor, in float64."""
    torch.manual_seed(seed)
    return dict(zip("qkv", torch.randn(2, T, 3, H, D, device="cuda", dtype=torch.float64).permute(2, 0, 3, 1, 4)))


def log_den(T, D, dtype, kind):
    """y and the logarithm of its denominators, gradients through both."""
    inputs = raw(3, T, D)
    for name in ("q_weight", "k_weight"):
        x = torch.randn(3, D, D, device="cuda", dtype=torch.float64)
        inputs[name] = torch.eye(D, device="cuda", dtype=torch.float64) + 0.3 / D ** 0.5 * x

    def ours(q, k, v, q_weight, k_weight):
        return dict(zip(("y", "log_den"), fused_attention(q, k, v, q_weight, k_weight, kind=kind, return_log_den=True)))

    def definition(q, k, v, q_weight, k_weight):
        y, _ = exact(q, k, v, q_weight, k_weight, None, None, None, kind)
        weights = (phi(q, q_weight, None, kind, True) @ phi(k, k_weight, None, kind).mT).tril()
        top = (q @ q_weight).detach().abs().amax(-1) if kind == "hedgehog_exp" else 0.0   # what phi(q) was divided by
        return dict(y=y, log_den=weights.sum(-1).log() + top)
    return compare(f"T={T} D={D} {str(dtype)[6:]}, {kind}, log_den", ours, definition, inputs,
                   dict(y=(2, 3, T, D), log_den=(2, 3, T)), dtype)


def hybrid(T, window, dtype, kind, D=64, H=3, runs=2, state=False):
    """HybridAttention against itself in float64, which is plain PyTorch; with `state`, what a prompt leaves, too."""
    inputs = raw(H, T, D)
    layer = HybridAttention(H, D, kind, bias=True, window=window, segment_size=0).to(device="cuda")
    parameters = {n: p.detach().double() + 0.3 / D ** 0.5 * torch.randn(p.shape, device="cuda", dtype=torch.float64)
                  for n, p in layer.named_parameters()}
    parameters["map_gate_bias"] += 5                                                      # what is old counts, too
    # The gate's affine function as one input, (H, D+1): rounding may move three sums of both signs by next to nothing.
    gate = torch.cat((parameters.pop("map_gate"), parameters.pop("map_gate_bias").unsqueeze(1)), dim=1)
    names = {n.replace(".", "_"): n for n in parameters}

    def run(q, k, v, gate, **given):
        given = {names[n]: x for n, x in given.items()} | dict(map_gate=gate[:, :-1], map_gate_bias=gate[:, -1])
        if not state:
            return dict(y=functional_call(layer, given, (q, k, v)))
        y, left = functional_call(layer, given, (q, k, v), dict(return_state=True))
        return dict(y=y, **dict(zip(("last_k", "last_v", "state"), left)))
    shapes = dict(y=(2, H, T, D))
    if state:
        shapes |= dict(last_k=(2, H, window, D), last_v=(2, H, window, D + 1), state=(2, H, 2 * D, D + 1))
    return compare(f"H={H} T={T} D={D} {str(dtype)[6:]}, {kind}, hybrid, window {window}" + ", its state" * state, run,
                   run, inputs | {n: parameters[names[n]] for n in names} | dict(gate=gate), shapes, dtype, runs)


def hybrid_cases():
    for dtype, kind in itertools.product((bf16, fp32), FUSED_MAPS):
        yield [partial(log_den, T, D, dtype, kind) for D in (64, 128) for T in (65, 1000, 1024)]
        yield [partial(hybrid, T, window, dtype, kind) for window in (64, 100) for T in (65, 1000, 1024, 4096)
               if T > window]
    for kind in FUSED_MAPS:
        yield [partial(hybrid, T, 200, bf16, kind) for T in (201, 1000)] + [partial(hybrid, 1000, 64, fp16, kind)]
        yield [partial(hybrid, 200, window, dtype, kind) for window in (2, 16) for dtype in (bf16, fp32)]
        yield [partial(hybrid, 200, 1, fp32, kind), partial(hybrid, 1000, 64, bf16, kind, runs=10),
               partial(hybrid, 1000, 64, bf16, kind, H=100), partial(hybrid, 1000, 64, bf16, kind, H=1)]
        yield [partial(hybrid, 32768, 64, bf16, kind)]
        yield [partial(hybrid, T, 64, dtype, kind, state=True) for dtype in (bf16, fp16, fp32) for T in (65, 1000)]
        yield [partial(hybrid, T, 64, dtype, kind, D) for D in (32, 128) for dtype in (bf16, fp32) for T in (70, 1000)]


# ---------------------------------------------------------------------------------------------------------------------
# What a single comparison does not show


def same(case, pairs, bound=0.0):
    """A row that says how far apart tensors are that should be the same, or within `bound`."""
    errors = {name: error(a, b.double()) for name, a, b in pairs}
    worst = max(errors, key=errors.get)
    return dict(case=case, ok=errors[worst] <= bound, worst=worst, errors=errors, bound=bound)


def split_and_resume(kind="hedgehog"):
    """Two calls that hand over a state, against one."""
    torch.manual_seed(0)
    layer = LinearAttention(12, 64, kind).cuda()
    q, k, v = torch.randn(3, 2, 12, 1000, 64, device="cuda", dtype=bf16)
    with torch.no_grad():
        y, end = layer(q, k, v, "auto", return_state=True)
        y1, state = layer(*(x[:, :, :333] for x in (q, k, v)), "auto", return_state=True)
        y2, state = layer(*(x[:, :, 333:] for x in (q, k, v)), "auto", state=state, return_state=True)
    return same(f"split at 333 of 1,000, {kind}", [("y", torch.cat((y1, y2), 2), y), ("state", state, end)], 4e-3)


def compiled(kind="hedgehog", window=0):
    """torch.compile in one graph against eager: under autocast, which casts q and v; and without gradients."""
    torch.manual_seed(0)
    layer = (partial(HybridAttention, window=window) if window else LinearAttention)(4, 64, kind).cuda()
    x, k, v = torch.randn(3, 2, 4, 200, 64, device="cuda")

    def run(function):
        q = x.clone().requires_grad_()
        with torch.autocast("cuda", bf16):
            y = function(q, k.to(bf16), v, "auto")
        return y, *torch.autograd.grad(y.float().square().sum(), (q, layer.map_q.weight, layer.map_k.weight))
    whole = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        y = whole(*(z.to(bf16) for z in (x, k, v)), "auto")
    pairs = [*zip(("y", "dq", "dwq", "dwk"), run(whole), run(layer)), ("y without gradients", y, run(layer)[0])]
    case = f"torch.compile(fullgraph=True), autocast, {kind}" + f", hybrid, window {window}" * (window > 0)
    row = same(case, pairs, 4e-3 if window else 0.0)  # gradients have two parts, the sum may be rounded twice
    return row | dict(ok=row["ok"] and y.dtype == run(layer)[0].dtype == bf16)


def fallback(D=48):
    """A width without kernels: in one graph, by PyTorch, and said once."""
    torch.manual_seed(0)
    layer, x = LinearAttention(2, D).cuda(), torch.randn(3, 1, 2, 100, D, device="cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = layer(*x, "chunked")
        row = same(f"D={D} falls back, compiled and not", [("y compiled", whole(*x), y), ("y", layer(*x), y)], 1e-5)
    times = sum("without the fused kernels" in str(w.message) for w in said)
    return row | dict(ok=row["ok"] and times == 1, said=times)


def on_another_gpu():
    """Tensors on the second GPU while the first is the current one: the same bits as on the first."""
    torch.manual_seed(0)
    first = [torch.randn(2, 4, 200, 64, device="cuda:0", dtype=bf16) for _ in range(3)]
    first += [torch.eye(64, device="cuda:0").repeat(4, 1, 1) for _ in range(2)]
    results = []
    for device in ("cuda:0", "cuda:1"):
        x = [y.to(device).requires_grad_() for y in first]
        y = fused_attention(*x)
        results.append([z.to("cuda:0") for z in (y, *torch.autograd.grad(y.float().square().sum(), x))])
    return same("on the second of two GPUs", zip(("y", "dq", "dk", "dv", "dwq", "dwk"), *results))


def past_2_to_31_elements(B=32768 + 2, H=16, T=64, D=64):
    """Tensors of more than 2^31 elements: the last sequences against the same ones by themselves."""
    torch.manual_seed(0)
    w = torch.eye(D, device="cuda").repeat(H, 1, 1)
    q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=bf16).transpose(1, 2).requires_grad_() for _ in range(3))
    do = torch.randn(B, T, H, D, device="cuda", dtype=bf16).transpose(1, 2)
    y = fused_attention(q, k, v, w, w)
    whole = [y[-2:].detach(), *(g[-2:].clone() for g in torch.autograd.grad(y, (q, k, v), do))]
    del y
    q, k, v = (x.detach()[-2:].requires_grad_() for x in (q, k, v))
    y = fused_attention(q, k, v, w, w)
    alone = [y, *torch.autograd.grad(y, (q, k, v), do[-2:])]
    return same(f"B={B} H={H} T={T} D={D}: {B * H * T * D:,} elements", [*zip(("y", "dq", "dk", "dv"), whole, alone)])


def window_past_2_to_31_elements(B=32768 + 2, H=16, T=64, D=64, W=32):
    """The same of a hybrid's window and its join with what is older."""
    torch.manual_seed(0)
    gate, bias, window = torch.randn(H, D, device="cuda") / 8, torch.zeros(H, device="cuda"), torch.ops.hedgehog.window
    x = [torch.randn(B, t, H, D, device="cuda", dtype=bf16).transpose(1, 2) for t in (T, T, T, T - W)]
    x.append(torch.randn(B, H, T - W, device="cuda"))
    do = torch.randn(B, T, H, D, device="cuda", dtype=bf16).transpose(1, 2)
    results = []
    for end in (x, [y[-2:] for y in x]):
        end = [y.detach().requires_grad_() for y in end]
        y = window(*end, gate, bias, W)[0]
        results.append([z[-2:].clone() for z in (y.detach(), *torch.autograd.grad(y, end, do[-len(y):]))])
    return same(f"window {W}, B={B} H={H} T={T} D={D}: {B * H * T * D:,} elements",
                zip(("y", "dq", "dk", "dv", "dfar", "dlog_den"), *results))


def past_2_to_31_in_time(T=2**25 + 100, D=64):
    """One head of more than 2^31 elements: its end against a second call that begins with the state before it."""
    torch.manual_seed(0)
    w = torch.eye(D, device="cuda")[None]
    q, k, v = (torch.randn(1, 1, T, D, device="cuda", dtype=bf16) for _ in range(3))
    with torch.no_grad():
        y, end = fused_attention(q, k, v, w, w, return_state=True)
        _, state = fused_attention(*(x[:, :, :-1000] for x in (q, k, v)), w, w, return_state=True)
        tail, state = fused_attention(*(x[:, :, -1000:] for x in (q, k, v)), w, w, state=state, return_state=True)
    return same(f"B=1 H=1 T={T} D={D}: {T * D:,} elements", [("y", y[:, :, -1000:], tail), ("state", end, state)], 4e-3)


def sanitizer():
    """The command line of the compute-sanitizer that runs this process, None without one. From Linux's list."""
    pid = os.getppid()
    with contextlib.suppress(OSError):
        while pid:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if Path(words[0]).name == "compute-sanitizer":
                return " ".join(("compute-sanitizer", *words[1:])).strip()
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])  # its parent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a few small shapes, for compute-sanitizer")
    parser.add_argument("--hybrid", action="store_true", help="the logarithm of the denominators and the hybrid alone")
    parser.add_argument("--workers", type=int, default=4, help="processes, which compile at the same time")
    parser.add_argument("--out", type=Path, help="the rows; default: those in experiments/results/triton-check.json, "
                        "and with --small or --hybrid none")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here, on which the kernels are to be checked")
    if options.small:
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read when the first tensor is made
        rows = check_all(small_cases())
        for row in rows:
            print(row["case"], "ok" if row["ok"] else "FAILED", row["worst"], flush=True)
    else:
        groups = [*([] if options.hybrid else cases()), *hybrid_cases()]
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            rows = [row for group in tqdm(pool.map(check_all, groups), total=len(groups)) for row in group]
        specials = [partial(compiled, kind, window=64) for kind in FUSED_MAPS]
        if not options.hybrid:
            specials += [partial(special, kind) for special in (split_and_resume, compiled) for kind in FUSED_MAPS]
            specials += [fallback] + [on_another_gpu] * (torch.cuda.device_count() > 1)
            specials += [past_2_to_31_elements, window_past_2_to_31_elements, past_2_to_31_in_time]
        for special in specials:
            torch.compiler.reset()  # which gives up after 8 variants of one function
            try:
                rows.append(special())
            except Exception as e:
                rows.append(dict(case=str(special), ok=False, worst=f"{type(e).__name__}: {str(e)[:300]}"))
            torch.cuda.empty_cache()
        if not options.hybrid:
            options.out = options.out or ROOT / "experiments" / "results" / "triton-check.json"
    if options.out:
        about = dict(sanitizer=sanitizer(), **provenance(torch.device("cuda")))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        save_json(options.out, [row | about for row in rows])
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        print("FAILED", row["case"], row["worst"], {n: f"{e:.1e}" for n, e in row.get("errors", {}).items()},
              row.get("of_bound", {}).get(row["worst"]), "identical", row.get("identical"))
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed")
    sys.exit(len(failed) > 0)


if __name__ == "__main__":
    main()
