"""Time and memory of linear attention beside softmax attention and other libraries, map included, in one run.

    python experiments/benchmark.py                    # CPU, float32, 2 threads: runs/benchmark-cpu.json
    python experiments/benchmark.py --device cuda      # bfloat16: runs/benchmark-cuda.json

Writes a list of rows, one for each form, T and pass. "forward" runs without gradients; "forward+backward" gives the
gradients of q, k, v and of the maps' weights. All forms at one T take turns, so that a drift of the machine hits all
alike; `ms` is the median. `peak_mib` is what the pass allocates at its worst moment, beyond its inputs; of a token that
is generated, beyond the model and the past. The past is `state_bytes_per_layer`, and `total_mib` what is allocated for
it in all layers, and the peak: what generation takes beside the model.

Other libraries join when they can be imported, with our feature map in front (`map` in their rows), after a check that
they compute the same:
pytorch-fast-transformers (CPU; build it with `pip install --no-build-isolation pytorch-fast-transformers`, on a machine
with the CUDA compiler only after `nvcc` is off the PATH) and flash-linear-attention (`pip install --no-deps
flash-linear-attention fla-core einops`: on the CPU its plain PyTorch reference, on CUDA its Triton kernels).
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import statistics
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from common import read_rows, ready
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import hedgehog
from hedgehog import GPT, GPTConfig, HybridAttention, LinearAttention
from train_gpt import cli, provenance, save_json, utilisation

MIB = 2**20
# Whose ratios are printed at the end.
PAIRS = (("fused", "softmax"), ("fused, hybrid 64", "softmax"), ("fused", "fla"), ("fused", "chunked"),
         ("chunked", "softmax"), ("chunked, all kept", "softmax"), ("chunked", "fast-transformers"),
         ("chunked", "fla reference"), ("chunked", "fla"))
# Whose map, made where. flash-linear-attention's own (fla.modules.feature_map) is another function: one softmax of both
# halves, one W for all heads.
MAPS = {"fused": "in the kernels", "fla": "ours, by torch.compile, in front of their kernels",
        "fla, features given": "none: q and k are features, of width 2D",
        "fla reference": "ours, in plain PyTorch, in front", "fast-transformers": "ours, in plain PyTorch, in front"}
PACKAGES = {"fused": ["triton"], "fla": ["triton", "flash-linear-attention", "fla-core"],
            "fla reference": ["flash-linear-attention", "fla-core"], "fast-transformers": ["pytorch-fast-transformers"]}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: name -> function of q, k, v (B, H, T, D)


def softmax(q, k, v, backend=None):
    with sdpa_kernel(backend) if backend else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def make_forms(layer, device, peers=True):
    """Our forms, with the maps of `layer` and on CUDA with their weights in the exponential map and in a hybrid with
    softmax over 64 tokens, softmax attention, and with `peers` the libraries on this machine."""
    kept = LinearAttention(layer.map_q.weight.shape[0], layer.map_q.weight.shape[-1], segment_size=0,
                           chunk_size=64 if device == "cpu" else 128)
    kept.map_q, kept.map_k = layer.map_q, layer.map_k
    if device == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                    "efficient": SDPBackend.EFFICIENT_ATTENTION}
        forms = {f"softmax, {name}": functools.partial(softmax, backend=b) for name, b in backends.items()}
        chunked = torch.compile(functools.partial(kept, form="chunked"), fullgraph=True, dynamic=False)
        exponential = LinearAttention(layer.map_q.n_head, layer.map_q.head_dim, "hedgehog_exp").to(device)
        hybrid = HybridAttention(layer.map_q.n_head, layer.map_q.head_dim, window=64).to(device)
        for other in (exponential, hybrid):
            other.map_q.weight, other.map_k.weight = layer.map_q.weight, layer.map_k.weight
        forms |= {"fused": functools.partial(layer, form="auto"), "chunked": chunked,
                  "fused, hedgehog_exp": functools.partial(exponential, form="auto"),
                  "fused, hybrid 64": functools.partial(hybrid, form="auto")}
        return forms | (fla_kernels(layer) if peers else {})
    forms = {"softmax": softmax, "chunked": layer, "chunked, all kept": kept,
             "cumsum": functools.partial(layer, form="cumsum"), "quadratic": functools.partial(layer, form="quadratic")}
    return forms | (fast_transformers(layer) | fla_reference(layer) if peers else {})


def fast_transformers(layer):
    """The CPU kernel of Katharopoulos et al. 2020, and the denominator as in their CausalLinearAttention."""
    try:
        from fast_transformers.causal_product import causal_dot_product
    except ImportError as error:
        print(f"without pytorch-fast-transformers: {error}")
        return {}

    def attend(q, k, v):  # their module also permutes (B, T, H, D) to this layout: left out, in its favour
        q, k = layer.map_q(q, is_query=True), layer.map_k(k)
        z = 1 / (torch.einsum("nhli,nhli->nhl", q, k.cumsum(2)) + 1e-6)
        return causal_dot_product(q, k, v.contiguous()) * z.unsqueeze(-1)
    return {"fast-transformers": attend}


def fla_reference(layer):
    """flash-linear-attention's plain PyTorch reference, from its one file: the package itself imports Triton."""
    try:
        spec = importlib.util.find_spec("fla")
        path = Path(spec.submodule_search_locations[0], "ops/linear_attn/naive.py") if spec else "no package fla"
        spec = importlib.util.spec_from_file_location("fla_naive", path)
        naive = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(naive)
    except (ImportError, OSError, AttributeError) as error:
        print(f"without flash-linear-attention's reference: {error}")
        return {}

    def attend(q, k, v):
        q, k = layer.map_q(q, is_query=True), layer.map_k(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                  # (B, T, H, ...)
        return naive.naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True).transpose(1, 2)
    return {"fla reference": attend}


def fla_kernels(layer):
    """flash-linear-attention's Triton kernels with our map, compiled, and with features that are given."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
    except ImportError as error:
        print(f"without flash-linear-attention: {error}")
        return {}

    @functools.partial(torch.compile, dynamic=False)
    def features(q, k, v):  # what its kernels ask for: (B, T, H, ...), contiguous, one dtype
        return [x.transpose(1, 2).contiguous().to(v.dtype) for x in (layer.map_q(q, is_query=True), layer.map_k(k), v)]

    def attend(q, k, v):
        return chunk_linear_attn(*features(q, k, v), scale=1.0, normalize=True)[0].transpose(1, 2)

    def attend_features(q, k, v):  # q and k stand for both halves of their features, (B, H, T, 2D)
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0]
    attend_features.takes_features = True
    return {"fla": attend, "fla, features given": attend_features}


def origin(form):
    """For a row: where its map is made, and the versions of what made it beside PyTorch."""
    name = form.removeprefix("gpt, ")
    names = (name, name.split(",")[0])
    found = dict(map=next((MAPS[n] for n in names if n in MAPS), None))
    for package in next((PACKAGES[n] for n in names if n in PACKAGES), ()):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {key: value for key, value in found.items() if value}


def held_bytes(form, B, H, T, D, itemsize):
    """The one big tensor of the forms that have one, the formula of the memory they hold. None for the others."""
    per_head = {"cumsum": T * 2 * D * (D + 1), "quadratic": T * T}.get(form)          # (T, P, D+1) and (T, T) numbers
    return per_head and B * H * per_head * itemsize


# ---------------------------------------------------------------------------------------------------------------------
# How it is measured


def time_ms(run, device):
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # about 10 ms in which the CPU gets ahead: its launches are not what is timed
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_mib(run, device):
    """The most that `run` holds at once of what it allocates itself, from the allocator: inputs are not counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    current = peak = 0
    for event in p.profiler.kineto_results.events():
        if event.name() == "[memory]":                     # nbytes is negative where memory is given back
            current += event.nbytes()
            peak = max(peak, current)
    return peak / MIB


def make_run(form, inputs, weights, grad):
    """The forward pass alone where `grad` is None, else forward and backward, as a function without arguments."""
    def forward():
        with torch.no_grad():
            return form(*inputs)

    def both():
        # softmax does not use the maps' weights
        return torch.autograd.grad(form(*inputs), (*inputs, *weights), grad, allow_unused=True)
    return forward if grad is None else both


def random_inputs(B, H, T, D, dtype, device, form=None):
    if getattr(form, "takes_features", False):
        x = [torch.randn(B, T, H, n, device=device).softmax(-1) for n in (2 * D, 2 * D, D)]
    else:
        x = torch.randn(3, B, H, T, D, device=device)
    *qkv, grad = (y.to(dtype) for y in (*x, torch.randn_like(x[2])))
    return [y.clone().requires_grad_() for y in qkv], grad


def check(forms, layer, B, H, T, D, dtype, device):
    """Outputs and gradients of all forms but softmax against ours in float64: a time for a wrong result is none.

    On CUDA at the shape that is timed, so that nothing is compiled twice, against the chunked form.
    """
    if device == "cpu":
        B, T = 1, 128
    inputs, grad = random_inputs(B, H, T, D, dtype, device)
    weights, exact = list(layer.parameters()), [x.detach().double().requires_grad_() for x in inputs]
    expected = {}
    for name, form in forms.items():
        if "softmax" in name or hasattr(form, "takes_features"):
            continue
        ours = form.func if isinstance(getattr(form, "func", None), LinearAttention) else layer
        if ours not in expected:
            oracle = functools.partial(ours, form="quadratic" if device == "cpu" else "chunked")
            expected[ours] = (oracle(*exact), *make_run(oracle, exact, weights, grad.double())())
        got = (form(*inputs), *make_run(form, inputs, weights, grad)())
        for what, a, b in zip(("y", "dq", "dk", "dv", "dW of q", "dW of k"), got, expected[ours], strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if not error < (1e-4 if dtype == torch.float32 else 2e-2):
                raise SystemExit(f"{name} is not our form in float64: {what} differs by {error:.1e} of its norm")


def measure(T, args, common):
    """The rows of all forms at one T."""
    torch.manual_seed(args.seed)
    device, dtype, B, H, D = args.device, getattr(torch, args.dtype), max(1, args.tokens // T), args.heads, args.dim
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 where plain PyTorch stays float32, as in training
    layer = LinearAttention(H, D).to(device)
    forms, weights, rows = make_forms(layer, device, T in args.peers), list(layer.parameters()), []
    if T not in args.peers:
        print(f"T={T}: without other libraries, which join at the lengths of --peers")
    if device == "cuda" and T > 16384:
        print(f"T={T}: without chunked, which torch.compile takes minutes for: its loop over segments is unrolled")
        del forms["chunked"]
    check(forms, layer, B, H, T, D, dtype, device)
    formulas = {name: held_bytes(name, B, H, T, D, dtype.itemsize) for name in forms}
    for name, held in formulas.items():
        if held and held > args.limit_mib * MIB:
            print(f"T={T}: without {name}, whose formula says {held / MIB:,.0f} MiB for its largest tensor alone")
            del forms[name]
    repeats = args.repeats * max(1, min(8, 4096 // T))      # short passes are noisier
    for name_of_pass in ("forward", "forward+backward"):
        runs, ms = {}, {name: [] for name in forms}
        for name, form in forms.items():
            inputs, grad = random_inputs(B, H, T, D, dtype, device, form)
            runs[name] = make_run(form, inputs, weights, grad if "backward" in name_of_pass else None)
        for run in [*runs.values()] * args.warmup:
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                ms[name].append(time_ms(run, device))
        for name, run in runs.items():
            row = {"form": name, "T": T, "pass": name_of_pass, "ms": statistics.median(ms[name]),
                   "ms_min": min(ms[name]), "peak_mib": peak_mib(run, device), "B": B, "repeats": repeats, **common,
                   **origin(name)}
            if formulas[name]:
                row["formula_mib"] = formulas[name] / MIB
            rows.append(row)
        if device == "cuda":  # the row called softmax is that of the fastest backend
            backends = [r for r in rows if r["form"].startswith("softmax, ") and r["pass"] == name_of_pass]
            best = min(backends, key=lambda r: r["ms"])
            rows.append(best | {"form": "softmax", "backend": best["form"].removeprefix("softmax, ")})
    return rows


def pasts_that_fit(batch, n_layer, steps, args):
    """Those positions of args.decode whose keys and values fit on the GPU together, the shortest first."""
    room, pasts = torch.cuda.mem_get_info()[0] * 0.8 if args.device == "cuda" else float("inf"), []
    for p in sorted(args.decode):
        numbers = 2 * n_layer * batch * (p + steps) * args.heads * args.dim
        keys_and_values = numbers * getattr(torch, args.dtype).itemsize
        if keys_and_values > room:
            print(f"batch {batch}: without position {p}, whose {keys_and_values / 2**30:.0f} GiB of keys and values do "
                  "not fit beside the others'")
        else:
            pasts.append(p)
            room -= keys_and_values
    return pasts


@torch.no_grad()
def measure_decoding(batch, args, common):
    """Time for one token after a past of p tokens, by a GPT of two layers; all pasts and both attentions take turns.

    The past is random numbers, and softmax's buffers are as long as it is: a prompt of 64 times 64,000 tokens would
    need more memory than its keys and values. On CUDA this is the GPU's own time, launches hidden. Softmax gets
    FlashAttention there: with torch's default backend every key length took 15 to 30 ms a layer the first time and
    0.06 ms the second (H100, torch 2.11; cuDNN's plans, it seems), and in generation every length is new.
    """
    H, D, n_layer, steps = args.heads, args.dim, 2, args.warmup + args.decode_tokens + 1
    sequences, backend = [], [SDPBackend.FLASH_ATTENTION] if args.device == "cuda" else None
    pasts = pasts_that_fit(batch, n_layer, steps, args)
    for form, attention in (("hedgehog decode", "hedgehog"), ("softmax decode (kv cache)", "softmax")):
        torch.manual_seed(args.seed)
        model = GPT(GPTConfig(max(pasts, default=0) + steps, vocab_size=256, n_layer=n_layer, n_head=H, n_embd=H * D,
                              attention=attention)).to(args.device, getattr(torch, args.dtype)).eval()
        weight = model.lm_head.weight
        for p in pasts:
            cache = model.new_cache()
            for layer in cache:
                if attention == "softmax":
                    layer |= {name: weight.new_empty(batch, H, p + steps, D).normal_() for name in ("k", "v")}
                else:
                    layer["state"] = torch.rand(batch, H, 2 * D, D + 1, device=args.device)
                layer["offset"] = p
            sequences.append((form, p, model, cache, []))
    token = torch.randint(256, (batch, 1), device=args.device)
    for i in range(args.warmup + args.decode_tokens):
        for _, _, model, cache, ms in sequences:
            with sdpa_kernel(backend) if backend else nullcontext():
                ms.append(time_ms(lambda: model(token, cache=cache), args.device))
    rows = []
    for form, p, model, cache, ms in sequences:
        held = sum(x.nbytes for x in cache[0].values() if torch.is_tensor(x))
        used = held if "hedgehog" in form else held * p // (p + steps)
        with sdpa_kernel(backend) if backend else nullcontext():
            peak = peak_mib(lambda: model(token, cache=cache), args.device)
        rows.append({"form": form, "T": p, "pass": "decode", "ms": statistics.median(ms[args.warmup:]),
                     "peak_mib": peak, "total_mib": peak + n_layer * held / MIB, "state_bytes_per_layer": used,
                     "allocated_bytes_per_layer": held, "n_layer": n_layer, "B": batch, "repeats": args.decode_tokens,
                     **common})
        if backend and "softmax" in form:
            rows[-1]["backend"] = "flash"
    return rows


def measure_training(T, args, common):
    """Tokens/s and peak memory of training GPT-2's 124M size, compiled on CUDA; the models take turns, a step each.

    Forward, backward and AdamW in bfloat16 autocast on random tokens. Run in a fresh process: what a compiled model
    keeps would count as memory of the next.
    """
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    if args.device == "cuda":
        torch._dynamo.config.recompile_limit = 64  # all models share one code, of which 8 variants are allowed
    device, n_layer, vocab = args.device, args.train_layers, args.train_vocabulary
    idx = torch.randint(vocab, (max(1, args.tokens // T), T + 1), device=device)
    steps, rows, models = {}, [], []
    kinds = [(form, attention, window) for form in args.train_forms
             for attention in (args.train_attention if form != "softmax" else ["softmax"])
             for window in (args.train_hybrid_window if form != "softmax" else [0])]
    for form, attention, window in kinds:
        name = form if attention in ("softmax", "hedgehog") else f"{form}, {attention}"
        name += f", hybrid {window}" if window else ""
        model = GPT(GPTConfig(T, vocab, n_layer, args.heads, args.heads * args.dim, attention=attention, chunk_size=128,
                              segment_size=0, hybrid_window=window)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        compiled = torch.compile(model, fullgraph=True, dynamic=False) if device == "cuda" else model

        def step(compiled=compiled, optimizer=optimizer, attention=no_kernels if form == "chunked" else nullcontext):
            with torch.autocast(device, torch.bfloat16), attention():
                loss = compiled(idx[:, :-1], idx[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step()  # compiles
        steps[name] = step
        models.append(model)
        weights = sum(p.nbytes for p in model.parameters())
        rows.append({"form": f"gpt, {name}", "T": T, "pass": "training step", "B": idx.shape[0], "n_layer": n_layer,
                     "vocabulary": vocab, "repeats": args.train_steps, **common, **origin(name),
                     "peak_mib": peak_mib(step, device) + 3 * weights / MIB})  # and AdamW's two moments
    seconds = {name: [] for name in steps}
    for _ in range(args.warmup + args.train_steps):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    for row, model, times in zip(rows, models, seconds.values()):
        median = statistics.median(times[args.warmup:])
        rate = idx[:, 1:].numel() / median
        row |= {"ms": 1e3 * median, "tokens_per_second": rate, "mfu": utilisation(model, rate, torch.device(device))}
    return rows


@contextmanager
def no_kernels():
    """A GPU without Triton: chunked, in plain PyTorch, on features in bfloat16, a hybrid's in float32."""
    kernels, hedgehog.fused_kernels = hedgehog.fused_kernels, lambda *_, **__: None
    try:
        yield
    finally:
        hedgehog.fused_kernels = kernels


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# What it says


def findings(rows):
    """Sentences computed from the rows: speed against softmax, from which T on, memory at 1,024, linearity."""
    at = {(r["form"], r["T"], r["pass"]): r for r in rows}
    said = []
    for form, other, name in [(f, o, n) for n in ("forward", "forward+backward") for f, o in PAIRS]:
        ratio = {T: at[other, T, name]["ms"] / r["ms"] for (f, T, n), r in at.items()
                 if (f, n) == (form, name) and (other, T, name) in at}
        if ratio:
            slower = max((T for T in ratio if ratio[T] <= 1), default=0)
            crossover = min((T for T in ratio if T > slower), default=None)
            whose = f" (the map {MAPS[other]})" if other.startswith("fla") else ""
            said.append(f"{name}: {form} against {other}{whose}: "
                        + ", ".join(f"{r:.2f}x at T={T}" for T, r in ratio.items())
                        + (f"; faster from T={crossover} on" if crossover else f"; not faster at T={slower}"))
    mib = {(f, T): r["peak_mib"] for (f, T, n), r in at.items() if n == "forward+backward"}
    for form in ("chunked", "chunked, all kept", "cumsum"):
        if (form, 1024) in mib:
            said.append(f"memory at T=1024, forward+backward: {form} {mib[form, 1024]:.1f} MiB, softmax "
                        f"{mib['softmax', 1024]:.1f} MiB: {mib[form, 1024] / mib['softmax', 1024]:.2f}x")
    Ts = sorted(T for f, T in mib if f == "chunked")
    if len(Ts) > 1:
        a, b = (at["chunked", T, "forward+backward"] for T in Ts[-2:])
        longer, batch = Ts[-1] / Ts[-2], a["B"] / b["B"]
        said.append(f"chunked from T={Ts[-2]} to {Ts[-1]}, {longer:.1f}x the length: {batch * b['ms'] / a['ms']:.2f}x "
                    f"the time a sequence, {batch * b['peak_mib'] / a['peak_mib']:.2f}x the memory")
    for form, batch in sorted({(r["form"], r["B"]) for r in rows if r["pass"] == "decode"}):
        decode = [r for r in rows if (r["form"], r["B"]) == (form, batch)]
        a, b = decode[0], decode[-1]
        said.append(f"{form}, batch {batch}: {a['ms']:.2f} ms a token and {a['state_bytes_per_layer']:,} bytes a layer "
                    f"at position {a['T']:,}, {b['ms']:.2f} ms, {b['state_bytes_per_layer']:,} bytes at {b['T']:,}: "
                    f"{b['ms'] / a['ms']:.2f}x the time")
    for form, T in [(f, T) for f, T, n in at if n == "training step" and f != "gpt, softmax"]:
        a, b = at[form, T, "training step"], at.get(("gpt, softmax", T, "training step"))
        if b:
            said.append(f"training at T={T}: {form} {a['tokens_per_second']:,.0f} tokens/s, "
                        f"{a['tokens_per_second'] / b['tokens_per_second']:.2f}x softmax's "
                        f"{b['tokens_per_second']:,.0f}, with {a['peak_mib'] / b['peak_mib']:.2f}x the memory")
    return said


def table(rows):
    lines = [f"{'form':26} {'T':>6} {'pass':17} {'ms':>9} {'peak MiB':>9} {'with past':>9} {'formula':>9}"]
    for r in rows:
        numbers = (f"{r[key]:9.2f}" if key in r else " " * 9 for key in ("ms", "peak_mib", "total_mib", "formula_mib"))
        lines.append(f"{r['form']:26} {r['T']:6} {r['pass']:17} {' '.join(numbers)}".rstrip())
    return "\n".join(lines)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--T", type=int, nargs="*", help="lengths (default: 256 to 8192 on the CPU, 512 to 65536 on CUDA)")
    add("--peers", type=int, nargs="*", help="lengths at which other libraries join (default: all, on CUDA 1024 4096 "
        "16384: flash-linear-attention tunes itself for a minute at each); at others their rows are missing")
    add("--long", action="store_true", help="add T=16384 on the CPU")
    add("--tokens", type=int, help="B is this over T, at least 1 (default: 1 on the CPU, 32768 on CUDA)")
    add("--heads", type=int, default=12)
    add("--dim", type=int, default=64, help="width of a head")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0, help="of the random inputs and weights")
    add("--repeats", type=int, default=11, help="turns of every form at T >= 4096; up to 8 times as many below")
    add("--warmup", type=int, default=2)
    add("--limit-mib", type=float, default=512, help="leave a form out where its largest tensor would be larger")
    add("--decode", type=int, nargs="*",
        help="positions at which generation is timed (default: 100 1000 10000, on CUDA 1000 4000 16000 64000)")
    add("--decode-tokens", type=int, default=60)
    add("--decode-batch", type=int, nargs="+", help="default: 1, on CUDA 1 and 64")
    add("--train", type=int, nargs="*", help="lengths at which a GPT is trained (default: 1024 4096 16384 on CUDA)")
    add("--train-forms", nargs="+", default=("softmax", "fused"), choices=("softmax", "fused", "chunked"))
    add("--train-attention", nargs="+", default=("hedgehog",), choices=("hedgehog", "hedgehog_exp"),
        help="maps of the forms but softmax, each a model")
    add("--train-hybrid-window", type=int, nargs="+", default=(0,),
        help="tokens that every layer of those sees by softmax, the map having the older ones, each a model; 0: none")
    add("--train-layers", type=int, default=12)
    add("--train-vocabulary", type=int, default=50304, help="GPT-2's 50257 on a multiple of 64 (default: %(default)s)")
    add("--train-steps", type=int, default=15, help="turns of every model")
    add("--out", help="default: runs/benchmark-DEVICE.json; what it holds of other lengths and passes is kept")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU here")
    cpu = args.device == "cpu"
    if args.T is None:
        args.T = [2**n for n in (range(8, 15 if args.long else 14) if cpu else range(9, 17))]
    args.peers = args.peers if args.peers is not None else args.T if cpu else [1024, 4096, 16384]
    args.tokens = args.tokens or (1 if cpu else 32768)
    args.train = ([] if cpu else [1024, 4096, 16384]) if args.train is None else args.train
    args.decode = ([100, 1000, 10000] if cpu else [1000, 4000, 16000, 64000]) if args.decode is None else args.decode
    args.decode_batch = args.decode_batch or ([1] if cpu else [1, 64])
    args.dtype = "float32" if cpu else "bfloat16"
    args.out = args.out or f"runs/benchmark-{args.device}.json"
    return args


def main(argv=None):
    args = parse(argv)
    out = ready(args.out)
    before = read_rows(out)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)       # for fast_transformers, which brings its own OpenMP
    torch.set_num_threads(args.threads)
    common = {"H": args.heads, "D": args.dim, "dtype": args.dtype, "threads": args.threads, "seed": args.seed,
              "date": datetime.datetime.now().isoformat(timespec="seconds"), **provenance(torch.device(args.device))}
    rows = []

    def add(new):
        """Keep what is measured, at once; it takes the place of older rows of the same length and pass."""
        measured = {(r["T"], r["pass"]) for r in (*rows, *new)}
        rows.extend(new)
        kept = [r for r in before if (r["T"], r["pass"]) not in measured]
        save_json(out, sorted(kept + rows, key=lambda r: ("forward" not in r["pass"], r["T"])))

    # flash-linear-attention's autotuner does not know of T: on CUDA every T gets a fresh process.
    fresh = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) if args.device == "cuda" else None
    with fresh or nullcontext():
        for T in args.T:
            print(f"{time.strftime('%X')} T={T} ...", flush=True)
            add(fresh.apply(measure, (T, args, common)) if fresh else measure(T, args, common))
        for T in args.train:
            print(f"{time.strftime('%X')} training at T={T} ...", flush=True)
            add(fresh.apply(measure_training, (T, args, common)) if fresh else measure_training(T, args, common))
    if args.decode:
        for batch in args.decode_batch:
            add(measure_decoding(batch, args, common))
    print(table(rows), *findings(rows), f"written to {out}", sep="\n")


if __name__ == "__main__":
    cli(main, out_of_memory="lower --tokens, or leave the largest --T out")
