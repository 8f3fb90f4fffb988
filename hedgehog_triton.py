"""Fused GPU kernels for causal linear attention: the maps, the attention and the division in one pass each way.

Optional. hedgehog.py stands without this file and is the oracle of its tests; here are only the same numbers, faster.

Design
    Linear attention is bound by memory traffic, not by arithmetic: features are twice as wide as q and k. So features
    are made in registers from a (64, D) tile of q or k and never written; the backward pass makes them again.
    One program walks along one head's segment of the sequence in chunks of L = 64 tokens, the state S (2D, D) and its
    denominator column z (2D) staying in float32 registers. The two softmaxes of the map are two tiles (p, m), so that
    every product is (64, D) x (D, D) or (64, D) x (D, 64), the shape that a Hopper tensor core takes in one go.

    forward         y_n = tril(phi_q phi_k^T) v + phi_q S,   S += phi_k^T v
    segment sums    when B H programs cannot fill the GPU, T is cut into segments: their states are summed first, a
                    prefix sum over them (PyTorch) starts every segment, and all of them run at once.
    backward_q      walks forwards, S in registers:    dphi_q = dA phi_k + dnum S^T + dden z^T
    backward_kv     walks backwards, R in registers:   dphi_k = dA^T phi_q + v R^T + r,   dv = A^T dnum + phi_k R,
                    R += phi_q^T dnum,  r += phi_q^T dden

    with dnum = do / den, dden = -<do, o> / den, A and dA masked. The map's own backward runs at the end of each chunk;
    the gradients of W are summed in registers along a segment, written once a program and added up by PyTorch in a
    fixed order: no atomics, so two runs agree to the last bit.
    D = 128 does not fit: the columns of v (and of S and R) are cut into blocks of 64, one program each. What they
    cannot share is linear in dphi, so their parts of dq, dk and dW are simply added.

Precision: sums and states are float32. Products take bfloat16 operands for bfloat16 inputs; tf32 for float16 (whose
range is too small for features); three tf32 products, which is float32 to about 1e-6, for float32.
"""

import torch
import triton
import triton.language as tl

CHUNK = 64
LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@triton.jit
def load_tile(ptr, t, stride, cols, T, dtype: tl.constexpr):
    """Rows t (those >= T are zero) and columns cols of a matrix whose last axis is contiguous."""
    return tl.load(ptr + t[:, None] * stride + cols[None, :], mask=t[:, None] < T, other=0.0).to(dtype)


@triton.jit
def store_tile(ptr, t, stride, cols, T, x):
    tl.store(ptr + t[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=t[:, None] < T)


@triton.jit
def softmaxes(x, w, b, PREC: tl.constexpr):
    """phi(x): softmax(u) and softmax(-u) of u = x w + b, float32."""
    u = (tl.dot(x, w, input_precision=PREC) + b[None, :]) * LOG2E
    p = tl.exp2(u - tl.max(u, axis=1)[:, None])
    m = tl.exp2(tl.min(u, axis=1)[:, None] - u)
    return p / tl.sum(p, axis=1)[:, None], m / tl.sum(m, axis=1)[:, None]


@triton.jit
def load_features(x, t, stride, cols, w, b, T, MAP: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    """(raw tile, the two halves of its features in float32). Without MAP, x holds the features, one half after the other."""
    if MAP:
        raw = load_tile(x, t, stride, cols, T, dtype)
        p, m = softmaxes(raw, w, b, PREC)
    else:
        raw = load_tile(x, t, stride, cols, T, dtype)
        p = raw.to(tl.float32)
        m = load_tile(x + cols.shape[0], t, stride, cols, T, tl.float32)
    return raw, p, m


@triton.jit
def load_map(w, b, h, cols, MAP: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr):
    """W (P/2, P/2) and b (P/2) of head h; anything where there is no map."""
    HP: tl.constexpr = cols.shape[0]
    W = tl.zeros((HP, HP), dtype)
    bias = tl.zeros((HP,), tl.float32)
    if MAP:
        W = tl.load(w + h * HP * HP + cols[:, None] * HP + cols[None, :]).to(dtype)
    if BIAS:
        bias = tl.load(b + h * HP + cols).to(tl.float32)
    return W, bias


@triton.jit
def load_state(s, program, half, rows, cols, width, HAS: tl.constexpr):
    """Rows of one half of a (P, DV + 1) state: its block of columns, and its last column, the denominator's."""
    HP: tl.constexpr = rows.shape[0]
    S = tl.zeros((HP, cols.shape[0]), tl.float32)
    z = tl.zeros((HP,), tl.float32)
    if HAS:
        at = s + ((2 * program + half) * HP + rows) * width
        S = tl.load(at[:, None] + cols[None, :])
        z = tl.load(at + width - 1)
    return S, z


@triton.jit
def store_state(s, half, rows, cols, width, S, z, first):
    at = s + (half * rows.shape[0] + rows) * width
    tl.store(at[:, None] + cols[None, :], S)
    if first:
        tl.store(at + width - 1, z)


@triton.jit
def store_weight_gradient(dw, db, program, cols, dW, dB, BIAS: tl.constexpr):
    """What one program adds to the gradients of W and b."""
    HP: tl.constexpr = cols.shape[0]
    tl.store(dw + program * HP * HP + cols[:, None] * HP + cols[None, :], dW)
    if BIAS:
        tl.store(db + program * HP + cols, dB)


@triton.jit
def map_gradient(p, m, g_p, g_m):
    """d loss / d u of [softmax(u), softmax(-u)]."""
    return p * (g_p - tl.sum(p * g_p, axis=1)[:, None]) - m * (g_m - tl.sum(m * g_m, axis=1)[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Grid: (segments, B H, blocks of v's columns). States are (B H, segments, P, DV + 1) in float32.


@triton.jit
def forward_kernel(q, k, v, wq, wk, bq, bk, s0, o, den, s1,
                   qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, T, SEG, eps,
                   HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                   BIAS: tl.constexpr, HAS_S0: tl.constexpr, STORE_S1: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    seg, bh, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h, n_seg = bh // H, bh % H, tl.num_programs(0)
    q, k, v, o = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, o + b * ob + h * oh
    cols, vcols, rows = tl.arange(0, HP), block * BV + tl.arange(0, BV), tl.arange(0, L)
    causal = rows[:, None] >= rows[None, :]
    WQ, BQ = load_map(wq, bq, h, cols, MAP, BIAS, dtype)
    WK, BK = load_map(wk, bk, h, cols, MAP, BIAS, dtype)
    program = bh * n_seg + seg
    Sp, zp = load_state(s0, program, 0, cols, vcols, DV + 1, HAS_S0)
    Sm, zm = load_state(s0, program, 1, cols, vcols, DV + 1, HAS_S0)
    for start in range(seg * SEG, tl.minimum(T, (seg + 1) * SEG), L):
        t = start + rows.to(tl.int64)
        _, kp, km = load_features(k, t, kt, cols, WK, BK, T, MAP, dtype, PREC)
        _, qp, qm = load_features(q, t, qt, cols, WQ, BQ, T, MAP, dtype, PREC)
        x = load_tile(v, t, vt, vcols, T, dtype)
        if MAP:  # the map of a zero row is not zero
            kp, km = tl.where(t[:, None] < T, kp, 0.0), tl.where(t[:, None] < T, km, 0.0)
        past = tl.sum(qp * zp[None, :], axis=1) + tl.sum(qm * zm[None, :], axis=1)
        zp += tl.sum(kp, axis=0)
        zm += tl.sum(km, axis=0)
        qp, qm, kp, km = qp.to(dtype), qm.to(dtype), kp.to(dtype), km.to(dtype)
        A = tl.dot(qp, tl.trans(kp), input_precision=PREC) + tl.dot(qm, tl.trans(km), input_precision=PREC)
        A = tl.where(causal, A, 0.0)
        y = tl.dot(qp, Sp.to(dtype), input_precision=PREC)
        y = tl.dot(qm, Sm.to(dtype), y, input_precision=PREC)
        y = tl.dot(A.to(dtype), x, y, input_precision=PREC)
        d = tl.maximum(tl.sum(A, axis=1) + past, eps)
        store_tile(o, t, ot, vcols, T, y / d[:, None])
        if block == 0:
            tl.store(den + bh * T + t, d, mask=t < T)
        Sp = tl.dot(tl.trans(kp), x, Sp, input_precision=PREC)
        Sm = tl.dot(tl.trans(km), x, Sm, input_precision=PREC)
    if STORE_S1:
        if seg == n_seg - 1:
            s1 += bh * 2 * HP * (DV + 1)
            store_state(s1, 0, cols, vcols, DV + 1, Sp, zp, block == 0)
            store_state(s1, 1, cols, vcols, DV + 1, Sm, zm, block == 0)


@triton.jit
def segment_kernel(x, y, w, bias, den, delta, s, xb, xh, xt, yb, yh, yt, H, T, SEG, eps,
                   HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                   BIAS: tl.constexpr, BACKWARD: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    """One segment's own sum: phi_k^T [v, 1], or in the backward pass phi_q^T [dnum, dden]."""
    seg, bh, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = bh // H, bh % H
    x, y = x + b * xb + h * xh, y + b * yb + h * yh
    cols, vcols, rows = tl.arange(0, HP), block * BV + tl.arange(0, BV), tl.arange(0, L)
    W, B = load_map(w, bias, h, cols, MAP, BIAS, dtype)
    Sp, Sm = tl.zeros((HP, BV), tl.float32), tl.zeros((HP, BV), tl.float32)
    zp, zm = tl.zeros((HP,), tl.float32), tl.zeros((HP,), tl.float32)
    for start in range(seg * SEG, tl.minimum(T, (seg + 1) * SEG), L):
        t = start + rows.to(tl.int64)
        _, p, m = load_features(x, t, xt, cols, W, B, T, MAP, dtype, PREC)
        if BACKWARD:
            d = tl.load(den + bh * T + t, mask=t < T, other=1.0)
            one = tl.where(d > eps, -tl.load(delta + bh * T + t, mask=t < T, other=0.0) / d, 0.0)
            value = (load_tile(y, t, yt, vcols, T, tl.float32) / d[:, None]).to(dtype)
        else:
            one = (t < T).to(tl.float32)
            value = load_tile(y, t, yt, vcols, T, dtype)
        zp += tl.sum(p * one[:, None], axis=0)
        zm += tl.sum(m * one[:, None], axis=0)
        Sp = tl.dot(tl.trans(p.to(dtype)), value, Sp, input_precision=PREC)
        Sm = tl.dot(tl.trans(m.to(dtype)), value, Sm, input_precision=PREC)
    s += (bh * tl.num_programs(0) + seg) * 2 * HP * (DV + 1)
    store_state(s, 0, cols, vcols, DV + 1, Sp, zp, block == 0)
    store_state(s, 1, cols, vcols, DV + 1, Sm, zm, block == 0)


@triton.jit
def backward_q_kernel(q, k, v, wq, wk, bq, bk, s0, o, do, den, delta, dq, dw, db,
                      qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, gb, gh, gt, xn, xb, xh, xt, H, T, SEG, eps,
                      HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                      BIAS: tl.constexpr, HAS_S0: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    seg, bh, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h, n_seg = bh // H, bh % H, tl.num_programs(0)
    q, k, v = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh
    o, do, dq = o + b * ob + h * oh, do + b * gb + h * gh, dq + block * xn + b * xb + h * xh
    cols, vcols, rows = tl.arange(0, HP), block * BV + tl.arange(0, BV), tl.arange(0, L)
    causal = rows[:, None] >= rows[None, :]
    WQ, BQ = load_map(wq, bq, h, cols, MAP, BIAS, dtype)
    WK, BK = load_map(wk, bk, h, cols, MAP, BIAS, dtype)
    program = bh * n_seg + seg
    Sp, zp = load_state(s0, program, 0, cols, vcols, DV + 1, HAS_S0)
    Sm, zm = load_state(s0, program, 1, cols, vcols, DV + 1, HAS_S0)
    dW, dB = tl.zeros((HP, HP), tl.float32), tl.zeros((HP,), tl.float32)
    first = (block == 0).to(tl.float32)
    for start in range(seg * SEG, tl.minimum(T, (seg + 1) * SEG), L):
        t = start + rows.to(tl.int64)
        _, kp, km = load_features(k, t, kt, cols, WK, BK, T, MAP, dtype, PREC)
        raw, qp, qm = load_features(q, t, qt, cols, WQ, BQ, T, MAP, dtype, PREC)
        x = load_tile(v, t, vt, vcols, T, dtype)
        if MAP:
            kp, km = tl.where(t[:, None] < T, kp, 0.0), tl.where(t[:, None] < T, km, 0.0)
        d = tl.load(den + bh * T + t, mask=t < T, other=1.0)
        dot = tl.zeros((L,), tl.float32)
        for i in tl.static_range(DV // BV):
            c = i * BV + tl.arange(0, BV)
            dot += tl.sum(load_tile(o, t, ot, c, T, tl.float32) * load_tile(do, t, gt, c, T, tl.float32), axis=1)
        if block == 0:
            tl.store(delta + bh * T + t, dot, mask=t < T)
        dden = tl.where(d > eps, -dot / d, 0.0) * first           # counted by one block of columns
        dnum = (load_tile(do, t, gt, vcols, T, tl.float32) / d[:, None]).to(dtype)
        dA = tl.where(causal, tl.dot(dnum, tl.trans(x), input_precision=PREC) + dden[:, None], 0.0).to(dtype)
        g_p = tl.dot(dnum, tl.trans(Sp.to(dtype)), input_precision=PREC) + dden[:, None] * zp[None, :]
        g_m = tl.dot(dnum, tl.trans(Sm.to(dtype)), input_precision=PREC) + dden[:, None] * zm[None, :]
        zp += tl.sum(kp, axis=0)
        zm += tl.sum(km, axis=0)
        kp, km = kp.to(dtype), km.to(dtype)
        g_p = tl.dot(dA, kp, g_p, input_precision=PREC)
        g_m = tl.dot(dA, km, g_m, input_precision=PREC)
        Sp = tl.dot(tl.trans(kp), x, Sp, input_precision=PREC)
        Sm = tl.dot(tl.trans(km), x, Sm, input_precision=PREC)
        if MAP:
            du = map_gradient(qp, qm, g_p, g_m)
            dB += tl.sum(du, axis=0)
            du = du.to(dtype)
            store_tile(dq, t, xt, cols, T, tl.dot(du, tl.trans(WQ), input_precision=PREC))
            dW = tl.dot(tl.trans(raw), du, dW, input_precision=PREC)
        else:
            store_tile(dq, t, xt, cols, T, g_p)
            store_tile(dq + HP, t, xt, cols, T, g_m)
    if MAP:
        store_weight_gradient(dw, db, program * tl.num_programs(2) + block, cols, dW, dB, BIAS)


@triton.jit
def backward_kv_kernel(q, k, v, wq, wk, bq, bk, r0, do, den, delta, dk, dv, dw, db, ds0,
                       qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, xn, xb, xh, xt, yb, yh, yt, H, T, SEG, eps,
                       HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                       BIAS: tl.constexpr, HAS_R0: tl.constexpr, STORE_DS0: tl.constexpr, dtype: tl.constexpr,
                       PREC: tl.constexpr):
    seg, bh, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h, n_seg = bh // H, bh % H, tl.num_programs(0)
    q, k, v = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh
    do, dk, dv = do + b * gb + h * gh, dk + block * xn + b * xb + h * xh, dv + b * yb + h * yh
    cols, vcols, rows = tl.arange(0, HP), block * BV + tl.arange(0, BV), tl.arange(0, L)
    causal = rows[:, None] <= rows[None, :]                       # (keys, queries): everything here is transposed
    WQ, BQ = load_map(wq, bq, h, cols, MAP, BIAS, dtype)
    WK, BK = load_map(wk, bk, h, cols, MAP, BIAS, dtype)
    program = bh * n_seg + seg
    Rp, rp = load_state(r0, program, 0, cols, vcols, DV + 1, HAS_R0)
    Rm, rm = load_state(r0, program, 1, cols, vcols, DV + 1, HAS_R0)
    dW, dB = tl.zeros((HP, HP), tl.float32), tl.zeros((HP,), tl.float32)
    first = (block == 0).to(tl.float32)
    n = tl.cdiv(tl.minimum(T, (seg + 1) * SEG) - seg * SEG, L)
    for i in range(n):
        t = seg * SEG + (n - 1 - i) * L + rows.to(tl.int64)
        raw, kp, km = load_features(k, t, kt, cols, WK, BK, T, MAP, dtype, PREC)
        _, qp, qm = load_features(q, t, qt, cols, WQ, BQ, T, MAP, dtype, PREC)
        x = load_tile(v, t, vt, vcols, T, dtype)
        d = tl.load(den + bh * T + t, mask=t < T, other=1.0)
        dden = tl.where(d > eps, -tl.load(delta + bh * T + t, mask=t < T, other=0.0) / d, 0.0)
        dnum = (load_tile(do, t, gt, vcols, T, tl.float32) / d[:, None]).to(dtype)
        dA = tl.dot(x, tl.trans(dnum), input_precision=PREC) + first * dden[None, :]
        dA = tl.where(causal, dA, 0.0).to(dtype)
        g_p = tl.dot(x, tl.trans(Rp.to(dtype)), input_precision=PREC) + first * rp[None, :]
        g_m = tl.dot(x, tl.trans(Rm.to(dtype)), input_precision=PREC) + first * rm[None, :]
        rp += tl.sum(qp * dden[:, None], axis=0)
        rm += tl.sum(qm * dden[:, None], axis=0)
        qp, qm = qp.to(dtype), qm.to(dtype)
        g_p = tl.dot(dA, qp, g_p, input_precision=PREC)
        g_m = tl.dot(dA, qm, g_m, input_precision=PREC)
        kpd, kmd = kp.to(dtype), km.to(dtype)
        A = tl.dot(kpd, tl.trans(qp), input_precision=PREC) + tl.dot(kmd, tl.trans(qm), input_precision=PREC)
        A = tl.where(causal, A, 0.0).to(dtype)
        y = tl.dot(kpd, Rp.to(dtype), input_precision=PREC)
        y = tl.dot(kmd, Rm.to(dtype), y, input_precision=PREC)
        y = tl.dot(A, dnum, y, input_precision=PREC)
        store_tile(dv, t, yt, vcols, T, y)
        Rp = tl.dot(tl.trans(qp), dnum, Rp, input_precision=PREC)
        Rm = tl.dot(tl.trans(qm), dnum, Rm, input_precision=PREC)
        if MAP:
            du = tl.where(t[:, None] < T, map_gradient(kp, km, g_p, g_m), 0.0)
            dB += tl.sum(du, axis=0)
            du = du.to(dtype)
            store_tile(dk, t, xt, cols, T, tl.dot(du, tl.trans(WK), input_precision=PREC))
            dW = tl.dot(tl.trans(raw), du, dW, input_precision=PREC)
        else:
            store_tile(dk, t, xt, cols, T, g_p)
            store_tile(dk + HP, t, xt, cols, T, g_m)
    if MAP:
        store_weight_gradient(dw, db, program * tl.num_programs(2) + block, cols, dW, dB, BIAS)
    if STORE_DS0:
        if seg == 0:
            ds0 += bh * 2 * HP * (DV + 1)
            store_state(ds0, 0, cols, vcols, DV + 1, Rp, rp, block == 0)
            store_state(ds0, 1, cols, vcols, DV + 1, Rm, rm, block == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def segment_length(B, H, T, n_blocks, device):
    """Tokens a program walks along: the whole sequence if B H programs fill the GPU, else as many chunks as fill it."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = -(-3 * multiprocessors // (B * H * n_blocks))       # segments a sequence
    chunks = -(-T // CHUNK)
    return CHUNK * max(-(-chunks // max(1, wanted)), min(chunks, 4))


def options(q, v, has_map, bias):
    """The compile-time part of every launch. HP: half the feature width, which is D where the map is made inside."""
    HP = q.shape[-1] if has_map else q.shape[-1] // 2
    DV = v.shape[-1]
    dtype, precision = {torch.bfloat16: (tl.bfloat16, "ieee"), torch.float16: (tl.float32, "tf32"),
                        torch.float32: (tl.float32, "tf32x3")}[v.dtype]
    return dict(HP=HP, DV=DV, BV=min(DV, 64), L=CHUNK, MAP=has_map, BIAS=bias, dtype=dtype, PREC=precision)


def like_projection(B, H, T, D, like, dtype=None):
    """(B, H, T, D) over memory laid out as (B, T, H, D), so that merging the heads afterwards is a view."""
    return like.new_empty(B, T, H, D, dtype=dtype).transpose(1, 2)


def prefix(sums, first):
    """(B H, N, P, D+1) sums of the segments -> the state before each, beginning with `first` (B H, P, D+1) or zero."""
    first = torch.zeros_like(sums[:, :1]) if first is None else first.unsqueeze(1)
    return torch.cat((first, sums[:, :-1]), dim=1).cumsum(dim=1)


def starts(x, y, w, b, den, delta, first, seg, n_seg, grid, eps, opt, backward):
    """The state at the start of every segment (in the backward pass: at its end), or None if all are zero."""
    B, H, T, _ = x.shape
    if n_seg == 1:
        return None if first is None else first.unsqueeze(1).contiguous()
    sums = x.new_empty(B * H, n_seg, 2 * opt["HP"], opt["DV"] + 1, dtype=torch.float32)
    segment_kernel[grid](x, y, w, b, den, delta, sums, *x.stride()[:3], *y.stride()[:3], H, T, seg, eps, BACKWARD=backward,
                         num_warps=4, num_stages=2, **opt)
    return prefix(sums.flip(1), first).flip(1).contiguous() if backward else prefix(sums, first)


@torch.library.custom_op("hedgehog::attention", mutates_args=())
def attention_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor | None,
                 bq: torch.Tensor | None, bk: torch.Tensor | None, state: torch.Tensor | None, return_state: bool,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, den (B, H, T), the state after the last token (B, H, P, D+1), or an empty one)."""
    B, H, T, _ = q.shape
    opt = options(q, v, wq is not None, bq is not None)
    o, den, s1 = attention_outputs(q, v, wq, return_state)
    seg = segment_length(B, H, T, opt["DV"] // opt["BV"], q.device)
    n_seg = -(-T // seg)
    grid = (n_seg, B * H, opt["DV"] // opt["BV"])
    first = None if state is None else state.flatten(0, 1)
    s0 = starts(k, v, wk, bk, None, None, first, seg, n_seg, grid, eps, opt, backward=False)
    forward_kernel[grid](q, k, v, wq, wk, bq, bk, s0, o, den, s1, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                         *o.stride()[:3], H, T, seg, eps, HAS_S0=s0 is not None, STORE_S1=return_state, num_warps=4,
                         num_stages=2, **opt)
    return o, den, s1


def attention_outputs(q, v, wq, return_state):
    B, H, T, P = q.shape[:3] + (q.shape[-1] * (1 if wq is None else 2),)
    state = (B, H, P, v.shape[-1] + 1) if return_state else (0,)
    return (like_projection(B, H, T, v.shape[-1], v), q.new_empty(B, H, T, dtype=torch.float32),
            q.new_empty(state, dtype=torch.float32))


@attention_op.register_fake
def _(q, k, v, wq, wk, bq, bk, state, return_state, eps):
    return attention_outputs(q, v, wq, return_state)


@torch.library.custom_op("hedgehog::attention_backward", mutates_args=())
def backward_op(do: torch.Tensor, ds1: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                wq: torch.Tensor | None, wk: torch.Tensor | None, bq: torch.Tensor | None, bk: torch.Tensor | None,
                state: torch.Tensor | None, o: torch.Tensor, den: torch.Tensor, eps: float) -> list[torch.Tensor]:
    """[dq, dk, dv, dwq, dwk, dbq, dbk, dstate]; those that nothing asked for are empty."""
    B, H, T, D = q.shape
    if do.stride(-1) != 1:
        do = do.contiguous()
    opt = options(q, v, wq is not None, bq is not None)
    HP, n_blocks, float32 = opt["HP"], opt["DV"] // opt["BV"], torch.float32
    seg = segment_length(B, H, T, n_blocks, q.device)
    n_seg = -(-T // seg)
    grid, programs = (n_seg, B * H, n_blocks), (B, H, n_seg * n_blocks)

    def parts():
        """Where each block of columns writes its share of dq or dk, and each program its share of dW and db."""
        x = like_projection(n_blocks * B, H, T, D, q, q.dtype if n_blocks == 1 else float32)
        w = q.new_empty((*programs, HP, HP), dtype=float32) if wq is not None else None
        return x, w, q.new_empty((*programs, HP), dtype=float32) if bq is not None else None

    def total(x, like):
        return x if n_blocks == 1 else x.unflatten(0, (n_blocks, B)).sum(0).to(like.dtype)

    (dq, dwq, dbq), (dk, dwk, dbk) = parts(), parts()
    dv, delta = like_projection(B, H, T, v.shape[-1], v), torch.empty_like(den)
    first = None if state is None else state.flatten(0, 1)
    s0 = starts(k, v, wk, bk, None, None, first, seg, n_seg, grid, eps, opt, backward=False)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    backward_q_kernel[grid](q, k, v, wq, wk, bq, bk, s0, o, do, den, delta, dq, dwq, dbq, *strides, *o.stride()[:3],
                            *do.stride()[:3], B * dq.stride(0), *dq.stride()[:3], H, T, seg, eps, HAS_S0=s0 is not None,
                            num_warps=4, num_stages=1, **opt)
    last = None if ds1 is None else ds1.flatten(0, 1).contiguous()
    r0 = starts(q, do, wq, bq, den, delta, last, seg, n_seg, grid, eps, opt, backward=True)
    ds0 = torch.empty_like(state) if state is not None else q.new_empty(0, dtype=float32)
    backward_kv_kernel[grid](q, k, v, wq, wk, bq, bk, r0, do, den, delta, dk, dv, dwk, dbk, ds0, *strides,
                             *do.stride()[:3], B * dk.stride(0), *dk.stride()[:3], *dv.stride()[:3], H, T, seg, eps,
                             HAS_R0=r0 is not None, STORE_DS0=state is not None, num_warps=4, num_stages=1, **opt)
    empty = lambda: q.new_empty(0, dtype=float32)  # noqa: E731
    sums = [empty() if x is None else x.sum(dim=(0, 2)).to(w.dtype) for x, w in ((dwq, wq), (dwk, wk), (dbq, bq), (dbk, bk))]
    return [total(dq, q), total(dk, k), dv, *sums, ds0]


@backward_op.register_fake
def _(do, ds1, q, k, v, wq, wk, bq, bk, state, o, den, eps):
    B, H, T, D = q.shape
    empty = q.new_empty(0, dtype=torch.float32)
    return [like_projection(B, H, T, D, q), like_projection(B, H, T, D, k), like_projection(B, H, T, v.shape[-1], v),
            *(torch.empty_like(empty if w is None else w) for w in (wq, wk, bq, bk)),
            torch.empty_like(empty if state is None else state)]


def save_for_backward(ctx, inputs, output):
    q, k, v, wq, wk, bq, bk, state, return_state, eps = inputs
    ctx.save_for_backward(q, k, v, wq, wk, bq, bk, state, output[0], output[1])
    ctx.return_state, ctx.eps = return_state, eps


def run_backward(ctx, do, dden, ds1):
    *inputs, o, den = ctx.saved_tensors
    grads = backward_op(do, ds1 if ctx.return_state else None, *inputs, o, den, ctx.eps)
    return (*(g if x is not None else None for g, x in zip(grads, inputs)), None, None)


attention_op.register_autograd(run_backward, setup_context=save_for_backward)


# ---------------------------------------------------------------------------------------------------------------------
# What hedgehog.py calls


def unsupported(q, v, has_map):
    """Why these kernels cannot run on such tensors, or None."""
    D, P = v.shape[-1], q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {q.dtype}, the kernels take bfloat16, float16 and float32"
    if D not in (32, 64, 128) or has_map and P != D:
        return f"head width {D}, the kernels take 32, 64 and 128"
    if not has_map and P not in (32, 64, 128, 256):
        return f"feature width {P}, the kernels take 32, 64, 128 and 256"
    if q.dtype == torch.bfloat16 and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "bfloat16 on a GPU older than Ampere"
    return None


def fused_attention(q, k, v, wq=None, wk=None, bq=None, bk=None, state=None, return_state=False, eps=1e-30):
    """Causal linear attention. With wq, wk (H, D, D) from raw q, k (B, H, T, D); without them from features (B, H, T, P).

    v: (B, H, T, D). Returns y (B, H, T, D), and with return_state the pair (y, state (B, H, P, D+1) in float32).
    """
    why = unsupported(q, v, wq is not None)
    if why:
        raise ValueError(f"hedgehog_triton cannot run this: {why}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    wq, wk, bq, bk, state = (x if x is None else x.contiguous() for x in (wq, wk, bq, bk, state))
    y, _, state = attention_op(q, k, v, wq, wk, bq, bk, state, return_state, eps)
    return (y, state) if return_state else y
