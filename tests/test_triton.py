"""The fused kernels against float64, in Triton's interpreter (conftest.py). On a GPU: experiments/check_triton.py."""

import contextlib
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton's interpreter needs numpy < 2.4", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hedgehog
import hedgehog_triton
from hedgehog import LinearAttention, linear_attention, safe_exp

NAMES = ("q", "k", "v", "wq", "wk", "bq", "bk", "state")


def make(B, H, T, D, P=None, state=False, bias=False, magnitude=1.0):
    torch.manual_seed(0)
    widths = dict(q=P or D, k=P or D, v=D)
    x = {name: magnitude * torch.randn(B, T, H, n).transpose(1, 2) for name, n in widths.items()}
    if P is None:
        x |= {name: torch.eye(D) + 0.3 * torch.randn(H, D, D) for name in ("wq", "wk")}
        if bias:
            x |= {name: 0.3 * torch.randn(H, D) for name in ("bq", "bk")}
    else:
        x["q"], x["k"] = x["q"].abs(), x["k"].abs()
    if state:
        x["state"] = torch.rand(B, H, P or 2 * D, D + 1)
    return x


def features(x, w, b, kind, is_query):
    u = x @ w if b is None else x @ w + b.unsqueeze(-2)
    if kind == "hedgehog":
        return torch.cat((u.softmax(-1), (-u).softmax(-1)), -1)
    return safe_exp(torch.cat((u, -u), -1), is_query)


def exact(q, k, v, wq=None, wk=None, bq=None, bk=None, state=None, kind="hedgehog"):
    if wq is not None:
        q, k = features(q, wq, bq, kind, True), features(k, wk, bk, kind, False)
    return linear_attention(q, k, v, "chunked", state=state, return_state=True)


def fused(**x):
    return hedgehog_triton.fused_attention(**x, return_state=True)


def outputs_and_gradients(function, x, cotangents, **options):
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    y, state = function(**x, **options)
    loss = (y.double() * cotangents[0]).sum() + (state.double() * cotangents[1]).sum()
    return [y, state, *torch.autograd.grad(loss, list(x.values()))]


@pytest.mark.parametrize("shape", [
    dict(B=1, H=2, T=70, D=32, bias=True),             # a ragged last chunk
    dict(B=2, H=1, T=40, D=32, state=True),
    dict(B=1, H=1, T=17, D=128, magnitude=4.0),        # columns of v in two blocks; the map by PyTorch
    dict(B=1, H=1, T=45, D=64, P=32, state=True),      # features given
    dict(B=1, H=1, T=2, D=32),
    dict(B=1, H=1, T=40, D=32, magnitude=10.0),        # u from -60 to 60: beyond 30 a key's exponential stays at e^30
])
@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("segmented", [False, True])
def test_values_and_every_gradient_equal_the_definition(shape, kind, segmented, monkeypatch):
    if segmented:  # as on a GPU that a few heads cannot fill
        monkeypatch.setattr(hedgehog_triton, "segments", lambda programs, T, L, *_: (L, -(-T // L)))
        monkeypatch.setattr(hedgehog_triton, "CHUNKS_PER_PROGRAM", 1)
    x = make(**shape)
    B, H, T, D = x["v"].shape
    cotangents = torch.randn(B, H, T, D).double(), torch.randn(B, H, shape.get("P") or 2 * D, D + 1).double()
    ours = outputs_and_gradients(fused, x, cotangents, kind=kind)
    true = outputs_and_gradients(exact, {name: value.double() for name, value in x.items()}, cotangents, kind=kind)
    for name, a, b in zip(("y", "last state", *x), ours, true, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), name


def test_a_row_without_weight_is_zero_with_zero_gradient():
    x = make(1, 1, 5, 32, P=32)
    x["q"][:, :, 2] = 0
    q = x["q"].requires_grad_()
    y = hedgehog_triton.fused_attention(**x)
    y.sum().backward()
    assert (y[:, :, 2] == 0).all() and (q.grad[:, :, 2] == 0).all() and q.grad[:, :, 3].abs().sum() > 0


def test_a_denominator_that_is_not_a_number_shows():
    x = make(1, 2, 40, 32, state=True)
    x["state"][:, 1, :, -1] = torch.nan
    ours, definition = fused(**x)[0], exact(**x)[0]
    assert ours[:, 1].isnan().all() and definition[:, 1].isnan().all() and ours[:, 0].isfinite().all()


def test_a_key_beyond_the_bound_has_no_gradient():
    x = make(1, 1, 20, 32) | {"wk": torch.eye(32)[None]}             # so that u is the key itself
    u = x["k"].requires_grad_()
    with torch.no_grad():
        u[..., 5, 3], u[..., 5, 4], u[..., 5, 6], u[..., 7, 3] = 29.9, 30.1, -30.1, -29.9
    y = hedgehog_triton.fused_attention(**x, kind="hedgehog_exp")
    du, = torch.autograd.grad(y.square().sum(), u)
    assert set(map(tuple, (du == 0).nonzero()[:, 2:].tolist())) == {(5, 4), (5, 6)}


def test_queries_may_be_as_large_as_they_like_and_of_one_sign():
    x = make(1, 1, 20, 32) | {"wq": torch.eye(32)[None]}
    x["q"] = -100 - x["q"].abs()
    true = exact(**{name: value.double() for name, value in x.items()}, kind="hedgehog_exp")[0]
    torch.testing.assert_close(fused(**x, kind="hedgehog_exp")[0].double(), true, rtol=1e-4, atol=1e-5)


def test_features_may_be_larger_than_float16_can_be():
    x = {name: value.half() if name in "qkv" else value for name, value in make(1, 1, 40, 32, magnitude=10.0).items()}
    cotangents = torch.randn(1, 1, 40, 32).half().double(), torch.zeros(1, 1, 64, 33).double()
    ours = outputs_and_gradients(fused, x, cotangents, kind="hedgehog_exp")
    true = outputs_and_gradients(exact, {name: value.double() for name, value in x.items()}, cotangents,
                                 kind="hedgehog_exp")
    assert true[1].max() > 65504 and ours[0].dtype == torch.float16
    for name, a, b in zip(("y", "last state", *x), ours, true, strict=True):
        assert (a - b).norm() <= 3e-3 * b.norm(), name


def test_the_gradient_of_the_state_may_be_in_any_layout():
    x = make(1, 2, 20, 32)
    x["k"].requires_grad_()
    grads = [torch.autograd.grad(f(**x)[1].sum(), x["k"])[0] for f in (fused, exact)]     # that of a sum has no strides
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused_with_the_remedy():
    x = make(1, 1, 20, 32)
    q = x["q"].requires_grad_()
    dq, = torch.autograd.grad(hedgehog_triton.fused_attention(**x).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative.*form='chunked'"):
        (dq.square().sum() + q.sum()).backward()


def test_kernels_are_launched_on_the_device_of_the_tensors(monkeypatch):
    inside, launched, segments = [], [], hedgehog_triton.segments

    @contextlib.contextmanager
    def device_of(x):
        inside.append(x.shape)
        yield
        inside.pop()
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(hedgehog_triton, "segments", lambda *x: launched.append(inside[-1]) or segments(*x))
    x = make(1, 1, 20, 32)
    hedgehog_triton.fused_attention(**x | {"q": x["q"].requires_grad_()}).sum().backward()
    assert launched == [x["q"].shape] * 2, "the forward and the backward pass"


@pytest.fixture
def called(monkeypatch):
    """The arguments of each call of the kernels by hedgehog.py, which takes them as on a GPU."""
    calls, f = [], hedgehog_triton.fused_attention
    monkeypatch.setattr(hedgehog_triton, "fused_attention", lambda *x, **o: calls.append((x, o)) or f(*x, **o))
    monkeypatch.setattr(hedgehog, "fused_kernels", lambda v, P, has_map, say=True: hedgehog_triton)
    return calls


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("options", [dict(bias=True), dict(tie_qk=True, learn_temperature=True)])
def test_the_layer_calls_the_kernels_where_it_may(kind, options, called):
    torch.manual_seed(0)
    layer = LinearAttention(2, 32, kind, **options)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    q, k, v, g = torch.randn(4, 1, 2, 20, 32).requires_grad_()
    results = []
    for form in ("quadratic", "auto"):
        y = layer(q, k, v, form)
        results.append((y, *torch.autograd.grad(y, (q, k, v, *layer.parameters()), g)))
    assert len(called) == 1 and called[0][0][3] is not None, "the map is the kernels' too"
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_maps_of_two_kinds_are_not_made_in_the_kernels(called):
    layer = LinearAttention(2, 32)
    layer.map_k.kind = "hedgehog_exp"
    q, k, v = torch.randn(3, 1, 2, 20, 32)
    torch.testing.assert_close(layer(q, k, v, "auto"), layer(q, k, v, "quadratic"), rtol=1e-4, atol=1e-5)
    assert len(called) == 1 and len(called[0][0]) == 3, "features alone"


class OnAGPU(NamedTuple):
    """What hedgehog.py asks a tensor when it chooses its form."""
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device = torch.device("cuda", 0)
    is_cuda: bool = True


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """hedgehog.py decides as it would for tensors on an H100, and has given no reason yet."""
    decide = hedgehog.fused_kernels

    monkeypatch.setattr(hedgehog, "fused_kernels", lambda v, *x, **o: decide(OnAGPU(v.dtype, v.shape), *x, **o))
    monkeypatch.setattr(hedgehog_triton, "gpu", lambda index: ((9, 0), 227))
    monkeypatch.setattr(hedgehog.say_once, "__defaults__", (set(),))
    torch.compiler.reset()


def said_in(function):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in said if "plain PyTorch" in str(w.message)]


@pytest.mark.parametrize("options, D, why", [
    ({}, 48, "head width 48"), (dict(segment_size=8), 48, "head width 48"), (dict(kind="elu"), 16, "head width 16"),
])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fallback_is_said_once_and_does_not_break_the_graph(options, D, why, compiled, as_on_a_gpu):
    layer, x = LinearAttention(2, D, **options), torch.randn(3, 1, 2, 20, D)
    run = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    said = said_in(lambda: torch.testing.assert_close(run(*x), layer(*x, "quadratic"), rtol=1e-4, atol=1e-5))
    assert len(said) == 1 and why in said[0]
    assert not said_in(lambda: (run(*x), layer(*x))), "not again, though catch_warnings has come and gone"


@pytest.mark.parametrize("change", [
    lambda layer, q, k, v: (q, k, torch.cat((v, v), -1)),              # v of another width: features go to the kernels
    lambda layer, q, k, v: (q, k, v.mT.contiguous().mT),               # a last axis that is not contiguous
    lambda layer, q, k, v: setattr(layer.map_k, "kind", "hedgehog_exp") or (q, k, v.mT.contiguous().mT),   # and both
    lambda layer, q, k, v: layer.double() and (q, k, v),
])
def test_where_the_kernels_can_run_in_the_end_the_layer_runs_them_in_silence(change, as_on_a_gpu, monkeypatch):
    calls, f = [], hedgehog_triton.fused_attention
    monkeypatch.setattr(hedgehog_triton, "fused_attention", lambda *x, **o: calls.append(x) or f(*x, **o))
    layer = LinearAttention(2, 32)
    x = change(layer, *torch.randn(3, 1, 2, 20, 32))
    assert not said_in(lambda: torch.testing.assert_close(layer(*x), layer(*x, "quadratic"), rtol=1e-4, atol=1e-5))
    assert len(calls) == 1


def test_a_missing_triton_is_said_and_does_not_break_the_graph(as_on_a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "hedgehog_triton", None)          # importing it raises ImportError
    layer, x = LinearAttention(2, 32), torch.randn(3, 1, 2, 20, 32)
    run = torch.compile(layer, fullgraph=True, backend="eager")
    said = said_in(lambda: (run(*x), layer(*x)))
    assert len(said) == 1 and "hedgehog_triton" in said[0]


@pytest.mark.parametrize("change, words", [
    (dict(k=torch.zeros(1, 2, 6, 32)), "expected q and k"),
    (dict(q=torch.zeros(1, 2, 0, 32), k=torch.zeros(1, 2, 0, 32), v=torch.zeros(1, 2, 0, 32)), "T >= 1"),
    (dict(v=torch.zeros(1, 2, 5, 32).half()), "share one dtype"),
    (dict(wq=torch.zeros(2, 32, 16)), "wq must be"),
    (dict(wk=None), "both weights"),
    (dict(bq=torch.zeros(2, 32)), "both biases"),
    (dict(state=torch.zeros(1, 2, 64, 33).half()), "state must be torch.float32, got torch.float16"),
    (dict(wq=torch.eye(32).expand(2, 32, 32).double()), "wq must be torch.bfloat16 or .* got torch.float64"),
    (dict(wk=torch.eye(32).expand(2, 32, 32).long()), "wk must be .* got torch.int64"),
    (dict(bq=torch.zeros(2, 32).int(), bk=torch.zeros(2, 32)), "bq must be .* got torch.int32"),
    (dict(v=torch.zeros(1, 2, 5, 64)), "q and k of width 32 beside v of width 64"),
    (dict(k=torch.zeros(1, 2, 32, 5).mT), r"last axis .* got strides .*call contiguous\(\)"),
    (dict(v=torch.zeros(1, 2, 5, 1).expand(1, 2, 5, 32)), "last axis"),
    ({x: torch.zeros(1, 2, 5, 48) for x in "qkv"} | {w: torch.zeros(2, 48, 48) for w in ("wq", "wk")}, "width 48"),
    ({name: torch.zeros(1, 2, 5, 32).double() for name in "qkv"}, "dtype torch.float64"),
    (dict(v=torch.zeros(1, 2, 5, 32, device="meta")), "one device"),
    (dict(kind="elu"), "unknown map 'elu': the kernels make hedgehog and hedgehog_exp"),
])
def test_bad_input_is_told_before_a_kernel_starts(change, words):
    with pytest.raises(ValueError, match=words):
        hedgehog_triton.fused_attention(**make(1, 2, 5, 32) | change)


def test_tensors_on_the_cpu_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(hedgehog_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="tensors on cpu.*form='chunked'"):
        hedgehog_triton.fused_attention(**make(1, 2, 5, 32))


@pytest.mark.parametrize("gpu, dtype, words", [
    (((7, 5), 64), torch.float16, "compute capability 7.5, the kernels take 8.0 and newer"),
    (((8, 6), 99), torch.float32, "99 KiB of shared memory, the kernels take 136 for torch.float32"),
    (((8, 6), 99), torch.bfloat16, None),
])
def test_a_gpu_too_old_or_too_small_is_told(gpu, dtype, words, monkeypatch):
    monkeypatch.setattr(hedgehog_triton, "gpu", lambda index: gpu)
    why = hedgehog_triton.unsupported(OnAGPU(dtype, (1, 2, 5, 64)), 64, 64, has_map=True)
    assert why is None if words is None else words in why
