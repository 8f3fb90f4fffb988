"""The fused kernels against float64, in Triton's interpreter (conftest.py). On a GPU: experiments/check_triton.py."""

import contextlib
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
import triton

VERSION, NUMPY = (tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np))
if VERSION < (3, 5):
    pytest.skip(f"hedgehog_triton.py needs Triton 3.5, here is {triton.__version__}", allow_module_level=True)
if VERSION < (3, 9) and NUMPY >= (2, 4):
    pytest.skip("before 3.9 Triton's interpreter needs numpy < 2.4", allow_module_level=True)
import triton.language as tl
from torch._dynamo.testing import CompileCounterWithBackend
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import check_triton
import hedgehog
import hedgehog_triton
from hedgehog import GPT, GPTConfig, HybridAttention, LinearAttention, linear_attention, safe_exp

NAMES = ("q", "k", "v", "wq", "wk", "bq", "bk", "state")


@triton.jit
def square(x, y):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    a = tl.load(x + at).to(tl.bfloat16)
    tl.store(y + at, tl.dot(a, a))


@pytest.fixture(scope="module", autouse=True)
def bfloat16_as_on_a_gpu():
    """The interpreter of Triton 3.6 holds bfloat16 in NumPy's uint16, multiplies such matrices as integers, and rounds
    to bfloat16 towards zero. Until it is mended: products get float32, which holds them exactly; PyTorch rounds."""
    x, y, rounded = torch.full((16, 16), 1.007), torch.zeros(16, 16), torch.tensor(1.007).bfloat16().float()
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(x):
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, *x):
        return create_dot(self, *(wide(a) if a.dtype.scalar == tl.bfloat16 else a for a in x[:2]), *x[2:])

    def cast(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
            return wide(x)
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, x, dtype)
        return TensorHandle(torch.tensor(x.data).bfloat16().view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        square[1,](x, y)
        if (y != 16 * rounded ** 2).any():
            patch.setattr(InterpreterBuilder, "create_dot", dot)
            patch.setattr(InterpreterBuilder, "cast_impl", cast)
            square[1,](x, y)
        assert (y == 16 * rounded ** 2).all()
        yield


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


def exact_with_log_den(q, k, v, wq=None, wk=None, bq=None, bk=None, state=None, kind="hedgehog"):
    """y, and the logarithm of the denominators of features as they are: queries are not divided by their largest."""
    y, phi_q, phi_k = exact(q, k, v, wq, wk, bq, bk, state, kind)[0], q, k
    if wq is not None:
        u = q @ wq if bq is None else q @ wq + bq.unsqueeze(-2)
        phi_q = torch.cat((u, -u), -1).exp() if kind == "hedgehog_exp" else features(q, wq, bq, kind, True)
        phi_k = features(k, wk, bk, kind, False)
    den = (phi_q @ phi_k.mT).tril().sum(-1)                                               # (B, H, T)
    den = den if state is None else den + (phi_q @ state[..., -1:]).squeeze(-1)
    return y, den.log()


def fused_with_log_den(**x):
    return hedgehog_triton.fused_attention(**x, return_log_den=True)


def fused(**x):
    return hedgehog_triton.fused_attention(**x, return_state=True)


def outputs_and_gradients(function, x, cotangents, **options):
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    outputs = function(**x, **options)
    loss = sum((y.double() * g).sum() for y, g in zip(outputs, cotangents, strict=True))
    return [*outputs, *torch.autograd.grad(loss, list(x.values()))]


@pytest.mark.parametrize("shape", [
    dict(B=1, H=2, T=70, D=32, bias=True),             # a ragged last chunk
    dict(B=2, H=1, T=40, D=32, state=True),
    dict(B=1, H=1, T=17, D=128, magnitude=4.0),        # columns of v in two blocks; the map by PyTorch
    dict(B=1, H=1, T=45, D=64, P=32, state=True),      # features given
    dict(B=1, H=1, T=2, D=32),
    dict(B=1, H=1, T=40, D=32, magnitude=10.0),        # u from -60 to 60: beyond 30 a key's exponential stays at e^30
    dict(B=1, H=1, T=40, D=64, bias=True, state=True),
    dict(B=1, H=2, T=70, D=64, dtype=torch.bfloat16, bias=True, state=True),
    dict(B=1, H=1, T=80, D=32, dtype=torch.bfloat16, magnitude=10.0),
    dict(B=1, H=1, T=70, D=64, P=64, dtype=torch.bfloat16),
])
@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("segmented", [False, True])
def test_values_and_every_gradient_equal_the_definition(shape, kind, segmented, monkeypatch):
    if segmented:  # as on a GPU that a few heads cannot fill
        monkeypatch.setattr(hedgehog_triton, "segments", lambda programs, T, L, *_: (L, -(-T // L)))
        monkeypatch.setattr(hedgehog_triton, "CHUNKS_PER_PROGRAM", 1)
    dtype = shape.get("dtype", torch.float32)
    x = make(**{name: value for name, value in shape.items() if name != "dtype"})
    B, H, T, D = x["v"].shape
    cotangents = torch.randn(B, H, T, D).to(dtype).double(), torch.randn(B, H, shape.get("P") or 2 * D, D + 1).double()
    rounded = {name: value.to(dtype) if name in ("q", "k", "v", "wq", "wk") else value for name, value in x.items()}
    given = {name: value if name in ("q", "k", "v") else value.float() for name, value in rounded.items()}
    ours = outputs_and_gradients(fused, given, cotangents, kind=kind)
    true = outputs_and_gradients(exact, {name: value.double() for name, value in given.items()}, cotangents, kind=kind)
    bound = 1e-5 if dtype == torch.float32 else 0.02 if "magnitude" in shape else 0.01
    for name, a, b in zip(("y", "last state", *x), ours, true, strict=True):
        assert (a - b).norm() <= bound * b.norm(), name


@pytest.mark.parametrize("shape", [
    dict(B=1, H=2, T=70, D=32, bias=True),
    dict(B=2, H=1, T=40, D=32, state=True, magnitude=10.0),
    dict(B=1, H=1, T=17, D=128, bias=True),
    dict(B=1, H=1, T=45, D=64, P=32, state=True),
    dict(B=1, H=2, T=70, D=64, dtype=torch.bfloat16),
    dict(B=1, H=1, T=130, D=64, dtype=torch.bfloat16, bias=True, state=True),
    dict(B=1, H=1, T=70, D=128, dtype=torch.bfloat16),
])
@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("of", ["both", "log_den"])
def test_the_logarithm_of_the_denominators_and_every_gradient_equal_the_definition(shape, kind, segmented, of,
                                                                                   monkeypatch):
    if segmented:
        monkeypatch.setattr(hedgehog_triton, "segments", lambda programs, T, L, *_: (L, -(-T // L)))
        monkeypatch.setattr(hedgehog_triton, "CHUNKS_PER_PROGRAM", 1)
    dtype = shape.get("dtype", torch.float32)
    x = make(**{name: value for name, value in shape.items() if name != "dtype"})
    B, H, T, D = x["v"].shape
    dy, dlog = torch.randn(B, H, T, D).to(dtype).double(), torch.randn(B, H, T).double()
    rounded = {name: value.to(dtype) if name in ("q", "k", "v", "wq", "wk") else value for name, value in x.items()}
    given = {name: value if name in ("q", "k", "v") else value.float() for name, value in rounded.items()}
    cotangents = dy * (of == "both"), dlog
    ours = outputs_and_gradients(fused_with_log_den, given, cotangents, kind=kind)
    double = {name: value.double() for name, value in given.items()}
    true = outputs_and_gradients(exact_with_log_den, double, cotangents, kind=kind)
    bound = 1e-5 if dtype == torch.float32 else 0.01
    assert ours[1].dtype == torch.float32 and ((ours[1] - true[1]).abs() <= bound * (1 + true[1].abs())).all()
    for name, a, b in zip(("y", "log_den", *x), ours, true, strict=True):
        assert (a - b).norm() <= bound * b.norm(), name


def test_with_a_state_the_logarithm_of_the_denominators_stands_before_it():
    x = make(1, 2, 40, 32, state=True)
    y, log_den, state = hedgehog_triton.fused_attention(**x, return_state=True, return_log_den=True)
    assert torch.equal(log_den, fused_with_log_den(**x)[1])
    assert all(torch.equal(a, b) for a, b in zip((y, state), fused(**x)))


def test_a_row_without_weight_is_zero_with_zero_gradient():
    x = make(1, 1, 5, 32, P=32)
    x["q"][:, :, 2] = 0
    q = x["q"].requires_grad_()
    y, log_den = fused_with_log_den(**x)
    (y.sum() + log_den.sum()).backward()
    assert (y[:, :, 2] == 0).all() and (q.grad[:, :, 2] == 0).all() and q.grad[:, :, 3].abs().sum() > 0
    assert (log_den == -1e30).nonzero().tolist() == [[0, 0, 2]]


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


@pytest.mark.parametrize("functions", [(fused, exact), (fused_with_log_den, exact_with_log_den)])
def test_the_gradient_of_the_state_or_of_the_denominators_may_be_in_any_layout(functions):
    x = make(1, 2, 20, 32)
    x["k"].requires_grad_()
    grads = [torch.autograd.grad(f(**x)[1].sum(), x["k"])[0] for f in functions]          # that of a sum has no strides
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


def test_segments_cover_the_text_in_few_waves(monkeypatch):
    # Once 4,096 tokens were 8 segments and 4,032 were 63, each with sums in float32 as large as four chunks of q.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    for programs, n_chunks in itertools.product((12, 24, 48, 96, 192, 384, 768), range(2, 300)):
        for slower, extra in ((1.4, 4), (1.0, 20)):                     # as forward and backward ask
            size, n = hedgehog_triton.segments(programs, n_chunks * 64, 64, torch.device("cuda"), slower, extra)
            assert (n - 1) * size < n_chunks * 64 <= n * size, "whole segments but for the last"
            assert programs * n <= max(programs, 16 * 264), "at most 16 waves of programs"


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
def test_what_a_gpu_is_checked_against_is_the_definition(kind):
    x = {name: value.double() for name, value in make(2, 3, 50, 8, state=True, bias=True).items()}
    cotangents = torch.randn(2, 3, 50, 8).double(), torch.randn(2, 3, 16, 9).double()
    definition = outputs_and_gradients(exact, x, cotangents, kind=kind)
    for rows in (50, 7):                                                # in one block and in eight
        reference = outputs_and_gradients(check_triton.exact, x, cotangents, kind=kind, numbers=2 * 3 * 50 * rows)
        torch.testing.assert_close(reference, definition)


class OnTheCPU(torch.overrides.TorchFunctionMode):
    """Takes device="cuda" for "cpu"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}) | ({"device": "cpu"} if "device" in (kwargs or {}) else {}))


def checked(*case, **options):
    with OnTheCPU():
        return check_triton.check(*case, **options)


def test_a_row_of_the_check_says_what_the_error_is_of_its_bound_and_of_rounding_the_inputs(monkeypatch):
    monkeypatch.setattr(check_triton, "fused_attention", hedgehog_triton.fused_attention, raising=False)
    row, plain = checked(1, 2, 40, 32, torch.bfloat16), checked(1, 2, 40, 32, torch.float32, full=False)
    assert row["ok"] and row["of_inputs"].keys() == row["of_bound"].keys() >= {"y", "dq", "dwk", "dbq", "dstate"}
    for name, x in row["of_bound"].items():
        assert row["of_inputs"][name] >= 2 * x * (1 - 1e-9)                               # of twice that, or of more
    assert any(row["of_inputs"][name] > 2.001 * x for name, x in row["of_bound"].items())
    assert plain["ok"] and plain["of_inputs"] == {}                                       # whose inputs are as they are
    rounding = row["errors"]["y"] / row["of_inputs"]["y"]                                 # what that alone costs

    def a_little_wrong(*x):
        y, state = check_triton.exact(*(y.double() for y in x[:-1]), x[-1])
        return y * (1 + 9 * rounding), state
    monkeypatch.setattr(check_triton, "fused", a_little_wrong)
    row = checked(1, 2, 40, 32, torch.bfloat16)
    assert not row["ok"] and row["of_inputs"]["y"] == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_hybrid_pass_and_see_a_wrong_denominator(kind, dtype, hybrids, monkeypatch):
    f = hedgehog_triton.fused_attention
    monkeypatch.setattr(check_triton, "fused_attention", f, raising=False)

    def rows():
        return (check_triton.log_den(40, 32, dtype, kind), check_triton.hybrid(40, 9, dtype, kind, D=32),
                check_triton.hybrid(40, 9, dtype, kind, D=32, state=True))
    with OnTheCPU():
        assert all(row["ok"] for row in rows()) and hybrids

        def wrong(*x, **options):
            y, log_den, *state = f(*x, **options)
            return y, log_den + 0.1 * log_den.detach().abs().mean(), *state
        monkeypatch.setattr(check_triton, "fused_attention", wrong)
        monkeypatch.setattr(hedgehog_triton, "fused_attention", wrong)
        assert not any(row["ok"] for row in rows())


def test_rows_under_a_sanitizer_are_kept_where_one_asks_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_triton, "provenance", lambda device: dict(device=device.type))
    monkeypatch.setattr(check_triton, "ROOT", tmp_path)                                   # of the committed rows
    monkeypatch.setattr(check_triton, "sanitizer", lambda: "compute-sanitizer --tool memcheck")
    monkeypatch.setattr(check_triton, "check_all", lambda cases: [dict(case=str(case), ok=True, worst="y")
                                                                  for case in cases])
    for out in ([], ["--out", str(tmp_path / "deeper" / "rows.json")]):
        with pytest.raises(SystemExit) as end:
            check_triton.main(["--small", *out])
        assert end.value.code == 0 and "21 passed, 0 failed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*.json")] == ["rows.json"]
    rows = json.loads((tmp_path / "deeper" / "rows.json").read_text())
    assert len(rows) == 21 and {(row["sanitizer"], row["device"]) for row in rows} == {
        ("compute-sanitizer --tool memcheck", "cuda")}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="Linux lists processes there")
def test_the_sanitizer_is_found_among_the_processes_above(tmp_path):
    assert check_triton.sanitizer() is None
    code = (f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'experiments')]}; import check_triton; "
            "print(check_triton.sanitizer())")
    (tmp_path / "compute-sanitizer").symlink_to(shutil.which("bash"))
    command = [tmp_path / "compute-sanitizer", "-c", '"$@"; true', "racecheck", sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "compute-sanitizer -c" in said and "racecheck" in said


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


# The hybrid: softmax in the window, and beyond it the kernels above


@pytest.fixture
def hybrids(called, monkeypatch):
    """The shapes of q in each call of the kernels' hybrid."""
    calls, f = [], hedgehog_triton.hybrid_attention
    monkeypatch.setattr(hedgehog_triton, "hybrid_attention", lambda *x: calls.append(x[0].shape) or f(*x))
    torch.compiler.reset()
    return calls


def hybrid(kind, window, H=2, D=32, **options):
    """One in which every parameter matters, and what is old weighs about as much as the window."""
    torch.manual_seed(0)
    layer = HybridAttention(H, D, kind, window=window, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
        layer.map_gate_bias += 4
    return layer


def with_gradients(function, layer, inputs, g):
    y = function(*inputs)
    return dict(zip(("y", *"qkv", *dict(layer.named_parameters())),
                    (y, *torch.autograd.grad((y.double() * g).sum(), (*inputs, *layer.parameters())))))


def plain(layer):
    return lambda *x: layer.attend(*x, "auto", None, False, 0)


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("T, window", [(40, 1), (33, 32), (77, 9), (300, 100), (140, 128)])
@pytest.mark.parametrize("options", [dict(bias=True), dict(tie_qk=True, learn_temperature=True)])
def test_the_hybrid_of_the_kernels_equals_the_plain_one(kind, T, window, options, hybrids):
    layer = hybrid(kind, window, **options)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, T, 2, 32).transpose(2, 3)]
    g = torch.randn(1, 2, T, 32)
    ours = with_gradients(layer, layer, inputs, g)
    assert hybrids == [(1, 2, T, 32)]
    true = with_gradients(plain(layer.double()), layer, [x.double() for x in inputs], g)
    for name, b in true.items():
        assert (ours[name] - b).norm() <= 1e-5 * b.norm(), name


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hybrid_of_the_kernels_in_half_precision_and_under_autocast(kind, dtype, hybrids):
    layer, g = hybrid(kind, 64, D=64, bias=True), torch.randn(1, 2, 150, 64)
    inputs = [x.to(dtype).requires_grad_() for x in torch.randn(3, 1, 2, 150, 64)]
    ours = with_gradients(layer, layer, inputs, g)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    again = with_gradients(autocast(dtype)(layer), layer, wide, g)
    assert ours["y"].dtype == again["y"].dtype == ours["q"].dtype == dtype and len(hybrids) == 2
    true = with_gradients(plain(layer.double()), layer, [x.double() for x in inputs], g)
    for name, b in true.items():
        assert torch.equal(ours[name].float(), again[name].float()), name
        assert (ours[name] - b).norm() <= 0.02 * b.norm(), name


def test_the_hybrid_takes_a_gate_in_any_layout_and_the_map_of_pytorch(hybrids):
    layer, g = hybrid("hedgehog_exp", 9, D=128), torch.randn(2, 2, 40, 128)
    with torch.no_grad():
        layer.map_gate.set_(layer.map_gate.mT.contiguous().mT)
        for p in (layer.map_q.weight, layer.map_k.weight, layer.map_gate):
            p.copy_(p / 4)
    inputs = [x.requires_grad_() for x in torch.randn(3, 2, 40, 2, 128).transpose(2, 3)]
    ours = with_gradients(layer, layer, inputs, g)
    true = with_gradients(plain(layer.double()), layer, [x.double() for x in inputs], g)
    assert hybrids and all((ours[name] - b).norm() <= 1e-5 * b.norm() for name, b in true.items())


def test_the_hybrids_queries_may_be_beyond_the_range_of_float32(hybrids):
    layer, g = hybrid("hedgehog_exp", 4), torch.randn(1, 2, 40, 32)
    inputs = [(x * scale).requires_grad_() for x, scale in zip(torch.randn(3, 1, 2, 40, 32), (30, 1, 1))]
    assert layer.map_q.log_shift(inputs[0]).max() > 100                                   # e^88 is the end of float32
    ours = with_gradients(layer, layer, inputs, g)
    true = with_gradients(plain(layer.double()), layer, [x.double() for x in inputs], g)
    assert hybrids and all((ours[name] - b).norm() <= 1e-3 * b.norm() for name, b in true.items())


@pytest.mark.parametrize("D, dtype, rtol", [(32, torch.float32, 1e-5), (64, torch.bfloat16, 0.02),
                                            (128, torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
def test_the_hybrids_kernels_return_the_state_of_a_prompt(kind, D, dtype, rtol, hybrids):
    T, window = 45, 9
    layer = hybrid(kind, window, D=D, bias=True)
    with torch.no_grad():
        for p in (layer.map_q.weight, layer.map_k.weight):
            p.mul_(32 / D)
    inputs = [x.to(dtype).requires_grad_() for x in torch.randn(3, 1, T, 2, D).transpose(2, 3)]
    true = [x.detach().double().requires_grad_() for x in inputs]

    def run(layer, inputs):
        y, state = layer(*inputs, return_state=True)
        cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(x.ndim)) for x in (y, *state)]
        total = sum((x.double() * g).sum() for x, g in zip((y, *state), cotangents))
        return y, *state, *torch.autograd.grad(total, (*inputs, *layer.parameters()))
    ours = run(layer, inputs)
    assert len(hybrids) == 1 and [x.dtype for x in ours[:4]] == [dtype] + 3 * [torch.float32]
    for a, b in zip(ours, run(layer.double(), true), strict=True):
        assert a.shape == b.shape and (a - b).norm() <= rtol * b.norm()
    assert not {x.untyped_storage().data_ptr() for x in ours[1:4]} & {x.untyped_storage().data_ptr() for x in inputs}
    # And a text goes on from it, a token at a time.
    layer, whole = layer.to(torch.float32), [torch.cat((x, torch.randn(1, 2, 3, D)), dim=2).float() for x in inputs]
    with torch.no_grad():
        y, state = [], layer(*(x[:, :, :T] for x in whole), return_state=True)[1]
        for t in range(T, T + 3):
            y_t, state = layer(*(x[:, :, t:t + 1] for x in whole), state=state, return_state=True)
            y.append(y_t)
        torch.testing.assert_close(torch.cat(y, dim=2), plain(layer)(*whole)[:, :, T:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_hybrid_gpt_reads_its_prompt_by_the_kernels_and_goes_on(compiled, hybrids):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=40, vocab_size=31, n_layer=2, n_head=2, n_embd=64, attention="hedgehog_exp",
                          hybrid_window=5)).eval()
    for p in model.parameters():
        p.requires_grad_(False).add_(0.2 * torch.randn_like(p))
    idx, cache, logits = torch.randint(31, (2, 30)), model.new_cache(), []
    read = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    for piece in idx.split((20, 1, 1, 8), dim=1):
        logits.append(read(piece, cache=cache)[0])
    assert len(hybrids) == 2, "the prompt alone, once a layer"
    hybrids.clear()
    last = [logit[:, -1:] for logit in logits]
    for n, logit in zip((20, 21, 22, 30), last):
        torch.testing.assert_close(logit, model(idx[:, :n])[0][:, -1:], rtol=1e-4, atol=1e-4)


def test_the_hybrid_is_plain_with_a_past_for_a_text_in_the_window_or_another_map(hybrids):
    def run(x, kind="hedgehog", *more, **options):
        return hybrid(kind, 8)(*x, *more, **options)
    x = torch.randn(3, 1, 2, 20, 32)
    _, state = run(x[:, :, :, :8], return_state=True)
    run(x, state=state), run(x[:, :, :, :8]), run(x, "elu"), run(x, "hedgehog", "chunked")
    run((x[0].bfloat16(), *x[1:]))                                                        # dtypes that differ
    hybrid("hedgehog", 8).double()(*x.double())
    layer, keys = hybrid("hedgehog", 8, H=4), torch.ones(1, 20, dtype=torch.bool)
    layer.map_k = hybrid("hedgehog", 8).map_k
    layer.attend(torch.randn(1, 4, 20, 32), *x[1:], "auto", None, False, 0, keys=keys)    # grouped queries, padding
    assert not hybrids
    run(x[:, :, :, :9])
    assert len(hybrids) == 1


def test_a_hybrid_says_why_it_is_plain(as_on_a_gpu):
    layer, x = HybridAttention(2, 48, window=8), torch.randn(3, 1, 2, 20, 48)
    assert not said_in(lambda: HybridAttention(2, 48, "elu", window=8)(*x)), "which no kernels have at any width"
    said = said_in(lambda: (layer(*x), layer(*x)))
    assert len(said) == 1 and "head width 48" in said[0]


def window_inputs(T, W, D, dtype, B=2, H=2):
    """Those of the op behind the hybrid, in float32 where it has that: q, k, v views of one projection, and a row in
    three that attends to nothing old."""
    torch.manual_seed(0)
    old = max(T - W, 0)
    q, k, v = torch.randn(B, T, 3, H, D).to(dtype).permute(2, 0, 3, 1, 4)
    far, log_den = torch.randn(B, old, H, D).to(dtype).transpose(1, 2), torch.randn(B, H, old)
    far[:, :, 2::3], log_den[:, :, 2::3] = 0, -1e30
    gate = torch.cat((0.3 * torch.randn(H, D), torch.randn(H, 1)), dim=1)
    return dict(q=q, k=k, v=v, far=far, log_den=log_den, gate=gate)


def window_fused(q, k, v, far, log_den, gate, W):
    """gate (H, D+1): its affine function as one input, since a bias' gradient is a sum of both signs."""
    return torch.ops.hedgehog.window(q, k, v, far, log_den, gate[:, :-1].contiguous(), gate[:, -1].contiguous(), W)[:1]


def window_exact(q, k, v, far, log_den, gate, W):
    early, pad = q.shape[2] - far.shape[2], torch.nn.functional.pad
    log_gate = (q * gate[:, None, :-1]).sum(-1) + gate[:, None, -1]
    log_rest = pad(log_den, (early, 0), value=-1e30) + log_gate
    k, v = pad(k, (0, 0, W, 0)), pad(pad(v, (0, 1), value=1.0), (0, 0, W, 0))
    return [hedgehog.window_and_rest(q, k, v, log_rest.unsqueeze(-1), pad(far, (0, 0, early, 0)), W)]


def window_errors(x, W, do):
    """{name: (ours, the definition's in float64)} of y and every gradient."""
    ours = outputs_and_gradients(window_fused, x, [do], W=W)
    true = outputs_and_gradients(window_exact, {name: a.double() for name, a in x.items()}, [do], W=W)
    assert all(a.dtype == b.dtype for a, b in zip(ours, (x["v"], *x.values())))
    return dict(zip(("y", *x), zip(ours, true, strict=True)))


@pytest.mark.parametrize("T, W, D", [
    (1, 1, 32), (1, 5, 32), (2, 1, 32), (6, 5, 64), (17, 16, 32), (17, 1, 128), (17, 100, 32), (64, 64, 32),
    (65, 64, 64), (65, 1, 32), (70, 2, 32), (128, 65, 32), (130, 5, 64), (130, 16, 32), (130, 64, 128), (130, 100, 32),
    (130, 1000, 32), (200, 129, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_window_joined_with_what_is_older_equals_the_definition(T, W, D, dtype):
    x, do = window_inputs(T, W, D, dtype), torch.randn(2, 2, T, D).to(dtype).double()
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 0.01}[dtype]
    for name, (a, b) in window_errors(x, W, do).items():
        assert (a - b).norm() <= bound * b.norm() + 1e-6 * do.norm(), name
        if name == "y":                                                                   # every row, not most of them
            assert ((a - b).norm(dim=-1) <= 2 * bound * b.norm(dim=-1)).all()


@pytest.mark.parametrize("bias, share", [(1e4, 1), (-1e4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_may_leave_nothing_but_what_is_old_or_none_of_it(bias, share, dtype):
    x, do = window_inputs(90, 9, 32, dtype), torch.randn(2, 2, 90, 32).to(dtype).double()
    x["gate"][:, -1] = bias
    found, alive = window_errors(x, 9, do), x["log_den"] > -1e30
    y, dfar = found["y"][0][:, :, 9:], found["far"][0]
    torch.testing.assert_close(y[alive], x["far"][alive], rtol=0, atol=0) if share else None
    torch.testing.assert_close(dfar[alive].double(), share * do[:, :, 9:][alive], rtol=1e-3, atol=0)
    assert (dfar[~alive] == 0).all() and (found["log_den"][0][~alive] == 0).all()
    for name, (a, b) in found.items():
        # float32 knows a logarithm of 1e4 to 1e-3, and a gradient that is zero only to what it is a difference of
        assert (a - b).norm() <= (2e-3 if dtype == torch.float32 else 0.01) * max(b.norm(), do.norm()), name


def test_a_row_that_attends_to_nothing_old_is_that_of_the_window_alone():
    x, do = window_inputs(90, 9, 32, torch.float32), torch.randn(2, 2, 90, 32)
    dead = [dict(x, far=x["far"] + noise, log_den=torch.full_like(x["log_den"], -1e30)) for noise in (0, 100)]
    ours = [outputs_and_gradients(window_fused, x, [do.double()], W=9) for x in dead]
    assert all(torch.equal(a, b) for a, b in zip(*ours, strict=True)), "whatever stands in far"
    y, *_, dfar, dlog_den, dgate = ours[0]
    assert not dfar.any() and not dlog_den.any() and not dgate.any()
    torch.testing.assert_close(y, hedgehog.sliding_window(*(x[name] for name in "qkv"), 9))


def test_the_window_forgets_and_does_not_foresee():
    x = window_inputs(140, 64, 32, torch.float32)
    y, = window_fused(**x, W=64)
    for t in (0, 63, 64, 100):
        changed = {name: x[name].clone() for name in ("k", "v")}
        changed["k"][:, :, t], changed["v"][:, :, t] = 5.0, 5.0
        differs = (window_fused(**x | changed, W=64)[0] != y).any(-1).all(1).all(0).nonzero().flatten()
        assert differs.tolist() == list(range(t, min(t + 64, 140)))


def test_backward_passes_of_the_window_agree_to_the_last_bit_whatever_the_layout_of_the_gradient():
    x = window_inputs(130, 20, 32, torch.bfloat16)
    runs = [outputs_and_gradients(window_fused, x, [torch.ones(2, 2, 130, 32).double()], W=20) for _ in range(2)]
    leaves = {name: a.detach().requires_grad_() for name, a in x.items()}
    loss = window_fused(**leaves, W=20)[0].sum()                                         # of a gradient without strides
    runs.append([runs[0][0], *torch.autograd.grad(loss, list(leaves.values()))])
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_the_window_has_no_second_derivative_and_says_so():
    x = window_inputs(20, 5, 32, torch.float32)
    q = x["q"].requires_grad_()
    dq, = torch.autograd.grad(window_fused(**x, W=5)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative.*form='chunked'"):
        (dq.square().sum() + q.sum()).backward()


@pytest.mark.parametrize("T, W", [(40, 9), (5, 9)])
def test_torch_library_finds_nothing_wrong_with_the_window(T, W):
    *x, gate = window_inputs(T, W, 32, torch.float32).values()
    x = [*x, gate[:, :-1].contiguous(), gate[:, -1].contiguous()]
    window, backward = torch.ops.hedgehog.window.default, torch.ops.hedgehog.window_backward.default
    torch.library.opcheck(window, (*(a.detach().requires_grad_() for a in x), W))
    y, log_total = window(*x, W)
    torch.library.opcheck(backward, (torch.randn_like(y), *x, y, log_total, W))


@pytest.mark.parametrize("dynamic", [None, True])
def test_torch_compile_takes_the_hybrid_in_one_graph_for_any_length(dynamic, monkeypatch):
    monkeypatch.setattr(hedgehog, "fused_kernels", lambda *x, **o: hedgehog_triton)
    torch.compiler.reset()
    counter, layer = CompileCounterWithBackend("aot_eager"), hybrid("hedgehog", 9)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    for T in (20, 41, 33):
        x = [a.requires_grad_() for a in torch.randn(3, 1, 2, T, 32)]
        both = [with_gradients(f, layer, x, torch.randn(1, 2, T, 32, generator=torch.Generator().manual_seed(0)))
                for f in (compiled, layer)]
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
def test_a_gpt_of_hybrids_on_the_kernels_is_one_graph(kind, hybrids):
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 31, n_layer=2, n_head=2, n_embd=64, attention=kind, hybrid_window=7, segment_size=8))
    counter = CompileCounterWithBackend("aot_eager")
    compiled, idx = torch.compile(model, fullgraph=True, backend=counter), torch.randint(31, (2, 50))

    def gradients(function):
        model.zero_grad()
        with autocast():
            loss = function(idx, idx)[1]
        loss.backward()
        return loss.detach(), *(p.grad.float() for p in model.parameters())
    for a, b in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-4)
    assert counter.frame_count == 1 and len(hybrids) >= 4


# As PyTorch's own operations: autocast, no_grad, torch.compile, torch.library's checks


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize("kind, D", [("hedgehog", 128), ("hedgehog_exp", 64)])
def test_autocast_casts_q_k_and_v_as_for_softmax_whatever_the_form(kind, D, called):
    torch.manual_seed(0)
    layer, (q, k, v) = LinearAttention(2, D, kind), torch.randn(3, 1, 2, 20, D)
    x = q.requires_grad_(), k.bfloat16(), v
    results = {}
    for form in ("auto", "quadratic"):
        with autocast():
            y, softmax = layer(*x, form), torch.nn.functional.scaled_dot_product_attention(*x)
        results[form] = (y, *torch.autograd.grad(y.sum(), (q, layer.map_q.weight)))
        assert [g.dtype for g in results[form]] == [softmax.dtype, q.dtype, torch.float32]
    assert len(called) == 1 and called[0][0][3] is layer.map_q.weight, "the map is the kernels' too"
    for ours, plain in zip(*results.values(), strict=True):
        assert (ours.float() - plain.float()).norm() <= 0.01 * plain.float().norm()


@pytest.mark.parametrize("kind", hedgehog.FUSED_MAPS)
@pytest.mark.parametrize("D", [32, 128])                               # at 128 the map is PyTorch's, and stays float32
def test_autocast_to_float16_changes_no_bit_after_the_cast(kind, D):
    x, half = make(1, 1, 20, D, state=True), (lambda x: {n: y.half() if n in "qkv" else y for n, y in x.items()})
    with autocast(torch.float16):
        ours = fused(**x, kind=kind)
    for a, b in zip(ours, fused(**half(x), kind=kind), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("D", [64, 128])                               # at 128 the map is PyTorch's
def test_weights_of_a_model_in_float16_make_features_in_float32(D):
    x = {name: value.half() for name, value in make(1, 1, 20, D, magnitude=2.0).items()}
    y = fused(**x, kind="hedgehog_exp")[0]
    plain = exact(**{n: a.double() for n, a in x.items()}, kind="hedgehog_exp")[0]
    assert y.dtype == torch.float16 and (y.double() - plain).norm() <= 0.01 * plain.norm()


def test_autocast_leaves_features_as_they_are():
    x = make(1, 1, 20, 32, P=32)
    with autocast():
        ours, plain = fused(**x), exact(**x)
    for a, b, c in zip(ours, plain, fused(**x), strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, c)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept_and_no_bit_changes(mode):
    x = {name: value.requires_grad_() for name, value in make(1, 1, 20, 32, state=True).items()}
    with mode():
        y, state = fused(**x)
    assert not y.requires_grad and not state.requires_grad
    assert all(torch.equal(a, b) for a, b in zip((y, state), fused(**x)))


@pytest.mark.parametrize("options, dynamic", [(dict(D=32, bias=True, state=True), None), (dict(D=32, P=64), True)])
def test_torch_compile_takes_it_in_one_graph_for_any_length(options, dynamic):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter, dynamic=dynamic)
    for T in (20, 41, 33):
        x = make(1, 2, T, **options)
        P = options.get("P") or 2 * options["D"]
        cotangents = torch.randn(1, 2, T, options["D"]).double(), torch.randn(1, 2, P, options["D"] + 1).double()
        both = [outputs_and_gradients(f, x, cotangents) for f in (compiled, fused)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
        with torch.no_grad(), autocast():
            assert all(torch.equal(a, b) for a, b in zip(compiled(**x), fused(**x), strict=True))
    assert counter.frame_count <= 2 * 2, "with gradients and without, for the first T and for all others at most"


@pytest.mark.parametrize("options, return_state, return_log_den", [
    (dict(bias=True, state=True), True, False), ({}, False, False), ({}, False, True), (dict(P=64), True, True)])
def test_torch_library_finds_nothing_wrong(options, return_state, return_log_den):
    x = make(1, 2, 20, 32, **options)
    inputs = [x[name].requires_grad_() if name in x else None for name in NAMES]
    attention, backward = torch.ops.hedgehog.attention.default, torch.ops.hedgehog.attention_backward.default
    torch.library.opcheck(attention, (*inputs, return_state, return_log_den, 1e-30, "hedgehog"))
    inputs = [y if y is None else y.detach() for y in inputs]
    y, den, log_den, state = attention(*inputs, return_state, return_log_den, 1e-30, "hedgehog")
    dlog, ds1 = (torch.randn_like(x) if given else None for x, given in
                 ((log_den, return_log_den), (state, return_state)))
    torch.library.opcheck(backward, (torch.randn_like(y), dlog, ds1, *inputs, y, den, "hedgehog"))


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


@pytest.mark.parametrize("change, words", [
    (dict(window=0), "T > window >= 1, got .* and window 0"),
    (dict(window=5), "T > window >= 1, got .* and window 5"),
    (dict(q=torch.zeros(2, 5, 32)), "expected q, k and v"),
    (dict(v=torch.zeros(1, 2, 5, 64)), "expected q, k and v"),
    (dict(k=torch.zeros(1, 2, 6, 32)), "expected q, k and v"),
    (dict(gate=torch.zeros(32)), r"gate must be \(2, 32\), .* got \(32,\)"),
    (dict(gate=torch.zeros(2, 1)), r"gate must be \(2, 32\)"),
    (dict(gate=torch.zeros(2, 32).int()), "gate must be .* floating-point .* got .* torch.int32"),
    (dict(gate_bias=torch.zeros(1)), r"gate_bias must be \(2,\)"),
    (dict(gate_bias=torch.zeros(2, device="meta")), "gate_bias must be .* on cpu, got .* on meta"),
])
def test_bad_input_of_the_hybrid_is_told_before_a_kernel_starts(change, words):
    inputs = make(1, 2, 5, 32) | dict(gate=torch.zeros(2, 32), gate_bias=torch.zeros(2), window=2)
    names = ("q", "k", "v", "wq", "wk", "bq", "bk", "gate", "gate_bias", "window")
    given = {name: (inputs | change).get(name) for name in names}
    with pytest.raises(ValueError, match=words):
        hedgehog_triton.hybrid_attention(**given)
    assert hedgehog_triton.hybrid_attention(**{name: inputs.get(name) for name in names}).shape == (1, 2, 5, 32)


def test_rows_that_are_far_apart_are_copied_wherever_a_kernel_would_read_them(monkeypatch):
    far, near = torch.randn(2**24 + 32).as_strided((1, 1, 2, 32), (2**25, 2**25, 2**24, 1)), torch.randn(1, 1, 2, 32)
    copy, same = hedgehog_triton.rows_in_reach(far, near)
    assert copy.is_contiguous() and torch.equal(copy, far) and same is near
    calls, f = [], hedgehog_triton.rows_in_reach
    monkeypatch.setattr(hedgehog_triton, "rows_in_reach", lambda *x: calls.append(len(x)) or f(*x))
    inputs = make(1, 2, 5, 32) | dict(gate=torch.zeros(2, 32), gate_bias=torch.zeros(2), window=2)
    q = inputs["q"].requires_grad_()
    names = ("q", "k", "v", "wq", "wk", "bq", "bk", "gate", "gate_bias", "window")
    torch.autograd.grad(hedgehog_triton.hybrid_attention(**{name: inputs.get(name) for name in names}).sum(), q)
    assert sorted(calls) == [1, 1, 3, 3]  # the gradient of each of the two kernels' results; q, k and v, twice


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


def test_a_gpu_that_is_not_nvidias_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose properties say nothing of shared memory
    assert "an AMD GPU" in hedgehog_triton.unsupported(OnAGPU(torch.bfloat16, (1, 2, 5, 64)), 64, 64, has_map=True)
