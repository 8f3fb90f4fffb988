"""Hedgehog linear attention, from the feature map to a GPT, in one file that needs nothing but torch.

    Zhang, Bhatia, Kumbong, Ré. The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry.
    ICLR 2024, https://arxiv.org/abs/2402.04347 ("the paper" below)

Softmax attention compares every query with every key before it, which costs O(T^2):

    y_t = sum_{s<=t} exp(q_t.k_s / sqrt(D)) v_s  /  sum_{s<=t} exp(q_t.k_s / sqrt(D))

Linear attention replaces exp(q.k) by a product of features, phi(q).phi(k). Now phi(q_t) can be pulled out of both
sums, and what is left of the past is one matrix that every token adds to. That costs O(T):

    y_t = phi(q_t) S_t / phi(q_t) z_t        S_t = S_{t-1} + phi(k_t)^T v_t        z_t = z_{t-1} + phi(k_t)^T

with q_t, k_t and v_t as rows, as in the code. Hedgehog learns phi, by imitating a trained softmax model
(`imitation_loss` in convert_gpt2.py) or from the task itself: phi(x) = [softmax(xW), softmax(-xW)]. These softmaxes run
over the features of one token, not over time. `hedgehog_exp` leaves their divisors out: [exp(xW), exp(-xW)].

Letters
    B batch    T tokens    C model width (n_embd)    H heads    D head width, C / H
    P feature width, 2D for Hedgehog    N chunks of L tokens    q, k, v: (B, H, T, D) before the map
    phi feature map    W, b its weight and bias    S state, the sum of phi(k)^T [v, 1] (z is its last column)

Read from top to bottom: feature maps, four forms of linear attention, attention layer, its hybrid with softmax, GPT.
"""

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FEATURE_MAPS = ("hedgehog", "hedgehog_exp", "elu", "relu", "t2r", "exp", "performer", "cosformer", "taylor")
ATTENTIONS = ("softmax", *FEATURE_MAPS)
LEARNED_MAPS = ("hedgehog", "hedgehog_exp", "t2r")  # those with a W
HYBRID_MAPS = ("hedgehog", "hedgehog_exp", "elu", "relu", "t2r", "taylor")  # see HybridAttention


# ---------------------------------------------------------------------------------------------------------------------
# Feature maps: (B, H, T, D) -> (B, H, T, P). No weight phi(q).phi(k) is negative.


class FeatureMap(nn.Module):
    """phi: (B, H, T, D) -> (B, H, T, P), with P = `feature_dim`. Queries and keys usually have one each.

    kind           phi(x)                                             P           source
    hedgehog       [softmax(xW + b), softmax(-xW - b)], over features 2D          the paper, numerically stable form
    hedgehog_exp   [exp(xW + b), exp(-xW - b)]                        2D          the paper, main text
    elu            1 + elu(x)                                         D           Katharopoulos et al. 2020
    relu           relu(x)                                            D           the baseline of the paper
    t2r            relu(xW + b), always with b                        D           Kasai et al. 2021
    exp            exp(temperature x)                                 D           the paper, section 3
    performer      exp(w_i.x - |x|^2 / 2) / sqrt(m), w_i random       n_features  Choromanski et al. 2021 (FAVOR+)
    cosformer      [relu(x) cos a, relu(x) sin a], a = pi t / 2M      2D          Qin et al. 2022; M = max_len
    taylor         [1, x, (x outer x) / sqrt 2]: 1 + s + s^2 / 2      1 + D + D^2 Keles et al. 2023, s = q.k / sqrt(D)

    `weight` is (H, D, D), `scale` (1) times the identity at the start, `bias` (H, D), zero at the start. Near x = 0 the
    logarithm of both hedgehog maps' phi(q).phi(k) has the term scale^2 q.k / D, that of softmax's weight is q.k /
    sqrt(D): at scale = D^(1/4) training starts with attention about as peaked as softmax's. (Not exactly: hedgehog has
    scale^2 times q.k / D less the product of their means; hedgehog_exp has scale^2 |k|^2 / 2D besides, by which large
    keys weigh more.) performer and taylor estimate exp(q.k / sqrt(D)) and take the 1 / sqrt(D) into x; the others see x
    as it is. Features are float32 at least, also under autocast: float16 has too small a range. (On a GPU
    `LinearAttention.attend` rounds those of bfloat16 inputs to bfloat16, which has float32's.)
    learn_temperature, not in the paper: W = weight exp(log_temperature), one number a head and map, 0 at the start. It
    adds no functions, but gives their peakedness a parameter of its own, which weight decay does not touch.
    flash-linear-attention differs: one joint softmax of [2xW, -2xW] and one W for all heads.
    """

    def __init__(self, n_head, head_dim, kind="hedgehog", bias=False, temperature=1.0, n_features=None, max_len=1024,
                 scale=1.0, learn_temperature=False):
        super().__init__()
        if kind not in FEATURE_MAPS:
            raise ValueError(f"unknown feature map {kind!r}: choose one of {', '.join(FEATURE_MAPS)}")
        H, D, m = n_head, head_dim, n_features or 2 * head_dim
        self.kind, self.n_head, self.head_dim, self.temperature, self.max_len = kind, H, D, temperature, max_len
        self.feature_dim = {"performer": m, "taylor": 1 + D + D * D, "hedgehog": 2 * D, "hedgehog_exp": 2 * D,
                            "cosformer": 2 * D}.get(kind, D)
        self.scale, learned = scale, kind in LEARNED_MAPS
        self.weight = nn.Parameter(torch.empty(H, D, D)) if learned else None
        self.bias = nn.Parameter(torch.empty(H, D)) if learned and (bias or kind == "t2r") else None
        self.log_temperature = nn.Parameter(torch.empty(H)) if learned and learn_temperature else None
        if kind == "performer":
            self.register_buffer("projection", torch.empty(H, m, D))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """The map as new: for one that was made on the meta device, after `to_empty`, also where FSDP has cut H. The
        features of performer are drawn: seed all processes alike."""
        if self.weight is not None:
            own = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight   # a DTensor's part
            own.copy_(self.scale * torch.eye(self.head_dim))
        for p in (self.bias, self.log_temperature):
            if p is not None:
                p.zero_()
        if self.kind == "performer":
            self.projection.copy_(orthogonal_gaussian(*self.projection.shape))

    def W(self):
        """(H, D, D): the weight, times the temperature of its head if that is learned."""
        return self.weight if self.log_temperature is None else self.weight * self.log_temperature.exp()[:, None, None]

    def affine(self, x):
        """xW + b, or as much of it as this kind has."""
        u = x if self.weight is None else x @ self.W().to(x.dtype)                # (B, H, T, D) @ (H, D, D)
        return u if self.bias is None else u + self.bias.to(x.dtype).unsqueeze(-2)

    def forward(self, x, offset=0, is_query=False):
        """x (B, H, T, D) -> (B, H, T, P). `offset`: position of x[:, :, 0] (cosformer). `is_query`: see `safe_exp`;
        without it the exponential maps saturate at e^-30 and e^30."""
        with no_autocast(x):
            x = at_least_float32(x)
            u = self.affine(x)
            if self.kind == "hedgehog":
                return torch.stack((u, -u), dim=-2).softmax(dim=-1).flatten(-2)  # each half sums to one
            if self.kind == "hedgehog_exp":
                return safe_exp(torch.cat((u, -u), dim=-1), is_query)
            if self.kind == "elu":
                return F.relu(x) + x.clamp(max=0).exp()          # 1 + elu(x), but e^x keeps its digits for x << 0
            if self.kind in ("relu", "t2r"):
                return F.relu(u)
            if self.kind == "exp":
                return safe_exp(self.temperature * x, is_query)
            if self.kind == "cosformer":
                return self.cosformer(x, offset)
            x = x * x.shape[-1] ** -0.25                       # so that q.k below is q.k / sqrt(D) of the raw ones
            if self.kind == "performer":
                u = x @ self.projection.to(x.dtype).mT - x.square().sum(-1, keepdim=True) / 2
                return safe_exp(u, is_query) / math.sqrt(self.feature_dim)
            pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / math.sqrt(2)       # taylor: (B, H, T, D^2)
            return torch.cat((torch.ones_like(x[..., :1]), x, pairs), dim=-1)

    @torch.no_grad()
    def log_shift(self, x):
        """(B, H, T, 1): the logarithm of what `is_query` divides phi(x) by, for one of HYBRID_MAPS."""
        shifted = self.kind == "hedgehog_exp"
        return self.affine(x).abs().amax(-1, keepdim=True) if shifted else torch.zeros_like(x[..., :1])

    def cosformer(self, x, offset):
        """cos(a_t - a_s) = cos a_t cos a_s + sin a_t sin a_s: near keys weigh more than far ones."""
        T = x.shape[-2]
        if offset + T > self.max_len:  # x may be a segment, and more to come
            raise ValueError(f"cosformer knows {self.max_len} positions, got at least {offset + T}: raise max_len")
        t = torch.arange(offset, offset + T, device=x.device, dtype=x.dtype).unsqueeze(-1)
        a = math.pi * t / (2 * self.max_len)
        return torch.cat((F.relu(x) * a.cos(), F.relu(x) * a.sin()), dim=-1)


def safe_exp(u, is_query):
    """exp(u) (..., P) that neither overflows nor leaves a query without any weight.

    A factor on a query cancels in the normalised attention, so a query is shifted by its own maximum: exact. A factor
    on a key reweights that key against the others: a shift by the key's own maximum is another function (LoLCATs'
    `exp_dim` shifts each half of queries and keys by its own), and one by the maximum over time would let the future
    touch the past. So keys are not shifted; they are exact for |u| <= 30, and saturate at e^-30 and e^30.
    """
    if is_query:
        return (u - u.amax(dim=-1, keepdim=True).detach()).exp()
    return u.clamp(-30.0, 30.0).exp()


def orthogonal_gaussian(n_head, m, D):
    """(H, m, D): Gaussian rows, orthogonal within each block of D, which lowers the variance (Choromanski et al.)."""
    n_block = math.ceil(m / D)
    Q, R = torch.linalg.qr(torch.randn(n_head, n_block, D, D, dtype=torch.float32))
    directions = (Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).flatten(1, 2)   # the signs make it uniform
    lengths = torch.randn(n_head, n_block * D, D).norm(dim=-1, keepdim=True)
    return (directions * lengths)[:, :m]


def no_autocast(x):
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def at_least_float32(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def as_autocast(*tensors):
    """In the dtype of torch.autocast where that is on, as PyTorch's softmax attention takes them: not float64, and not
    integers, which are refused later."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # there is none for meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# Linear attention, four ways to the same numbers. q, k: (B, H, T, P), after the map. v: (B, H, T, D+1), its last column
# ones, so that the denominator is one more output column and takes the same path as the numerator.


def quadratic(q, k, v):
    """O(T^2): the (T, T) weights themselves. The definition, and the oracle of the tests."""
    return (q @ k.mT).tril() @ v                                                     # (B, H, T, T) @ (B, H, T, D+1)


def cumsum(q, k, v):
    """O(T) time, but O(T P D) memory: the state after every token at once. For reading."""
    S = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=2)                                 # (B, H, T, P, D+1)
    return (q.unsqueeze(-2) @ S).squeeze(-2)


def recurrent(q, k, v, S):
    """One token after the other: O(P D) a token however long the past. For generation. S: (B, H, P, D+1)."""
    y = []
    for t in range(q.shape[2]):
        S = S + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        y.append(q[:, :, t].unsqueeze(-2) @ S)                                            # (B, H, 1, D+1)
    return torch.cat(y, dim=2), S


def chunked(q, k, v, S, chunk_size):
    """O(T): quadratic inside a chunk of L tokens, one state a chunk for all that came before. For training.

        y_n = tril(q_n k_n^T) v_n + q_n S_n        S_n = S + sum_{m<n} k_m^T v_m

    The sum over m is a product with an (N, N) triangle, which beats `torch.cumsum` in time and memory, forward and
    backward, as long as N is small: call it with a few chunks and carry S, as `few_chunks_at_once` does.
    """
    T = q.shape[2]
    L = min(chunk_size, T)
    if T % L:  # zero in k and in the ones column of v: the padding counts as no key
        q, k, v = (F.pad(x, (0, 0, 0, -T % L)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (-1, L)) for x in (q, k, v))                                # (B, H, N, L, ...)
    kv = k.mT @ v                                                                         # (B, H, N, P, D+1)
    before = kv.new_ones(kv.shape[2], kv.shape[2]).tril(-1)                               # (N, N), m < n
    S_n = S.unsqueeze(2) + (before @ kv.flatten(-2)).view_as(kv)
    y = (q @ k.mT).tril() @ v + q @ S_n                                                   # (B, H, N, L, D+1)
    return y.flatten(2, 3)[:, :, :T], S + kv.sum(dim=2)


def few_chunks_at_once(q, k, v, S, chunk_size):
    """`chunked` for a T of any length: 16 chunks a call, so that its (N, N) triangle stays small."""
    y = []
    for parts in zip(*(x.split(16 * chunk_size, dim=2) for x in (q, k, v))):              # N <= 16
        y_i, S = chunked(*parts, S, chunk_size)
        y.append(y_i)
    return torch.cat(y, dim=2), S


def bidirectional(q, k, v):
    """Every query sees every key (BERT): two matrix products, O(T)."""
    return q @ (k.mT @ v)


def linear_attention(q, k, v, form="auto", causal=True, state=None, return_state=False, chunk_size=64, eps=1e-30):
    """y_t = sum_{s<=t} (q_t.k_s) v_s / sum_{s<=t} (q_t.k_s), for q and k that have been through the feature map.

    q, k: (B, H, T, P), v: (B, H, T, D), all of one dtype and device. Returns y (B, H, T, D) in the dtype of v, and
    with `return_state` the pair (y, state), the state being (B, H, P, D+1), float32 at least. A k_s of zeros counts for
    nothing, which is how padding is masked.

    form: "quadratic", "cumsum", "chunked" or "recurrent": the same function, for any T >= 1 and any chunk size.
    "auto" is "chunked", or on a GPU the kernels of hedgehog_triton.py where they can run.
    state: what an earlier call returned; continues that sequence ("auto", "chunked" and "recurrent").
    causal=False: the sum runs over all s, in O(T), whatever the form ("quadratic" forms the weights).
    Sums are float32 for half precision, under autocast too; float64 stays float64. On a GPU the operands of float32
    products are rounded to tf32 if you have allowed it (torch.set_float32_matmul_precision).

    eps: a row whose denominator is below it attends to nothing, and is zero with zero gradient. Trained maps reach
    denominators of 1e-28, and a result must not depend on the scale of the features, so eps is a bound and never an
    addend: + 1e-6 silently zeroes whole heads. LoLCATs adds 1e-12 in training and nothing when decoding;
    flash-linear-attention's layer by default has no denominator but a norm.

    Raises ValueError for an unknown form, shapes, dtypes or devices that do not match, and a state with a form that
    cannot continue.
    """
    check_inputs(q, k, v, form, causal, state, return_state, chunk_size)
    kernels = fused_kernels(v, q.shape[-1], has_map=False) if form == "auto" and causal else None
    if kernels:
        q, k, v = rows_in_one_piece(q, k, v)
        return kernels.fused_attention(q, k, v, state=state, return_state=return_state, eps=eps)
    if causal and form in ("auto", "chunked") and q.shape[2] <= chunk_size and state is None and not return_state:
        form = "quadratic"  # one chunk with nothing before or after it: the state would be computed in vain
    dtype = v.dtype
    with no_autocast(q):
        q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
        v = F.pad(v, (0, 1), value=1.0)                                                   # (B, H, T, D+1)
        if state is None:
            state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])                   # (B, H, P, D+1)
        if form == "quadratic":
            y = quadratic(q, k, v) if causal else q @ k.mT @ v
        elif not causal:
            y = bidirectional(q, k, v)
        elif form == "cumsum":
            y = cumsum(q, k, v)
        elif form == "recurrent":
            y, state = recurrent(q, k, v, state)
        else:
            y, state = few_chunks_at_once(q, k, v, state, chunk_size)
        y = divide(y[..., :-1], y[..., -1:], eps).to(dtype)
    return (y, state) if return_state else y


def attention_weights(q, k, causal=True, eps=1e-30):
    """The (B, H, T, T) weights of linear attention for mapped q, k (B, H, T, P), for pictures and distillation."""
    with no_autocast(q):
        a = at_least_float32(q) @ at_least_float32(k).mT
        a = a.tril() if causal else a
        return divide(a, a.sum(dim=-1, keepdim=True), eps)


FUSED_MAPS = ("hedgehog", "hedgehog_exp")  # that the kernels make from raw q and k


def fused_kernels(v, P, has_map, say=True):
    """The module hedgehog_triton if it lies beside this file and can run on such tensors, else None; `say` why."""
    if not v.is_cuda:
        return None
    why = why_no_kernels()
    if why is None:
        import hedgehog_triton
        why = hedgehog_triton.unsupported(v, P, v.shape[-1], has_map)
        if why is None:
            return hedgehog_triton
    if say:
        say_once(f"linear attention runs in plain PyTorch, without the fused kernels: {why}")
    return None


def rows_in_one_piece(*tensors):
    """Copies of those whose last axis is not contiguous, as the kernels ask for."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


# torch.compile can trace neither an import that fails nor a warning. It calls these two functions as it traces.


@torch.compiler.assume_constant_result
def why_no_kernels():
    try:
        import hedgehog_triton  # noqa: F401
    except ImportError as e:
        return str(e)


@torch.compiler.assume_constant_result
def say_once(why, said=set()):
    """`said` is one set for all calls: Python's own memory of warnings ends with any warnings.catch_warnings."""
    if why not in said:
        said.add(why)
        warnings.warn(why, stacklevel=4)


def divide(num, den, eps):
    return num / den.masked_fill(den < eps, math.inf)


def check_inputs(q, k, v, form, causal, state, return_state, chunk_size):
    """A sentence for each way to call `linear_attention` that would fail later, or be silently wrong."""
    forms = ("auto", "quadratic", "cumsum", "chunked", "recurrent")
    if form not in forms:
        raise ValueError(f"unknown form {form!r}: choose one of {', '.join(forms)}")
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or q.shape[2] < 1:
        raise ValueError(f"expected q and k (B, H, T, P) and v (B, H, T, D) with T >= 1, got {tuple(q.shape)}, "
                         f"{tuple(k.shape)} and {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating-point dtype, got {q.dtype}, {k.dtype} and {v.dtype}: "
                         "cast v with v.to(q.dtype)")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if (state is not None or return_state) and not (causal and form in ("auto", "chunked", "recurrent")):
        raise ValueError(f"only causal 'auto', 'chunked' and 'recurrent' carry a state, got form={form!r}, "
                         f"causal={causal}")
    expected = (*q.shape[:2], q.shape[-1], v.shape[-1] + 1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is not None and (state.shape != expected or state.dtype != dtype or state.device != q.device):
        raise ValueError(f"the state must be {expected} in {dtype} on {q.device}, as an earlier call with the same B, "
                         f"H, P and D returned it, got {tuple(state.shape)} in {state.dtype} on {state.device}")


class LinearAttention(nn.Module):
    """The two maps and the causal sum, from raw q, k, v (B, H, T, D) to y (B, H, T, D). Put this into your own model.

    q and k come as they are: after a rotary embedding if there is one, and without the 1 / sqrt(D) of softmax. y has
    the dtype of v, whatever q and k are in. Under torch.autocast q, k and v are cast first, as for softmax attention,
    in every form; W and the state are not. q and k have a map each; `tie_qk` shares one, and so do the kinds that learn
    nothing (performer needs the same w_i for both).

    Features are twice as wide as q and k, so a long sequence is trained in segments: only the state between two
    segments is kept, and the backward pass recomputes the features of one segment at a time. That takes about the
    memory of softmax attention, for 35 to 60 % more time forward and backward. `segment_size=0` keeps everything
    instead, as torch.func's gradients need it. The fused kernels ("auto" on a GPU) do without segments: they never
    write the features of the hedgehog maps.
    """

    window = 0  # tokens that attend by softmax: HybridAttention sets it

    def __init__(self, n_head, head_dim, kind="hedgehog", bias=False, tie_qk=False, chunk_size=64, segment_size=256,
                 **map_options):
        super().__init__()
        self.chunk_size, self.segment_size = chunk_size, segment_size
        self.map_q = FeatureMap(n_head, head_dim, kind, bias, **map_options)
        shared = tie_qk or self.map_q.weight is None
        self.map_k = self.map_q if shared else FeatureMap(n_head, head_dim, kind, bias, **map_options)

    def forward(self, q, k, v, form="auto", state=None, return_state=False, offset=0):
        """Arguments as in `linear_attention`; `offset` is the position of the first token (cosformer)."""
        H, D = self.map_q.n_head, self.map_q.head_dim
        if (q.ndim != 4 or q.shape[1::2] != (H, D) or not q.shape[2] or k.shape != q.shape or v.ndim != 4
                or v.shape[:3] != q.shape[:3]):
            raise ValueError(f"expected q and k (B, {H}, T, {D}) and v (B, {H}, T, any), T > 0, got {tuple(q.shape)}, "
                             f"{tuple(k.shape)} and {tuple(v.shape)}")
        if not all(x.is_floating_point() for x in (q, k, v)):
            raise ValueError(f"q, k and v must be floating-point, got {q.dtype}, {k.dtype} and {v.dtype}: cast them")
        q, k, v = as_autocast(q, k, v)
        kernels, kind = None, self.map_q.kind
        has_map = kind == self.map_k.kind and kind in FUSED_MAPS
        has_map = has_map and self.map_q.weight.dtype != torch.float64                    # a W that the kernels refuse
        # A hybrid's kernels need a map that they make themselves, no past, and a text beyond the window.
        may = not self.window or (has_map and state is None and q.shape[2] > self.window)
        if form == "auto" and q.dtype == k.dtype == v.dtype and may:
            # If not, `linear_attention` below asks once more, for features alone, and says why; a hybrid does not ask.
            P = q.shape[-1] if has_map else self.map_q.feature_dim
            kernels = fused_kernels(v, P, has_map, say=self.window > 0)
        if kernels and has_map:
            q, k, v = rows_in_one_piece(q, k, v)
            maps = self.map_q.W(), self.map_k.W(), self.map_q.bias, self.map_k.bias
            if self.window:
                gates = self.map_gate, self.map_gate_bias
                return kernels.hybrid_attention(q, k, v, *maps, *gates, self.window, kind, return_state)
            return kernels.fused_attention(q, k, v, *maps, state, return_state, kind=kind)
        if kernels or form not in ("auto", "chunked") or not 0 < self.segment_size < q.shape[2]:
            return self.attend(q, k, v, form, state, return_state, offset)
        y, run = [], partial(checkpoint, self.attend, use_reentrant=False, preserve_rng_state=False)
        for parts in zip(*(x.split(self.segment_size, dim=2) for x in (q, k, v))):
            y_i, state = (run if torch.is_grad_enabled() else self.attend)(*parts, form, state, True, offset)
            y.append(y_i)
            offset += y_i.shape[2]
        y = torch.cat(y, dim=2)
        return (y, state) if return_state else y

    def attend(self, q, k, v, form, state, return_state, offset):
        phi_q, phi_k = self.map_q(q, offset, is_query=True), self.map_k(k, offset)        # (B, H, T, P)
        if form == "auto" and q.is_cuda and q.dtype == torch.bfloat16:  # as the kernels round them
            phi_q, phi_k = phi_q.to(q.dtype), phi_k.to(q.dtype)
        eps = 1e-30  # given: with torch.compile(dynamic=True) a default would be a variable, which checkpoint refuses
        y = linear_attention(phi_q, phi_k, v.to(phi_q.dtype), form, True, state, return_state, self.chunk_size, eps)
        return (y[0].to(v.dtype), y[1]) if return_state else y.to(v.dtype)


class HybridAttention(LinearAttention):
    """Softmax's weights for the last `window` tokens, the maps' for all that is older, under one denominator. O(T).

        y_t = sum_{s<=t} a_ts v_s / sum_{s<=t} a_ts        a_ts = exp(q_t.k_s / sqrt(D))     where t - s < window
                                                           a_ts = g_t phi(q_t).phi(k_s)      where it is older

    Not in the paper; LoLCATs (Zhang et al. 2024) does something close to it. The scale of the features cancels in
    linear attention, but not here: a gate, log g_t = q_t.c + b with c (H, D) and b (H,), sets what a key beyond the
    window weighs against one in it. What `is_query` divides phi(q) by must then be multiplied back: HYBRID_MAPS are
    those whose `log_shift` is known.

    Arguments as in LinearAttention. The state is a tuple: the last `window` keys, their values with the column of ones,
    both float32 at least, and the sum S over all older tokens. On a GPU, for the hedgehog maps, without a past and for
    more than `window` tokens, fused kernels have what is older, and others join it with the window; `attend` itself is
    plain PyTorch, in float32 at least.

    `attend` takes grouped queries, too: k, v and map_k may have K heads, each of which serves H / K of q's; so has the
    state. `keys` (B, T): False for padding, which is no key, but takes up its place in the window if it stands inside.
    """

    def __init__(self, n_head, head_dim, kind="hedgehog", *args, window, **options):
        check_hybrid(kind, window)
        super().__init__(n_head, head_dim, kind, *args, **options)
        self.window = window
        self.map_gate = nn.Parameter(torch.empty(n_head, head_dim))
        self.map_gate_bias = nn.Parameter(torch.empty(n_head))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """The gate as new; the maps have a method of their own."""
        # Where q and k are 0, an old key starts at e^-5 of what a key in the window weighs. Old keys are many, and an
        # untrained map hardly tells them apart: at equal weight they drown the window, in a new model and in one that
        # was just swapped in. Nor may they weigh nothing, or their maps would get no gradient. `at_zero` is
        # phi(0).phi(0); for relu and t2r, where that is 0, D stands in for it.
        D = self.map_q.head_dim
        at_zero = {"hedgehog": 2 / D, "hedgehog_exp": 2 * D, "taylor": 1}.get(self.map_q.kind, D)
        self.map_gate.zero_()
        self.map_gate_bias.fill_(-5 - math.log(at_zero))

    def log_gate(self, q):
        """q (B, H, T, D) -> (B, H, T, 1): log g, and in it what the features of q have been divided by."""
        with no_autocast(q):
            q = at_least_float32(q)
            gate, bias = (x.to(q.dtype).unsqueeze(-1) for x in (self.map_gate, self.map_gate_bias))
            return q @ gate + bias.unsqueeze(-1) + self.map_q.log_shift(q)                # (B, H, T, D) @ (H, D, 1)

    def attend(self, q, k, v, form, state, return_state, offset, keys=None):
        if form not in ("auto", "chunked", "recurrent"):
            raise ValueError(f"the hybrid has no form {form!r}: leave it at 'auto'")
        T, W, G, dtype, eps = q.shape[2], self.window, q.shape[1] // k.shape[1], v.dtype, 1e-30
        with no_autocast(q):
            q, k = at_least_float32(q), at_least_float32(k)
            v = F.pad(v.to(q.dtype), (0, 1), value=1.0)                                   # (B, H or K, T, D+1)
            if keys is not None:
                v = v.masked_fill(~keys[:, None, :, None], 0)
            sizes = [(*k.shape[:2], *size) for size in ((W, k.shape[-1]), (W, v.shape[-1]),
                                                        (self.map_q.feature_dim, v.shape[-1]))]
            if state is None:  # zeros in the column of ones, too: before the text stand W keys that count as none
                state = [k.new_zeros(size) for size in sizes]
            if [(x.shape, x.dtype, x.device) for x in state] != [(size, k.dtype, k.device) for size in sizes]:
                raise ValueError("the state is not of this hybrid, or of another batch, dtype or device: give what a "
                                 "call with the same B, H, D, window and map has returned")
            k, v = torch.cat((state[0], k), dim=2), torch.cat((state[1], v), dim=2)       # (B, H or K, W+T, D or D+1)
            phi_q, phi_k = self.map_q(q, is_query=True), self.map_k(k[:, :, :T])          # of the keys W tokens ago
            S = state[2]
            if G > 1:
                k, v, phi_k, S = (x.repeat_interleave(G, dim=1) for x in (k, v, phi_k, S))
            old, S = few_chunks_at_once(phi_q, phi_k, v[:, :, :T], S, self.chunk_size)
            num, den = old[..., :-1], old[..., -1:]
            # Not -inf: padding may be a query that sees no key at all, and then is zero.
            log_den = den.clamp(min=eps).log().masked_fill(den < eps, -1e30) + self.log_gate(q)
            y = window_and_rest(q, k, v, log_den, divide(num, den, eps), W).to(dtype)
        return (y, (k[:, ::G, T:].clone(), v[:, ::G, T:].clone(), S[:, ::G].contiguous())) if return_state else y


def window_and_rest(q, k, v, log_rest, rest, W):
    """Softmax over the last W keys, and over all that is older as if it were one more key: the logarithm of its weight
    is log_rest (B, H, T, 1), its value rest (B, H, T, D). q (B, H, T, D), and from W tokens before it on
    k (B, H, W+T, D) and v (B, H, W+T, D+1), whose last column is zero where there is no key. Returns (B, H, T, D).
    """
    T, D = q.shape[2:]
    L = min(W, T)  # time is cut into N blocks of L: of W, or one of T
    q, k, v, log_rest, rest = (F.pad(x, (0, 0, 0, -T % L)) for x in (q, k, v, log_rest, rest))
    q, log_rest, rest = (x.unflatten(2, (-1, L)) for x in (q, log_rest, rest))            # (B, H, N, L, ...)
    k, v = (torch.cat((x[:, :, :-L].unflatten(2, (-1, W)), x[:, :, W:].unflatten(2, (-1, L))), dim=3) for x in (k, v))
    i, j = torch.arange(L, device=q.device).unsqueeze(1) + W, torch.arange(W + L, device=q.device)
    seen = (j <= i) & (j > i - W) & (v[:, :1, ..., -1:] > 0).mT                           # (B, 1, N, L, W+L)
    s = (q @ k.mT / math.sqrt(D)).masked_fill(~seen, -math.inf)
    p = torch.cat((s, log_rest), dim=-1).softmax(dim=-1)                                  # (B, H, N, L, W+L+1)
    y = (p[..., :-1] @ v)[..., :-1] + p[..., -1:] * rest
    return y.flatten(2, 3)[:, :, :T]


def check_hybrid(kind, window):
    if window < 1:
        raise ValueError(f"a hybrid needs a window of at least 1 token, got {window}")
    if kind not in HYBRID_MAPS:
        raise ValueError(f"softmax over a window and {kind} beyond do not go together, since what {kind} weighs is not "
                         f"known on softmax's scale: choose one of {', '.join(HYBRID_MAPS)}, or no hybrid window")


# ---------------------------------------------------------------------------------------------------------------------
# The GPT: GPT-2's architecture and module names (so that its weights map one to one), in the manner of nanoGPT


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # of the embedding and softmax's weights, as in the recipe behind the paper's table
    bias: bool = True  # in the linear layers and norms, as in GPT-2; the feature maps have their own switch
    tie_head: bool = True  # one matrix for the embedding and the output, as in GPT-2
    attention: str = "hedgehog"
    feature_bias: bool = False
    tie_qk: bool = False
    temperature: float = 1.0  # of the `exp` map alone
    map_scale: float = 1.0  # the maps' W starts at this times the identity
    learn_temperature: bool = False  # of the maps with a W, one a head
    chunk_size: int = 64  # tokens whose weights are formed at once
    segment_size: int = 256  # tokens whose features are held at once in training; 0: all
    short_conv: int = 0  # tokens that a convolution of q, k and v reaches over; 0: none, as in the paper
    softmax_layers: int = 0  # the first layers, that attend by softmax whatever `attention` is; 0 in the paper
    window: int = 0  # tokens that those layers see, the current one included, in O(T window); 0: all
    hybrid_window: int = 0  # tokens that every linear layer sees by softmax, older ones by its map; 0: none, the paper

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}: choose one of {', '.join(ATTENTIONS)}")
        if min(self.block_size, self.vocab_size, self.n_layer, self.n_head, self.n_embd, self.chunk_size) < 1:
            raise ValueError("block_size, vocab_size, n_layer, n_head, n_embd and chunk_size must be at least 1, got "
                             f"{self}")
        if min(self.segment_size, self.short_conv, self.hybrid_window) < 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"segment_size={self.segment_size}, short_conv={self.short_conv} and hybrid_window="
                             f"{self.hybrid_window} must be at least 0, dropout={self.dropout} in [0, 1)")
        if not 0 <= self.softmax_layers <= self.n_layer or self.window < 0 or self.window and not self.softmax_layers:
            raise ValueError(f"softmax_layers={self.softmax_layers} must be in [0, n_layer={self.n_layer}]; window="
                             f"{self.window} must be at least 0, and 0 where no layer keeps softmax")
        if self.hybrid_window:
            check_hybrid(self.attention, self.hybrid_window)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")


class ShortConv(nn.Module):
    """A causal depthwise convolution, y_t = sum_i w_i x_{t-i} over the last `width` tokens. It starts as the identity.

    Not in the paper; H3 (Fu et al. 2023), Mamba and others put one before their linear-time layers. With it no head has
    to single out the token before, which softmax learns from scratch and linear attention hardly does.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, channels))
        with torch.no_grad():
            self.weight[0] = 1

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C). `cache`: the layer's dict, whose "conv" holds the width - 1 tokens before x."""
        before, T = len(self.weight) - 1, x.shape[1]
        past = (cache or {}).get("conv")
        x = F.pad(x, (0, 0, before, 0)) if past is None else torch.cat((past, x), dim=1)  # (B, width - 1 + T, C)
        if cache is not None:
            cache["conv"] = x[:, T:].clone()  # a view would hold all of x
        return sum(w.to(x.dtype) * x[:, before - i:before - i + T] for i, w in enumerate(self.weight))


def sliding_window(q, k, v, window, dropout=0.0):
    """Softmax attention over the last `window` tokens, O(T window). q, k, v (B, H, T, D) -> (B, H, T, D).

    Time is cut into blocks as long as the window: a block of queries needs its own keys and those of the block before.
    """
    T, W = q.shape[2], min(window, q.shape[2])
    n_block = -(-T // W)
    q, k, v = (F.pad(x, (0, 0, 0, -T % W)).unflatten(2, (-1, W)).transpose(1, 2) for x in (q, k, v))
    k, v = (torch.cat((F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=3) for x in (k, v))
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)                           # (B N, H, W or 2W, D)
    i, j = torch.arange(W, device=q.device).unsqueeze(1) + W, torch.arange(2 * W, device=q.device)
    seen = (j <= i) & (j > i - W)                                                         # (W, 2W)
    first = torch.arange(len(q), device=q.device) % n_block == 0                          # has no block before
    seen = seen & ~(first[:, None, None, None] & (j < W))                                 # (B N, 1, W, 2W)
    y = F.scaled_dot_product_attention(q, k, v, seen, dropout)
    return y.unflatten(0, (-1, n_block)).transpose(1, 2).flatten(2, 3)[:, :, :T]


class CausalSelfAttention(nn.Module):
    """`layer` counts from 0: the first config.softmax_layers attend by softmax, the others as config.attention says."""

    def __init__(self, config, layer=0):
        super().__init__()
        C, self.n_head, self.block_size, self.dropout = config.n_embd, config.n_head, config.block_size, config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.short_conv = ShortConv(3 * C, config.short_conv) if config.short_conv else None
        self.window = config.window if layer < config.softmax_layers else 0
        self.linear = None
        if config.attention != "softmax" and layer >= config.softmax_layers:
            hybrid = partial(HybridAttention, window=min(config.hybrid_window, config.block_size))
            self.linear = (hybrid if config.hybrid_window else LinearAttention)(
                config.n_head, C // config.n_head, config.attention, config.feature_bias, config.tie_qk,
                config.chunk_size, config.segment_size, temperature=config.temperature, max_len=config.block_size,
                scale=config.map_scale, learn_temperature=config.learn_temperature)

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C). `cache`: this layer's dict, which holds the past and is updated in place."""
        q, k, v = self.split_heads(x, cache)
        if self.linear is not None:
            y = self.linear_cached(q, k, v, cache)
        else:
            y = self.windowed(q, k, v, cache) if self.window else self.softmax(q, k, v, cache)
        return self.merge_heads(y)

    def split_heads(self, x, cache=None):
        qkv = self.c_attn(x)                                                              # (B, T, 3C)
        if self.short_conv is not None:
            qkv = self.short_conv(qkv, cache)
        qkv = qkv.unflatten(-1, (3, self.n_head, -1)).unbind(dim=2)                       # each (B, T, H, D)
        return [x.transpose(1, 2) for x in qkv]                                           # q, k, v, each (B, H, T, D)

    def merge_heads(self, y):
        return self.c_proj(y.transpose(1, 2).flatten(2))                                  # (B, T, C)

    def linear_cached(self, q, k, v, cache):
        # No dropout of attention weights here: linear attention never forms them.
        if cache is None:
            return self.linear(q, k, v)
        offset, T = cache.get("offset", 0), q.shape[2]
        form = "recurrent" if T == 1 else "auto"
        y, cache["state"] = self.linear(q, k, v, form, cache.get("state"), return_state=True, offset=offset)
        cache["offset"] = offset + T
        return y

    def windowed(self, q, k, v, cache):
        """`cache` holds the window - 1 tokens before q, whatever the length."""
        T, past = q.shape[2], 0
        if cache is not None:
            if "k" in cache:
                past = cache["k"].shape[2]
                k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
            start = max(0, past + T + 1 - self.window)
            cache.update(k=k[:, :, start:].clone(), v=v[:, :, start:].clone(), offset=cache.get("offset", 0) + T)
        dropout = self.dropout if self.training else 0.0
        if T == 1:  # sees all of it
            return F.scaled_dot_product_attention(q, k, v, None, dropout)
        return sliding_window(F.pad(q, (0, 0, past, 0)), k, v, self.window, dropout)[:, :, past:]

    def softmax(self, q, k, v, cache):
        B, H, T, D = q.shape
        offset = 0
        if cache is not None:
            if "k" not in cache:
                cache.update(offset=0, k=k.new_empty(B, H, self.block_size, D), v=v.new_empty(B, H, self.block_size, D))
            offset = cache["offset"]
            cache["k"][:, :, offset:offset + T], cache["v"][:, :, offset:offset + T] = k, v
            cache["offset"] = offset + T
            k, v = cache["k"][:, :, :offset + T], cache["v"][:, :, :offset + T]
        # is_causal aligns the mask to the first key, which is right only without a past; one query sees all keys.
        mask = torch.ones(T, offset + T, dtype=torch.bool, device=q.device).tril(offset) if offset and T > 1 else None
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=not offset)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))                      # GPT-2's gelu


class Block(nn.Module):
    def __init__(self, config, layer=0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):                # GPT-2: the sum of 2 n_layer branches keeps its variance
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def new_cache(self):
        """An empty past, one dict a layer: pass it to `forward` with each next piece of the sequence.

        Linear attention keeps (B, H, P, D+1) a layer, whatever the length, and with hybrid_window the keys and values
        of that many tokens; softmax two (B, H, block_size, D) buffers, or window - 1 tokens of them; short_conv, if
        there is one, (B, short_conv - 1, 3C) besides.
        """
        return [{} for _ in self.transformer.h]

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, vocab_size), and the mean cross-entropy in nats if targets (B, T) are given.

        Targets of -1 are left out. Raises ValueError when the sequence, its cached past included, is longer than
        block_size, and on the CPU for a token beyond the vocabulary.
        """
        T, offset = idx.shape[1], cache[0].get("offset", 0) if cache else 0
        if offset + T > self.config.block_size:
            raise ValueError(f"a sequence of {offset + T} tokens does not fit block_size={self.config.block_size}: "
                             "crop it, or train with a larger block_size")
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():               # on a GPU it would cost a wait
            if idx.numel() == 0 or idx.min() < 0 or idx.max() >= self.config.vocab_size:
                raise ValueError(f"no token, or one beyond the vocabulary of {self.config.vocab_size}: was the text "
                                 "made with another tokenizer?")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(offset, offset + T, device=idx.device))
        x = self.transformer.drop(x)                                                      # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        weight, V = self.lm_head.weight, self.config.vocab_size
        if targets is not None and V % 64:  # an H100 took 76 ms a step with GPT-2's 50,257 rows, another so padded 72
            weight = F.pad(weight, (0, 0, 0, -V % 64))
        logits = F.linear(self.transformer.ln_f(x), weight)[..., :V]                      # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """Yield max_new_tokens times the next tokens (B, 1) after the prompt idx (B, T >= 1). Call model.eval() first.

        temperature 0 takes the likeliest token. A prompt longer than block_size is cropped to its end. When the block
        is full, the newest half of it is read again as a fresh prompt, since GPT-2's learned positions end there.
        """
        if not (max_new_tokens >= 0 and 0 <= temperature < math.inf and (top_k is None or top_k >= 1) and idx.shape[1]):
            raise ValueError("generation needs tokens >= 0, a finite temperature >= 0, top_k >= 1 and a prompt of at "
                             f"least one token, got {max_new_tokens}, {temperature}, {top_k} and {idx.shape[1]}")
        block_size = self.config.block_size
        window, cache = idx[:, -block_size:], self.new_cache()
        n_new = window.shape[1]                                                           # tokens not yet in the cache
        for _ in range(max_new_tokens):
            if window.shape[1] > block_size:
                window, cache = window[:, -max(1, block_size // 2):], self.new_cache()
                n_new = window.shape[1]
            logits, _ = self(window[:, -n_new:], cache=cache) if use_cache else self(window)
            logits = logits[:, -1]                                                        # (B, vocab_size)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                below = logits.float() - logits.float().amax(dim=-1, keepdim=True)        # no overflow near 0
                token = torch.multinomial((below / temperature).softmax(dim=-1), 1)
            window, n_new = torch.cat((window, token), dim=1), 1
            yield token

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, use_cache=True):
        """idx (B, T) -> (B, T + max_new_tokens): the prompt and what `stream` adds to it."""
        return torch.cat((idx, *self.stream(idx, max_new_tokens, temperature, top_k, use_cache)), dim=1)
