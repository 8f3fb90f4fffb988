"""Every form of the attention is the same function, and that function is the paper's. `pytest test_hedgehog.py`.

The chain of proof, in float64, forward and gradients: a double loop over the paper's equation = `quadratic` = every
other form. Then what the function must not do (see the future, mix heads, depend on scale), half precision, and the
GPT. Letters as in hedgehog.py; "fla" is flash-linear-attention, whose issues name mistakes that are guarded here.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import hedgehog
from hedgehog import (
    GPT, FeatureMap, GPTConfig, HybridAttention, LinearAttention, attention_weights, linear_attention)

each_map = pytest.mark.parametrize("kind", hedgehog.FEATURE_MAPS)
each_form = pytest.mark.parametrize("form", ["quadratic", "cumsum", "chunked", "recurrent"])
each_attention = pytest.mark.parametrize("attention", hedgehog.ATTENTIONS)
causal_or_not = pytest.mark.parametrize("causal", [True, False])
EXACTLY = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def one_seed_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on tensors this small, threads only wait for each other


def normal(T, H=2, D=4, B=2, dtype=torch.float64, scale=1.0):
    """Raw q, k, v (B, H, T, D), for a LinearAttention."""
    return [(scale * torch.randn(B, H, T, D, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(3)]


def mapped(T, P=6, D=3, dtype=torch.float64):
    """Positive q and k (B, H, T, P), as a map gives them, and v, for linear_attention."""
    q, k = torch.rand(2, 2, 2, T, P, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, 1 + torch.randn(2, 2, T, D, dtype=torch.float64))]


def layer(kind, H=2, D=4, dtype=torch.float64, **options):
    """A LinearAttention, or with a window a HybridAttention, whose maps have left the identity, which would hide a
    transposed W or a lost bias."""
    module = (HybridAttention if "window" in options else LinearAttention)(H, D, kind, bias=True, **options).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    return module


def tiny_gpt(attention="hedgehog", **options):
    """A GPT in which every parameter matters (at the initial values, attention hardly does)."""
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=8, attention=attention,
                          feature_bias=True, chunk_size=4, segment_size=8, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.4)
    return model.double().eval()


def tokens(T, B=2):
    return torch.randint(31, (B, T))


def with_gradients(y, **inputs):
    """y and each input's gradient through a random cotangent, the same for the same shape of y."""
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, list(inputs.values()), cotangent)
    return {"y": y, **{f"gradient of {name}": g for name, g in zip(inputs, gradients)}}


def double_loop(q, k, v, causal=True):
    """y_t = sum_s (q_t.k_s) v_s / sum_s (q_t.k_s), term by term, and the weights (B, H, T, T)."""
    T, y, weights = q.shape[2], [], []
    for t in range(T):
        similarity = [(q[:, :, t] * k[:, :, s]).sum(-1) * (s <= t or not causal) for s in range(T)]
        weights.append(torch.stack([a / sum(similarity) for a in similarity], dim=-1))
        y.append(sum(weights[t][..., s, None] * v[:, :, s] for s in range(T)))
    return torch.stack(y, dim=2), torch.stack(weights, dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Feature maps


def plain_map(phi, x, offset=0):
    """The table in FeatureMap's docstring, written again."""
    D, T = x.shape[-1], x.shape[-2]
    u = x if phi.weight is None else torch.einsum("bhtd,hde->bhte", x, phi.weight)
    u = u if phi.bias is None else u + phi.bias[None, :, None]
    a = torch.tensor([[math.pi / 2 * (offset + t) / phi.max_len] for t in range(T)], dtype=x.dtype)
    z, live = x / D ** 0.25, x * (x > 0)
    return {
        "hedgehog": lambda: torch.cat([e.exp() / e.exp().sum(-1, keepdim=True) for e in (u, -u)], -1),
        "hedgehog_exp": lambda: torch.cat((u.exp(), (-u).exp()), -1),
        "elu": lambda: torch.where(x > 0, 1 + x, x.exp()),
        "relu": lambda: live,
        "t2r": lambda: u * (u > 0),
        "exp": lambda: (phi.temperature * x).exp(),
        "performer": lambda: torch.stack([(z * w[:, None]).sum(-1) for w in phi.projection.unbind(1)], -1).sub(
            z.square().sum(-1, keepdim=True) / 2).exp() / phi.feature_dim ** 0.5,
        "cosformer": lambda: torch.cat((live * a.cos(), live * a.sin()), -1),
        "taylor": lambda: torch.cat((z[..., :1] ** 0, z, *(z * z[..., i:i + 1] / 2 ** 0.5 for i in range(D))), -1),
    }[phi.kind]()


@each_map
def test_a_map_is_its_formula_and_a_layer_attends_with_it(kind):
    # Of hedgehog_exp the literal exp(+-(xW + b)): LoLCATs subtracts each key's own maximum, which reweights the keys.
    module, (q, k, v) = layer(kind, temperature=2.0, n_features=6, max_len=40), normal(20, scale=2)
    phi_q, phi_k = plain_map(module.map_q, q, 3), plain_map(module.map_k, k, 3)
    assert_close(module.map_k(k, offset=3), phi_k)
    assert module.map_k.feature_dim == phi_k.shape[-1]
    for form in ("chunked", "recurrent"):
        assert_close(module(q, k, v, form, offset=3), linear_attention(phi_q, phi_k, v, "quadratic"))


def test_each_half_of_hedgehogs_map_sums_to_one():
    # fla#195: one softmax over both halves is another map.
    phi = layer("hedgehog").map_q(normal(7, scale=3)[0])
    assert_close(phi.unflatten(-1, (2, 4)).sum(-1), torch.ones(2, 2, 7, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", hedgehog.LEARNED_MAPS)
def test_a_learned_map_starts_as_the_identity_with_a_bias_only_where_asked(kind):
    phi = FeatureMap(3, 4, kind)
    assert_close(phi.weight, torch.eye(4).expand(3, 4, 4), **EXACTLY)
    assert (phi.bias is not None) == (kind == "t2r")  # T2R has no version without
    assert_close(FeatureMap(3, 4, kind, bias=True).bias, torch.zeros(3, 4), **EXACTLY)
    assert_close(FeatureMap(3, 4, kind, scale=0.7).weight, 0.7 * torch.eye(4).expand(3, 4, 4), **EXACTLY)


@pytest.mark.parametrize("kind", hedgehog.LEARNED_MAPS)
def test_a_learned_temperature_scales_the_W_of_its_head_and_starts_at_one(kind):
    phi, plain, x = FeatureMap(2, 4, kind, learn_temperature=True), FeatureMap(2, 4, kind), torch.randn(1, 2, 5, 4)
    assert_close(phi(x), plain(x), **EXACTLY)
    with torch.no_grad():
        phi.log_temperature.copy_(torch.tensor([0.0, 2.0]).log())  # e^-inf = 0 and 2
        plain.weight *= torch.tensor([0.0, 2.0])[:, None, None]
    assert_close(phi(x), plain(x))


def test_q_and_k_have_a_map_each_unless_tied():
    def count(**options):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, **options))
        return sum(p.numel() for name, p in model.named_parameters() if "map" in name)
    one = 2 * 2 * 4 * 4  # n_layer H D D
    assert (count(), count(tie_qk=True), count(attention="exp")) == (2 * one, one, 0)
    performer = LinearAttention(2, 4, "performer")
    assert performer.map_q.projection is performer.map_k.projection  # w.q and w.k estimate q.k with the same w alone


def test_the_config_reaches_the_maps():
    model = GPT(GPTConfig(block_size=12, n_layer=1, n_head=2, n_embd=8, feature_bias=True, temperature=2.5,
                          chunk_size=3, segment_size=5, map_scale=0.5, learn_temperature=True))
    linear = model.transformer.h[0].attn.linear
    assert (linear.chunk_size, linear.segment_size) == (3, 5)
    for phi in (linear.map_q, linear.map_k):
        assert (phi.bias is not None, phi.temperature, phi.max_len) == (True, 2.5, 12)
        assert phi.weight[0, 0, 0] == 0.5 and phi.log_temperature.shape == (2,)


@pytest.mark.parametrize("kind", ["hedgehog", "hedgehog_exp"])
def test_at_the_fourth_root_of_its_width_a_map_starts_as_peaked_as_softmax(kind):
    D = 16
    phi, zero = FeatureMap(1, D, kind, scale=D ** 0.25).double(), torch.zeros(1, 1, 1, D, dtype=torch.float64)
    weight = lambda q, k: (phi(q, is_query=True) * phi(k)).sum().log()  # noqa: E731
    mixed = torch.autograd.functional.hessian(weight, (zero, zero))[0][1].view(D, D)      # d^2 / dq dk
    centred = torch.eye(D, dtype=torch.float64) - (1 / D if kind == "hedgehog" else 0)    # q less its mean: its softmax
    assert_close(mixed, centred / math.sqrt(D))


def test_taylors_kernel_is_the_second_order_expansion_of_softmaxs():
    phi, (q, k, _) = FeatureMap(2, 4, "taylor"), normal(9)
    s = q @ k.mT / math.sqrt(4)
    assert_close(phi(q, is_query=True) @ phi(k).mT, 1 + s + s ** 2 / 2)


def test_cosformers_kernel_weighs_by_the_cosine_of_the_distance():
    phi, (q, k, _) = FeatureMap(2, 4, "cosformer", max_len=12), normal(9)
    distance = torch.arange(9.0, dtype=torch.float64).unsqueeze(-1) - torch.arange(9.0, dtype=torch.float64)
    expected = F.relu(q) @ F.relu(k).mT * torch.cos(math.pi * distance / (2 * 12))
    assert_close(phi(q, offset=3, is_query=True) @ phi(k, offset=3).mT, expected)


@pytest.mark.parametrize("kind", ["hedgehog_exp", "exp"])
def test_large_queries_attend_exactly(kind):
    # A factor on a query cancels, so queries are shifted by their maximum; only keys are capped.
    module, q, (k, v) = layer(kind), normal(20, scale=40)[0], normal(20)[1:]
    expected = linear_attention(plain_map(module.map_q, q), plain_map(module.map_k, k), v, "quadratic")
    assert_close(module(q, k, v), expected)


def test_small_features_of_elu_keep_their_digits():
    # 1 + F.elu(x) is 0 in float32 from x = -17 on, while its gradient goes on as e^x: 0 in the sum, 1e21 in backward.
    phi, x = FeatureMap(1, 1, "elu"), torch.linspace(-40, 2, 43).view(1, 1, -1, 1)
    assert_close(phi(x), plain_map(phi, x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("m", [1, 4, 6, 16])
def test_performers_kernel_is_an_unbiased_estimate_of_softmaxs_and_better_with_more_features(m):
    # The signs of Q in QR = A are LAPACK's choice: left as they are, w is lopsided and the kernel 20 to 50 % too large.
    H, D = 40_000, 4  # every head is one draw of the w_i
    phi = FeatureMap(H, D, "performer", n_features=m).double()
    q, k = 0.5 * torch.randn(2, 1, 1, 3, D, dtype=torch.float64)
    draws = (phi(q.expand(1, H, 3, D)) @ phi(k.expand(1, H, 3, D)).mT)[0]                 # (H, 3, 3)
    kernel = (q @ k.mT / math.sqrt(D)).exp()[0, 0]
    assert ((draws.mean(0) - kernel).abs() < 4 * draws.std(0) / math.sqrt(H)).all()
    independent = kernel ** 2 * (((q.mT[0, 0].T[:, None] + k[0, 0]) ** 2).sum(-1) / math.sqrt(D)).expm1() / m
    assert (draws.var(0) < 1.2 * independent).all()
    w = phi.projection[:, :min(m, D)]  # and orthogonal within a block, which makes it better still
    assert_close(w @ w.mT, w.square().sum(-1).diag_embed(), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# All forms are one function


@causal_or_not
def test_quadratic_is_the_papers_equation(causal):
    # fla#594, #850: a denominator summed over heads instead of time. fla#875: it gave no gradient to k.
    q, k, v = mapped(13)
    y, weights = linear_attention(q, k, v, "quadratic", causal), attention_weights(q, k, causal)
    assert_close(with_gradients(y, q=q, k=k, v=v), with_gradients(double_loop(q, k, v, causal)[0], q=q, k=k, v=v))
    assert_close(with_gradients(weights, q=q, k=k), with_gradients(double_loop(q, k, v, causal)[1], q=q, k=k))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@each_map
def test_every_form_gives_the_same_values_and_gradients(kind, T):
    # The classic is a T that is no multiple of the chunk. Here: chunks that divide it or not, of 1, and beyond T.
    module, (q, k, v) = layer(kind), normal(T)

    def run(form, chunk_size=64, segment_size=0):
        module.chunk_size, module.segment_size = chunk_size, segment_size
        return with_gradients(module(q, k, v, form), q=q, k=k, v=v, **dict(module.named_parameters()))
    expected = run("quadratic")
    for variant in [("cumsum",), ("recurrent",), ("chunked", 1), ("chunked", 7), ("chunked", 64), ("chunked", 1000),
                    ("chunked", 7, 50), ("chunked", 64, 64), ("chunked", 16, 1000)]:
        assert_close(run(*variant), expected, msg=f"{variant} differs from quadratic".__add__)


@each_map
def test_gradients_are_those_of_finite_differences(kind):
    module, inputs = layer(kind, H=1, D=3, chunk_size=2, segment_size=3, n_features=4), normal(5, H=1, D=3, B=1)

    def attend(q, k, v, *parameters):
        names = (name for name, _ in module.named_parameters())
        return torch.func.functional_call(module, dict(zip(names, parameters)), (q, k, v))
    assert torch.autograd.gradcheck(attend, (*inputs, *module.parameters()))


@each_form
def test_without_the_mask_every_form_sees_all_tokens(form):
    q, k, v = mapped(65)
    expected = with_gradients(linear_attention(q, k, v, "quadratic", causal=False), q=q, k=k, v=v)
    assert_close(with_gradients(linear_attention(q, k, v, form, causal=False), q=q, k=k, v=v), expected)


@each_map
@pytest.mark.parametrize("first", ["chunked", "recurrent"])
@pytest.mark.parametrize("second", ["chunked", "recurrent"])
def test_a_sequence_resumes_where_another_call_stopped(kind, first, second):
    # fla#267: decoding lost the denominator's state. The gradients show that the state stays on the graph.
    module, (q, k, v) = layer(kind, chunk_size=16, segment_size=24), normal(70)
    y, final = module(q, k, v, return_state=True)
    whole = with_gradients(y, q=q, k=k, v=v)
    for t in (1, 16, 33, 69):
        a, state = module(q[:, :, :t], k[:, :, :t], v[:, :, :t], first, return_state=True)
        rest = q[:, :, t:], k[:, :, t:], v[:, :, t:], second, state
        b, state = module(*rest, return_state=True, offset=t)
        assert_close(module(*rest, offset=t), b)
        assert_close(with_gradients(torch.cat((a, b), dim=2), q=q, k=k, v=v), whole)
        assert_close(state, final)


def test_segments_keep_no_features_for_the_backward_pass():
    def kept(segment_size):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            layer("hedgehog", segment_size=segment_size)(*normal(200))
        return sum(sizes)
    assert kept(50) < kept(0) / 10


# ---------------------------------------------------------------------------------------------------------------------
# What the function must and must not do


@each_map
@each_form
def test_future_tokens_cannot_change_the_past(kind, form):
    module, (q, k, v) = layer(kind, chunk_size=16, segment_size=24), normal(65)
    for t in (30, 48):  # inside a chunk, and at the border of a chunk and a segment
        y = module(q, k, v, form)
        changed = module(*(torch.cat((x[:, :, :t], 1 - 2 * x[:, :, t:]), dim=2) for x in (q, k, v)), form)
        assert_close(changed[:, :, :t], y[:, :, :t], **EXACTLY)
        for gradient in torch.autograd.grad(y[:, :, :t].square().sum(), (q, k, v)):
            assert (gradient[:, :, t:] == 0).all()


@pytest.mark.parametrize("dim", [0, 1], ids=["batch rows", "heads"])
@each_form
def test_batch_rows_and_heads_do_not_mix(form, dim):
    module, inputs = layer("hedgehog", chunk_size=16, segment_size=24), normal(40)
    y = module(*inputs, form).select(dim, 0)
    for gradient in torch.autograd.grad(y, inputs, torch.randn_like(y)):
        assert (gradient.select(dim, 1) == 0).all() and (gradient.select(dim, 0) != 0).any()


@each_map
@each_form
def test_constant_values_come_back_unchanged(kind, form):
    # The weights of a mean sum to one. fla#47, #130: a scale was applied to the numerator alone.
    q, k, _ = normal(65)
    v = torch.randn(2, 2, 1, 4, dtype=torch.float64).expand(2, 2, 65, 4)
    y = LinearAttention(2, 4, kind, chunk_size=16).double()(2 * q.abs(), k.abs(), v, form)  # positive: relu stays alive
    assert_close(y, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
@causal_or_not
@each_form
def test_the_scale_of_the_features_decides_nothing(form, causal, scale, dtype):
    # Distilled maps reach denominators of 1e-28: + 1e-6, or a clamp at 1e-12, silently zeroes their heads.
    q, k, v = mapped(65, dtype=dtype)

    def run(scale):
        return with_gradients(linear_attention(scale * q, scale * k, v, form, causal), q=q, k=k, v=v)
    assert_close(run(scale), run(1.0), rtol=1e-4, atol=1e-4)
    assert_close(attention_weights(scale * q, scale * k, causal), attention_weights(q, k, causal))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_features_decides_nothing_when_decoding(scale):
    # LoLCATs has an eps in training and none when it decodes, so the same weights give two models.
    (q, k, v), state, y = mapped(65, dtype=torch.float32), None, []
    for q_t, k_t, v_t in zip(*(x.split(1, dim=2) for x in (scale * q, scale * k, v))):
        y_t, state = linear_attention(q_t, k_t, v_t, "recurrent", state=state, return_state=True)
        y.append(y_t)
    assert_close(torch.cat(y, dim=2), linear_attention(q, k, v, "quadratic"), rtol=1e-5, atol=1e-5)


@causal_or_not
@each_form
def test_a_padded_key_counts_nowhere(form, causal):
    # A key of zero must leave the denominator too; the last chunk (T = 20, L = 16) pads itself with such keys.
    q, k, v = mapped(20)
    kept = torch.arange(20) % 3 != 1
    y = linear_attention(q, k * kept[:, None], v, form, causal, chunk_size=16)
    assert_close(y[:, :, kept], double_loop(q[:, :, kept], k[:, :, kept], v[:, :, kept], causal)[0])


@causal_or_not
@each_form
def test_dead_features_give_zeros_and_finite_gradients(form, causal):
    # kyegomez/Hedgehog#4: NaN from 0 / 0. Keys that are all negative: relu leaves nothing of them.
    q, k, v = normal(20)
    dead = F.relu(-k.abs())
    y = linear_attention(F.relu(q), dead, v, form, causal)
    assert (y == 0).all() and (attention_weights(F.relu(q), dead, causal) == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@each_map
@each_form
def test_large_inputs_stay_finite_forward_and_backward(form, kind, magnitude):
    # exp(100) is beyond float32. So is S / eps in the gradient of a query whose keys have all but vanished.
    module = layer(kind, dtype=torch.float32, segment_size=24)
    q, k, v = normal(65, dtype=torch.float32, scale=magnitude)
    result = with_gradients(module(q, k, v, form), q=q, k=k, v=v, **dict(module.named_parameters()))
    assert not [name for name, x in result.items() if not x.isfinite().all()]
    assert result["gradient of k"].abs().max() < 1e6 * magnitude
    assert result["y"].abs().max() < 1.001 * v.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Precision: sums are float32 under half precision


def rounding(dtype, atol=2e-6):
    """The bound: rounding the exact result of the rounded inputs once to dtype, and atol for the float32 before."""
    return {"rtol": torch.finfo(dtype).eps / 2, "atol": atol, "check_dtype": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@causal_or_not
@each_form
def test_half_precision_costs_one_rounding_of_the_output(form, causal, dtype):
    q, k, v = mapped(200, dtype=dtype)
    y, weights = linear_attention(q, k, v, form, causal), attention_weights(q, k, causal)
    q, k, v = q.double(), k.double(), v.double()
    assert (y.dtype, weights.dtype) == (dtype, torch.float32)
    assert_close(y, linear_attention(q, k, v, "quadratic", causal), **rounding(dtype))
    assert_close(weights, attention_weights(q, k, causal), **rounding(torch.float32))


@each_map
def test_a_layer_in_half_precision_maps_and_sums_in_float32(kind):
    module, (q, k, v) = layer(kind, dtype=torch.float32), normal(65, dtype=torch.bfloat16)
    y, state = module(q, k, v, return_state=True)
    assert (y.dtype, state.dtype, module.map_q(q).dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = module.double()(q.double(), k.double(), v.double(), "quadratic")
    assert_close(y, exact, **rounding(torch.bfloat16, atol=2e-5))


@each_map
@each_form
def test_autocast_casts_q_k_and_v_as_for_softmax_and_changes_no_other_bit(kind, form):
    module, (q, k, v) = layer(kind, dtype=torch.float32, segment_size=24), normal(65, dtype=torch.float32)

    def run(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(*(x if autocast else x.bfloat16() for x in (q, k, v)), form)
            weights = attention_weights(module.map_q(q), module.map_q(k))
        return {**with_gradients(y, q=q, k=k, v=v), "weights": weights}
    results = run(True)
    assert results["y"].dtype == torch.bfloat16 and results["weights"].dtype == torch.float32
    assert_close(results, run(False), **EXACTLY)


@pytest.mark.parametrize("form", ["cumsum", "chunked", "recurrent"])
def test_sums_do_not_drift_over_8192_tokens(form):
    # A sum of ones in bf16 stops at 256, and a denominator was 27 % off at t = 1,024.
    half = mapped(8192, P=2, D=1, dtype=torch.bfloat16)
    q, k, v = (x.detach().double() for x in half)
    S = (k.unsqueeze(-1) * F.pad(v, (0, 1), value=1.0).unsqueeze(-2)).cumsum(2)           # (B, H, T, P, D+1)
    expected = (q.unsqueeze(-2) @ S).squeeze(-2)
    with torch.no_grad():
        y = linear_attention(*half, form)
        assert_close(y, expected[..., :-1] / expected[..., -1:], **rounding(torch.bfloat16, atol=1e-5))
        if form != "cumsum":
            state = linear_attention(*half, form, return_state=True)[1]
            assert_close(state, S[:, :, -1], rtol=2e-5, atol=0, check_dtype=False)


@each_form
def test_sums_beyond_the_range_of_float16_are_right(form):
    # fla#1187: the state overflowed in float16, which ends at 65,504. Here it reaches 4e6.
    q, k, v = (scale * x for scale, x in zip((200, 200, 100), mapped(400, dtype=torch.float16)))
    expected = linear_attention(q.double(), k.double(), v.double(), "quadratic")
    assert_close(linear_attention(q, k, v, form), expected, **rounding(torch.float16, atol=2e-4))


# ---------------------------------------------------------------------------------------------------------------------
# The hybrid: softmax over a window, the maps beyond


def plain_hybrid(module, q, k, v, keys=True):
    """HybridAttention's docstring, written again with all (T, T) weights and features as they are, not divided."""
    t, phi_q, phi_k = torch.arange(q.shape[2]), plain_map(module.map_q, q), plain_map(module.map_k, k)
    k, v, phi_k = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v, phi_k))
    log_gate = torch.einsum("bhtd,hd->bht", q, module.map_gate) + module.map_gate_bias[:, None]
    far = log_gate[..., None].exp() * (phi_q @ phi_k.mT)
    near = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    weights = torch.where(t[:, None] - t < module.window, near, far).tril() * keys
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-30)


@pytest.mark.parametrize("kind", hedgehog.HYBRID_MAPS)
@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("chunk_size", [3, 64])
def test_the_hybrid_is_softmax_over_the_window_and_the_map_beyond(kind, window, chunk_size):
    module = layer(kind, window=window, chunk_size=chunk_size, segment_size=24)
    for T in {1, max(1, window - 1), window, window + 1, 2 * window + 1, 100}:
        q, k, v = normal(T, scale=2)
        inputs = dict(q=q, k=k, v=v, **dict(module.named_parameters()))
        expected = with_gradients(plain_hybrid(module, q, k, v), **inputs)
        assert_close(with_gradients(module(q, k, v), **inputs), expected)


@pytest.mark.parametrize("kind", ["hedgehog_exp", "elu"])
@pytest.mark.parametrize("pieces", [[1] * 30, [5, 1, 1, 14, 9], [3, 27]], ids=str)
def test_the_hybrid_goes_on_from_the_last_tokens_and_the_sum_of_all_older_ones(kind, pieces):
    module, (q, k, v), state, y = layer(kind, window=4, chunk_size=3, segment_size=8), normal(30), None, []
    for parts in zip(*(x.split(pieces, dim=2) for x in (q, k, v))):
        y_i, state = module(*parts, "recurrent" if parts[0].shape[2] == 1 else "auto", state, return_state=True)
        y.append(y_i)
        assert [x.shape for x in state] == [(2, 2, 4, 4), (2, 2, 4, 5), (2, 2, module.map_q.feature_dim, 5)]
        assert all(x.untyped_storage().nbytes() == x.numel() * 8 for x in state)  # and no view of more
    inputs = dict(q=q, k=k, v=v, **dict(module.named_parameters()))
    assert_close(with_gradients(torch.cat(y, dim=2), **inputs), with_gradients(plain_hybrid(module, q, k, v), **inputs))


@pytest.mark.parametrize("kind", ["hedgehog_exp", "elu"])
@pytest.mark.parametrize("window", [1, 4, 16])
@pytest.mark.parametrize("pieces", [[37], [5, 1, 1, 14, 16], [3, 34]], ids=str)
def test_the_hybrid_takes_padding_row_by_row_and_grouped_queries(kind, window, pieces):
    module, state, y = layer(kind, H=4, window=window, chunk_size=3), None, []
    module.map_k = layer(kind, window=window).map_k                                       # K = 2
    (q, _, _), (_, k, v) = normal(37, H=4, B=4), normal(37, B=4)
    keys = torch.ones(4, 37, dtype=torch.bool)
    keys[0, :9], keys[1, 30:], keys[2, 12:20] = False, False, False
    for *parts, some in zip(*(x.split(pieces, dim=2) for x in (q, k, v)), keys.split(pieces, dim=1)):
        y_i, state = module.attend(*parts, "auto", state, True, 0, keys=some)
        y.append(y_i)
        assert all(x.shape[:2] == (4, 2) and x.untyped_storage().nbytes() == x.numel() * 8 for x in state)
    y, inputs = torch.cat(y, dim=2), dict(q=q, k=k, v=v, **dict(module.named_parameters()))
    expected = plain_hybrid(module, q, k, v, keys[:, None, None])
    assert_close(with_gradients(y, **inputs), with_gradients(expected, **inputs))
    assert (y[0, :, :9] == 0).all()  # a query of padding that sees no key


def test_the_hybrid_forms_no_T_by_T_weights():
    sizes, module = [], layer("hedgehog_exp", H=1, window=8, segment_size=0)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        module(*normal(1000, H=1, B=1))
    assert max(sizes) <= 1024 * 64  # of a chunk, linear in T


@pytest.mark.parametrize("kind", hedgehog.HYBRID_MAPS)
def test_an_old_key_starts_far_below_one_in_the_window(kind):
    module, x = HybridAttention(2, 4, kind, window=1).double(), torch.zeros(1, 2, 2, 4, dtype=torch.float64)
    weights = module(x, x, torch.eye(2, dtype=torch.float64).expand(1, 2, 2, 2))[0, :, 1]         # of the second query
    expected = 0 if kind in ("relu", "t2r") else math.exp(-5)  # 0 has no features there
    assert_close(weights[:, 0] / weights[:, 1], torch.full((2,), expected).double(), rtol=1e-6, atol=0)
    assert (module.map_gate == 0).all() and module.map_gate_bias.isfinite().all()


def test_what_the_hybrids_queries_were_divided_by_may_be_beyond_float32():
    module, (q, k, v) = layer("hedgehog_exp", window=4), normal(40, scale=2)
    q = (20 * q).detach().requires_grad_()
    assert module.map_q.log_shift(q).max() > 100  # e^88 is the end of float32
    expected = with_gradients(plain_hybrid(module, q, k, v), q=q, k=k, v=v)
    half = [x.detach().float().requires_grad_() for x in (q, k, v)]
    found = with_gradients(module.float()(*half), **dict(zip("qkv", half)))
    assert_close(found["y"], expected["y"].float(), rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in found.values())


def test_an_old_token_without_any_feature_leaves_the_window_alone():
    module, (q, k, v) = HybridAttention(2, 4, "relu", window=4).double(), normal(20)
    y = with_gradients(module(q, k - 100, v), q=q, k=k, v=v)
    window = with_gradients(hedgehog.sliding_window(q, k - 100, v, 4), q=q, k=k, v=v)
    assert_close(y, window)


@pytest.mark.parametrize("kind", hedgehog.HYBRID_MAPS)
def test_the_hybrid_in_half_precision_and_under_autocast_sums_in_float32(kind):
    module, (q, k, v) = layer(kind, dtype=torch.float32, window=4), normal(2000, H=2, B=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(q, k, v, return_state=True)
        wide = [x.detach().float() for x in (q, k, v)]
        with_autocast = module(*wide)
    assert y.dtype == torch.bfloat16 and {x.dtype for x in state} == {torch.float32}
    assert with_autocast.dtype == torch.bfloat16 and torch.equal(with_autocast, y)
    exact = module.double()(*(x.double() for x in (q, k, v)))
    assert_close(y, exact, **rounding(torch.bfloat16, atol=2e-5))


# ---------------------------------------------------------------------------------------------------------------------
# The GPT


@each_attention
@pytest.mark.parametrize("short_conv", [0, 3])
def test_a_layer_splits_heads_as_gpt2_does_and_maps_each_alone(attention, short_conv):
    # fla#28: the map was applied before the heads were split.
    attn = tiny_gpt(attention, short_conv=short_conv).transformer.h[0].attn
    x, y = torch.randn(2, 16, 8, dtype=torch.float64), []
    qkv = attn.short_conv(attn.c_attn(x)) if short_conv else attn.c_attn(x)
    for h in range(2):
        q, k, v = (part[:, None, :, 4 * h:4 * h + 4] for part in qkv.split(8, dim=-1))    # (B, 1, T, D)
        if attention == "softmax":
            weights = (q @ k.mT / math.sqrt(4)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
        else:  # a map holds a W for each head: give it this head twice, and take what the h-th W made of it
            phi_q, phi_k = (plain_map(phi, part.expand(-1, 2, -1, -1))[:, h:h + 1]
                            for phi, part in ((attn.linear.map_q, q), (attn.linear.map_k, k)))
            weights = attention_weights(phi_q, phi_k)
        y.append(weights @ v)
    assert_close(attn(x), attn.c_proj(torch.cat(y, dim=-1).squeeze(1)))


def test_the_layers_are_gpt2s():
    model, idx = tiny_gpt("softmax"), tokens(16)
    w = {name.removeprefix("transformer."): x for name, x in model.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    x = w["wte.weight"][idx] + w["wpe.weight"]
    for i, block in enumerate(model.transformer.h):
        x = x + block.attn(norm(x, f"h.{i}.ln_1"))
        x = x + linear(gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    assert_close(model(idx)[0], norm(x, "ln_f") @ w["wte.weight"].T)


@pytest.mark.parametrize("width", [1, 3, 20])  # alone, as usual, and longer than the text
def test_the_short_convolution_is_pytorchs(width):
    conv, x = hedgehog.ShortConv(12, width).double(), torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
    assert torch.equal(conv(x), x)                                                        # it starts as the identity
    torch.nn.init.normal_(conv.weight)
    expected = F.conv1d(F.pad(x.mT, (width - 1, 0)), conv.weight.flip(0).T.unsqueeze(1), groups=12).mT
    assert_close(with_gradients(conv(x), x=x, w=conv.weight), with_gradients(expected, x=x, w=conv.weight))


@pytest.mark.parametrize("attention", ["softmax", "hedgehog"])
def test_a_model_with_the_short_convolution_starts_as_the_one_without(attention):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(16, 31, 2, 2, 8, attention=attention))
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(16, 31, 2, 2, 8, attention=attention, short_conv=4)), tokens(16)
    assert torch.equal(model(idx)[0], plain(idx)[0])
    model.transformer.h[0].attn.short_conv.weight.data[1] = 1  # and is another one when it has moved
    assert not torch.allclose(model(idx)[0], plain(idx)[0])


@pytest.mark.parametrize("T, window", [(1, 1), (1, 5), (13, 1), (13, 4), (16, 8), (13, 20), (37, 5)])
def test_a_sliding_window_is_softmax_over_the_last_tokens(T, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    i, j = torch.arange(T).unsqueeze(1), torch.arange(T)
    hidden = (j > i) | (j <= i - window)
    expected = (q @ k.mT / math.sqrt(4)).masked_fill(hidden, -math.inf).softmax(-1) @ v
    y = hedgehog.sliding_window(q, k, v, window)
    assert_close(with_gradients(y, q=q, k=k, v=v), with_gradients(expected, q=q, k=k, v=v))


def test_the_first_layers_keep_softmax_and_their_window():
    model, idx = tiny_gpt("hedgehog", softmax_layers=1, window=5), tokens(16)
    assert [(block.attn.linear is None, block.attn.window) for block in model.transformer.h] == [
        (True, 5), (False, 0)]
    attn, x = model.transformer.h[0].attn, torch.randn(2, 16, 8, dtype=torch.float64)
    y = [attn(x[:, max(0, t - 4):t + 1])[:, -1] for t in range(16)]                       # five tokens and no more
    assert_close(attn(x), torch.stack(y, dim=1))
    whole = tiny_gpt("hedgehog", softmax_layers=1)
    whole.load_state_dict(model.state_dict())
    assert_close(whole(idx)[0][:, :5], model(idx)[0][:, :5])
    assert not torch.allclose(whole(idx)[0][:, 5:], model(idx)[0][:, 5:])


def test_a_window_longer_than_the_text_costs_no_more_than_the_text():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    assert_close(hedgehog.sliding_window(q, k, v, 10 ** 9), F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("T", [1, 16])
def test_dropout_acts_in_a_window_while_training(T):
    model = tiny_gpt("hedgehog", softmax_layers=1, window=5, dropout=0.5)
    attn, x = model.transformer.h[0].attn, torch.randn(2, T, 8, dtype=torch.float64)
    assert_close(attn.eval()(x), attn(x))
    assert not torch.allclose(attn.train()(x), attn(x))


def test_the_cache_of_a_window_is_as_long_as_the_window():
    model, idx = tiny_gpt("hedgehog", softmax_layers=1, window=5), tokens(16)
    cache = model.new_cache()
    for t in range(16):
        model(idx[:, t:t + 1], cache=cache)
        assert cache[0]["k"].shape == cache[0]["v"].shape == (2, 2, min(t + 1, 4), 4)
        assert cache[0]["k"].untyped_storage().nbytes() == 2 * 2 * min(t + 1, 4) * 4 * 8 and cache[0]["offset"] == t + 1


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("pieces", [[1] * 16, [5, 1, 1, 7, 2], [3, 13]], ids=str)
def test_cached_logits_of_first_layers_with_softmax_are_those_of_the_full_forward(pieces, window):
    model, idx = tiny_gpt("hedgehog", short_conv=3, softmax_layers=1, window=window), tokens(16)
    cache = model.new_cache()
    logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(idx)[0])


@pytest.mark.parametrize("hybrid_window", [1, 5, 99])
@pytest.mark.parametrize("others", [{}, dict(short_conv=3, softmax_layers=1, window=3)], ids=str)
@pytest.mark.parametrize("pieces", [[1] * 16, [5, 1, 1, 7, 2], [3, 13]], ids=str)
def test_cached_logits_of_a_hybrid_are_those_of_the_full_forward(hybrid_window, others, pieces):
    model, idx = tiny_gpt("hedgehog_exp", hybrid_window=hybrid_window, **others), tokens(16)
    assert isinstance(model.transformer.h[1].attn.linear, HybridAttention)
    assert (model.transformer.h[0].attn.linear is None) == bool(others)
    cache = model.new_cache()
    logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(idx)[0])
    assert cache[1]["state"][0].shape[2] == min(hybrid_window, 16)  # never more than the block
    prompt = tokens(21)  # longer than block_size, and past it
    assert torch.equal(model.generate(prompt, 20, 0), model.generate(prompt, 20, 0, use_cache=False))


def test_a_hybrid_whose_window_holds_the_text_is_softmax_and_another_is_not():
    softmax, idx = tiny_gpt("softmax"), tokens(16)
    for window in (16, 15):
        model = tiny_gpt("hedgehog", hybrid_window=window)
        model.load_state_dict(softmax.state_dict(), strict=False)
        assert torch.allclose(model(idx)[0], softmax(idx)[0]) == (window == 16)


def test_a_hybrid_gpt_is_one_graph_for_torch_compile_with_its_segments():
    model, idx = tiny_gpt("hedgehog_exp", hybrid_window=5).float(), tokens(16)

    def gradients(function):
        model.zero_grad()
        function(idx, idx)[1].backward()
        return [p.grad for p in model.parameters()]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(gradients(compiled), gradients(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, window", [("hedgehog", 0), ("hedgehog_exp", 0), ("elu", 0), ("hedgehog_exp", 3)])
def test_segments_are_compiled_for_any_length(kind, window):
    if window and torch.__version__ < "2.6":
        pytest.skip("torch 2.5 stumbles over the square root of a D that it takes for a variable")
    torch.compiler.reset()
    layer = LinearAttention(2, 4, kind, segment_size=8)
    if window:
        layer = HybridAttention(2, 4, kind, segment_size=8, window=window)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for T in (12, 15):
        x = torch.randn(3, 1, 2, T, 4, requires_grad=True)
        assert_close(*(torch.autograd.grad(f(*x).square().sum(), x) for f in (compiled, layer)))


@each_map
def test_a_map_is_made_under_a_default_of_half_precision(kind):
    torch.set_default_dtype(torch.bfloat16)
    try:
        y = LinearAttention(2, 4, kind)(*torch.randn(3, 1, 2, 5, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_attention_runs_without_data():
    with torch.device("meta"):
        for layer in (LinearAttention(2, 4), HybridAttention(2, 4, window=3)):
            layer(*torch.randn(3, 1, 2, 20, 4)).sum().backward()
            assert layer.map_q.weight.grad.shape == (2, 4, 4)


def reset_as_fsdp_does(layer):
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("kind, window", [*((kind, 0) for kind in hedgehog.FEATURE_MAPS),
                                          *((kind, 3) for kind in hedgehog.HYBRID_MAPS)])
def test_a_layer_made_on_the_meta_device_becomes_a_new_one(kind, window):
    options = dict(bias=True, scale=2.0, learn_temperature=True)

    def make():
        kind_of_layer = partial(HybridAttention, window=window) if window else LinearAttention
        return kind_of_layer(2, 4, kind, **options)
    torch.manual_seed(1)
    new = make().state_dict()
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for x in layer.state_dict().values():
        x.fill_(math.nan)
    torch.manual_seed(1)
    reset_as_fsdp_does(layer)
    assert layer.state_dict().keys() == new.keys()
    for name, x in layer.state_dict().items():
        assert_close(x, new[name], rtol=0, atol=0)


def test_a_sharded_layer_made_on_the_meta_device_becomes_a_new_one():
    import torch.distributed as dist
    import torch.distributed.fsdp as fsdp
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("fully_shard came with PyTorch 2.6")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            layer = HybridAttention(2, 4, bias=True, scale=2.0, window=3)
        fsdp.fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
        layer.to_empty(device="cpu")
        reset_as_fsdp_does(layer)
        new = HybridAttention(2, 4, bias=True, scale=2.0, window=3).state_dict()
        for name, x in layer.state_dict().items():
            assert_close(x.full_tensor(), new[name], rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


@each_attention
@pytest.mark.parametrize("short_conv", [0, 3])
@pytest.mark.parametrize("pieces", [[1] * 16, [5, 1, 1, 7, 2], [3, 13]], ids=str)
def test_cached_logits_are_those_of_the_full_forward(attention, pieces, short_conv):
    model, idx = tiny_gpt(attention, short_conv=short_conv), tokens(16)
    cache = model.new_cache()
    logits = torch.cat([model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)], dim=1)
    assert_close(logits, model(idx)[0])


@each_attention
@pytest.mark.parametrize("temperature", [0, 4])  # the likeliest token, which soon repeats itself, and a varied text
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("short_conv", [0, 3])
def test_generation_past_block_size_is_that_of_a_plain_loop(attention, temperature, use_cache, short_conv):
    model, prompt = tiny_gpt(attention, short_conv=short_conv), tokens(21)
    # longer than block_size = 16: only its end is read
    window, expected = prompt[:, -16:], prompt
    torch.manual_seed(1)
    for _ in range(30):
        window = window if window.shape[1] <= 16 else window[:, -8:]  # when the block is full, its newest half
        logits = model(window)[0][:, -1].float()
        token = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax(-1, True)
        window, expected = torch.cat((window, token), dim=1), torch.cat((expected, token), dim=1)
    torch.manual_seed(1)
    assert torch.equal(model.generate(prompt, 30, temperature, use_cache=use_cache), expected)


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (4.0, None), (4.0, 3), (1.0, 1000)])
def test_sampling_follows_temperature_and_top_k(temperature, top_k):
    model, prompt = tiny_gpt(), tokens(5, B=1)
    logits = model(prompt)[0][0, -1]
    p = (logits / temperature).exp() * (logits >= logits.sort().values[-min(top_k or 31, 31)])
    drawn = model.generate(prompt.expand(10_000, 5), 1, temperature, top_k)[:, -1].bincount(minlength=31) / 10_000
    assert_close(drawn, (p / p.sum()).float(), rtol=0, atol=0.02)


@each_attention
@pytest.mark.parametrize("short_conv", [0, 3])
def test_a_token_adds_nothing_to_the_state_but_a_row_to_the_cache_of_softmax(attention, short_conv):
    model, idx = tiny_gpt(attention, short_conv=short_conv), tokens(16)
    cache = model.new_cache()
    for t in range(16):
        model(idx[:, t:t + 1], cache=cache)
        for past, block in zip(cache, model.transformer.h):
            if attention == "softmax":  # (B, H, block_size, D), written up to here
                assert past["offset"] == t + 1 and past["k"].shape == past["v"].shape == (2, 2, 16, 4)
                past["k"][:, :, t + 1:] = past["v"][:, :, t + 1:] = math.nan
            else:
                assert past["state"].shape == (2, 2, block.attn.linear.map_q.feature_dim, 4 + 1)
                assert past.keys() == {"state", "offset"} | ({"conv"} if short_conv else set())
            if short_conv:  # two tokens, and no view of more
                assert past["conv"].shape == (2, 2, 24) and past["conv"].untyped_storage().nbytes() == 2 * 2 * 24 * 8
    assert all(x.isfinite().all() for past in cache for x in past.values() if torch.is_tensor(x))


def test_the_loss_is_the_mean_cross_entropy_where_the_target_is_not_minus_one():
    model, idx, targets = tiny_gpt(), tokens(16), tokens(16)
    targets[0, :10] = -1
    logits, loss = model(idx, targets)
    nats = [-logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(16) if targets[b, t] >= 0]
    assert_close(loss, sum(nats) / 22)
    assert logits.stride(1) == 64  # the output matrix is padded for the loss, from 31 rows
    plain = model(idx)[0]  # without that
    assert_close(logits, plain)
    expected = F.cross_entropy(plain.flatten(0, 1), targets.flatten(), ignore_index=-1)
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)):
        assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_the_parameters_have_gpt2s_names_and_initial_values(bias):
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=2, n_head=2, n_embd=64, bias=bias))
    inner = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = [*(f"transformer.h.{i}.{name}" for i in range(2) for name in inner), "transformer.ln_f"]
    names = {f"{name}.weight" for name in (*modules, "transformer.wte", "transformer.wpe", "lm_head")}
    names |= {f"{name}.bias" for name in modules if bias}
    names |= {f"transformer.h.{i}.attn.linear.map_{x}.weight" for i in range(2) for x in "qk"}
    assert set(model.state_dict()) == names
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            assert (p == name.endswith("weight")).all(), name  # a norm's weight is 1, every bias 0
        elif "map" in name:
            assert_close(p, torch.eye(32).expand(2, 32, 32), **EXACTLY)
        else:  # the 2 n_layer branches that end in a c_proj add up
            std = 0.02 / math.sqrt(2 * 2) if "c_proj" in name else 0.02
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 0.1 * std, name


@pytest.mark.parametrize("attention", ["softmax", "hedgehog"])
def test_dropout_acts_in_training_alone(attention):
    model, without, idx = tiny_gpt(attention, dropout=0.5), tiny_gpt(attention), tokens(16)
    without.load_state_dict(model.state_dict())
    assert_close(model(idx)[0], without(idx)[0], **EXACTLY)
    model.train()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in layers] == [0.5]  # that of the embedding; the branches have none
    assert not torch.equal(model(idx)[0], without(idx)[0])
    layers[0].p = 0.0  # softmax drops its weights too; linear attention never forms them
    assert torch.equal(model(idx)[0], without(idx)[0]) == (attention != "softmax")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: a ValueError that names the remedy


x, state, ids = torch.ones(1, 2, 5, 4), torch.zeros(1, 2, 4, 5), torch.zeros(1, 17, dtype=torch.long)


def overfill(model):
    cache = model.new_cache()
    for piece in ids.split(16, dim=1):  # 16, then the one token too many
        model(piece, cache=cache)


BAD_CALLS = [
    ("unknown form 'flash': choose one of", lambda: linear_attention(x, x, x, "flash")),
    ("expected q and k", lambda: linear_attention(x[0], x[0], x[0])),
    ("expected q and k", lambda: linear_attention(x, x[..., :3], x)),
    ("expected q and k", lambda: linear_attention(x, x[:, :, :1], x)),
    ("expected q and k", lambda: linear_attention(x, x, x[:, :1])),
    ("expected q and k", lambda: linear_attention(x, x, x[0])),
    ("T >= 1", lambda: linear_attention(x[:, :, :0], x[:, :, :0], x[:, :, :0])),
    (r"dtype.*v\.to", lambda: linear_attention(x, x, x.half())),
    ("dtype", lambda: linear_attention(x, x.double(), x)),
    ("floating-point", lambda: linear_attention(x.int(), x.int(), x.int())),
    ("one device", lambda: linear_attention(x, x, x.to("meta"))),
    ("chunk_size must be at least 1, got 0", lambda: linear_attention(x, x, x, chunk_size=0)),
    (r"state must be \(1, 2, 4, 5\)", lambda: linear_attention(x, x, x, state=state[..., :4])),
    (r"state must be \(1, 2, 4, 5\)", lambda: linear_attention(x, x, x, state=state[:, :1])),
    ("state must be .*float32.*float64", lambda: linear_attention(x, x, x, state=state.double())),
    ("state must be .*float32.*float16", lambda: linear_attention(x.half(), x.half(), x.half(), state=state.half())),
    ("carry a state.*quadratic", lambda: linear_attention(x, x, x, "quadratic", state=state)),
    ("carry a state.*cumsum", lambda: linear_attention(x, x, x, "cumsum", return_state=True)),
    ("carry a state.*causal=False", lambda: linear_attention(x, x, x, causal=False, return_state=True)),
    ("carry a state.*causal=False", lambda: linear_attention(x, x, x, causal=False, state=state)),
    ("unknown feature map 'gelu': choose one of", lambda: FeatureMap(2, 4, "gelu")),
    ("knows 8 positions, got at least 9: raise max_len", lambda: FeatureMap(2, 4, "cosformer", max_len=8)(x, offset=4)),
    ("got at least 2", lambda: LinearAttention(2, 4, "cosformer", segment_size=2, max_len=1)(x, x, x)),
    ("unknown attention 'flash': choose one of", lambda: GPTConfig(attention="flash")),
    ("n_embd=10 must be divisible by n_head=4", lambda: GPTConfig(n_embd=10, n_head=4)),
    ("n_layer, n_head.*at least 1", lambda: GPTConfig(n_head=0)),
    ("chunk_size must be at least 1|chunk_size.*at least 1", lambda: GPTConfig(chunk_size=0)),
    ("segment_size=-1", lambda: GPTConfig(segment_size=-1)),
    ("short_conv=-1", lambda: GPTConfig(short_conv=-1)),
    (r"softmax_layers=13 must be in \[0, n_layer=12\]", lambda: GPTConfig(softmax_layers=13)),
    ("window=-1", lambda: GPTConfig(softmax_layers=1, window=-1)),
    ("window=8 must be at least 0, and 0 where no layer keeps softmax", lambda: GPTConfig(window=8)),
    ("hybrid_window=-1 must be at least 0", lambda: GPTConfig(hybrid_window=-1)),
    *((f"softmax over a window and {kind} beyond do not go.*choose one of hedgehog,",
       lambda kind=kind: GPTConfig(attention=kind, hybrid_window=8))
      for kind in ("softmax", "exp", "performer", "cosformer")),
    ("do not go together", lambda: HybridAttention(2, 4, "cosformer", window=3)),
    ("window of at least 1 token, got 0", lambda: HybridAttention(2, 4, window=0)),
    ("no form 'quadratic'", lambda: HybridAttention(2, 4, window=3)(x, x, x, "quadratic")),
    (r"expected q and k \(B, 2, T, 4\)", lambda: LinearAttention(2, 4)(x, x[:, :, :2], x)),
    (r"expected q and k \(B, 2, T, 4\)", lambda: LinearAttention(2, 4, segment_size=2)(x, x, x[:, :, :2])),
    (r"expected q and k \(B, 3, T, 4\)", lambda: LinearAttention(3, 4)(x, x, x)),
    (r"expected q and k \(B, 2, T, 4\)", lambda: HybridAttention(2, 4, window=2)(*[x[:, :, :0]] * 3)),
    (r"expected q and k \(B, 2, T, 4\)", lambda: HybridAttention(2, 4, window=2)(x, x, x[..., 0])),
    ("state is not of this hybrid", lambda: HybridAttention(2, 4, window=2)(
        x, x, x, state=HybridAttention(2, 4, window=3)(x, x, x, return_state=True)[1])),
    ("state is not of this hybrid", lambda: HybridAttention(2, 4, window=2)(
        x, x, x, state=HybridAttention(2, 4, window=2)(*[x.repeat(2, 1, 1, 1)] * 3, return_state=True)[1])),
    ("state is not of this hybrid", lambda: HybridAttention(2, 4, window=2)(
        x, x, x, state=HybridAttention(2, 4, "elu", window=2)(x, x, x, return_state=True)[1])),
    ("state is not of this hybrid, or of another batch, dtype", lambda: HybridAttention(2, 4, window=2)(
        x, x, x, state=HybridAttention(2, 4, window=2)(*[x.double()] * 3, return_state=True)[1])),
    ("must be floating-point, got torch.int64", lambda: LinearAttention(2, 4)(x.long(), x.long(), x)),
    (r"expected q and k \(B, 2, T, 4\)", lambda: LinearAttention(2, 4)(x[:, :1], x[:, :1], x)),
    ("17 tokens does not fit block_size=16", lambda: tiny_gpt()(ids)),
    ("17 tokens does not fit block_size=16", lambda: overfill(tiny_gpt())),
    ("beyond the vocabulary of 31", lambda: tiny_gpt()(torch.tensor([[0, 31, 0]]))),
    ("vocabulary", lambda: tiny_gpt()(torch.tensor([[-1, 3]]))),
    ("finite temperature", lambda: tiny_gpt().generate(ids, 1, temperature=-1.0)),
    ("finite temperature.*got 1, inf", lambda: tiny_gpt().generate(ids, 1, temperature=math.inf)),
    ("needs tokens >= 0.*got -5,", lambda: tiny_gpt().generate(ids, -5)),
    ("top_k >= 1", lambda: tiny_gpt().generate(ids, 1, top_k=0)),
    ("prompt of at least one token", lambda: tiny_gpt().generate(ids[:, :0], 1)),
]


@pytest.mark.parametrize("message, call", BAD_CALLS, ids=[message for message, _ in BAD_CALLS])
def test_bad_input_is_refused_with_the_remedy(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_exponential_keys_are_exact_up_to_30_and_finite_beyond():
    u = torch.tensor([-29.0, 29.0, -31.0, 1e4], dtype=torch.float64)
    phi = FeatureMap(1, 4, "exp")(u.view(1, 1, 1, 4)).flatten()
    assert torch.equal(phi[:2], u[:2].exp()) and phi[2] == math.exp(-30) and phi[3] == math.exp(30)


def test_a_block_of_one_token_generates():
    model = GPT(GPTConfig(block_size=1, vocab_size=31, n_layer=1, n_head=2, n_embd=8)).eval()
    assert model.generate(torch.tensor([[3]]), 4).shape == (1, 5)


def test_auto_is_chunked_on_a_cpu_and_says_why_a_gpu_goes_without_kernels():
    q, k, v = torch.rand(3, 1, 2, 70, 4)
    assert torch.equal(linear_attention(q, k, v, "auto"), linear_attention(q, k, v, "chunked"))
    on_a_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float64, shape=v.shape)
    with pytest.warns(UserWarning, match="plain PyTorch, without the fused kernels: .*(float64|triton)"):
        assert hedgehog.fused_kernels(on_a_gpu, 4, has_map=False) is None
