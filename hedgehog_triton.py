"""Fused GPU kernels for causal linear attention: the maps, the attention and the division in one pass each way; and for
the softmax over a window that a hybrid joins it with.

Optional. hedgehog.py stands without this file and is the oracle of its tests; here are only the same numbers, faster.

Design
    Linear attention is bound by memory traffic, not by arithmetic: features are twice as wide as q and k. So features
    are made in registers from an (L, D) tile of q or k and never written; the backward pass makes them again.
    Time is cut into chunks of L = 64 tokens. The two halves of the map are two tiles (p, m), so that every product
    is (64, D) x (D, D) or (64, D) x (D, 64), the shape that a Hopper tensor core takes in one go. In float32, as which
    float16 is computed, L is 32, at D = 128 16: what fits into shared memory.

    forward   one program walks along a head, the state S (2D, D) in float32 registers:
              y_n = tril(phi_q phi_k^T) v + phi_q S,    S += phi_k^T v
    states    the backward pass walks twice, in one launch, only to write down what each chunk needs of the others:
              S_n, the sum of phi_k^T [v, 1] of all chunks before n, and R_n, that of psi_q^T [do, delta] after n
    grad_kv   then all chunks at once:  dphi_k = dA^T psi_q + [v, 1] R_n^T,  dv = tril(psi_q phi_k^T)^T do + phi_k R_n
    grad_q    and once more:            dphi_q = (dA phi_k + [do, delta] S_n^T) / den,  dA = tril(do v^T + delta)

    with psi_q = phi_q / den and delta = -<do, o>, written by the walk that makes R. The map's own backward runs at the
    end of each chunk. The gradients of W are summed in registers over a few chunks, written once a program and added up
    by PyTorch in a fixed order: no atomics, so two runs agree to the last bit.
    Where the logarithm of the denominators is an output, too, its gradient is added to delta, and that is all.
    When B H programs cannot fill the GPU, T is cut into segments. The forward pass takes their sums first (`states`
    without writing chunks), an exclusive prefix over them, then all segments at once. The backward pass writes S_n and
    R_n as sums within a segment; the prefix is added where they are read.

    window    a hybrid (end of the file): blocks of L queries go over the blocks of keys that their window touches, with
              a running maximum; what is older is where the sums begin, one key of weight exp(log_den + q.c + b)
    window_grad_q, window_grad_kv    from the weights, made again: blocks of queries, which also have the gradients of
              what is older and of the gate (parts, as for W), and write delta = <do, y>; then blocks of keys. Three
              programs a multiprocessor by their registers (four of `window`), in bfloat16 at D = 64. For 32,768 tokens
              and 12 heads the three take 0.38 ms; what they read and write would take 84 % of that at 3 TB/s.
              Training with them at T = 1,024 is 5 % faster than with flex_attention in their place, in 3 % less memory
              (experiments/gpu.md)

Precision: sums and states are float32, of features in the type of the products. Those take bfloat16 operands for
bfloat16 inputs, and for float16 (whose range is too small for features) and float32 three tf32 products each, which is
float32 to about 1e-6. S_n and R_n are written in the type of the products, which is what they are used in.

Maps: `hedgehog`, two softmaxes, or `hedgehog_exp`, the exponentials of hedgehog.py's safe_exp: of a query u less its
largest |u|, a factor that cancels; of a key u within -30 and 30, and beyond no gradient. So denominators are at least
e^-30, and nothing overflows.

Registers are what there is least of: 255 a thread, with which two programs fit on a multiprocessor, and a spilled one
costs more than it looks, since they leave little cache beside their shared memory. Masks and offsets within a chunk are
in 32 bits. Two habits of the compiler cost the most: it moves addresses that do not change out of the loop, about 150,
into registers that then spill (hence disable_licm), and where a number is used rounded and in float32 it rounds twice
(`widen`, `nothing`). Without both, nothing of `hedgehog` in bfloat16 at D = 64 spills but eight bytes of forward. With
that, sums of columns as products (`column_sums`), and R read once, forward and backward took 0.85 ms instead of 1.00 at
T = 1,024, and 0.96 instead of 1.15 at 16,384 (experiments/results/triton-variants.json).

Bounds of `hedgehog`, on an H100 at T = 1,024 (experiments/results/triton-ncu.json; at 1.8 GHz): what must be read and
written once takes, at 3 TB/s, 38 % of the time of forward, 73 % of states, 58 % of grad_kv and 63 % of grad_q; their
sum is 58 % of the time of all four, and a single pass each way that kept all else on the chip would be 25 %, 0.21 of
0.84 ms. A chunk's work is a chain of small products, reductions and barriers, and two programs hide little of it: an
instruction is issued in 21 to 28 of 100 cycles, tensor cores are busy in 13 to 19, and a warp waits for memory in 17 to
47 % of the samples, for the last instruction's result in 15 to 22, at barriers in 13 to 15, for shared memory in 6 to
16.

Tried and left: keeping S_n from the forward pass, so that the backward pass walks once, and making all three gradients
in one kernel: 0.76 ms, but 100 MiB more kept a layer at 32,768 tokens, and a kernel more to read.
Tried and lost: a backward pass of two walks that carry S or R in registers beside everything else (more than a quarter
of its instructions went to spilled registers); a third program a multiprocessor (168 registers a thread: states 7 %
faster at T = 1,024 and 3 % slower at 16,384, grad_q 30 and 63 % slower, forward spills); 8 warps with chunks of 64 or
128; segments at T = 1,024, chained or not, to fill the last wave of programs; the second half of the map from a second
product, to free registers; one softmax after the other; tiles of grad_kv or grad_q through shared memory a chunk ahead
(one program a multiprocessor), prefetches in grad_kv and forward; the denominator as 16 or 32 extra columns of a
product (came out wrong on an H100 with Triton 3.6, the reason is not known).
"""

import inspect

import torch
import triton
import triton.language as tl

from hedgehog import FUSED_MAPS, as_autocast, rows_in_one_piece, safe_exp

if "disable_licm" not in inspect.signature(tl.range.__init__).parameters:
    raise ImportError(f"Triton {triton.__version__} is too old for hedgehog_triton.py, which needs 3.5: "
                      "upgrade PyTorch")

CHUNKS_PER_PROGRAM = 8           # of the gradient kernels: enough that a program's share of dW is little to write
PROGRAMS_PER_MULTIPROCESSOR = 2  # of the walking kernels: what their registers allow
LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


@triton.jit
def load_tile(ptr, start, rows, stride, cols, n, dtype: tl.constexpr, first=None):
    """Rows start + rows (zero from the n-th on, and before `first`) and columns cols of a matrix whose last axis is
    contiguous."""
    at = ptr + start * stride + (rows[:, None] * stride + cols[None, :])  # start is int64: no overflow past 2^31
    return tl.load(at, mask=between(rows[:, None], first, n), other=0.0).to(dtype)


@triton.jit
def store_tile(ptr, start, rows, stride, cols, n, x, first=None):
    at = ptr + start * stride + (rows[:, None] * stride + cols[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), mask=between(rows[:, None], first, n))


@triton.jit
def between(rows, first, n):
    inside = rows < n
    if first is not None:
        inside = inside & (rows >= first)
    return inside


INTERPRETED = not isinstance(store_tile, triton.JITFunction)
ASSEMBLY = tl.constexpr(not INTERPRETED)


@triton.jit
def prefetch(ptr, start, rows, stride, width: tl.constexpr, T):
    """Ask for rows of a matrix to be brought into the L2 cache, where a later load waits less; holds no register."""
    if ASSEMBLY:
        first = tl.minimum(tl.maximum(start, 0), T - 1)
        last = tl.minimum(T - 1 - first, rows.shape[0]).to(tl.int32)
        at = ptr + first * stride + tl.minimum(rows, last) * stride
        bits: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
        for line in tl.static_range((width * bits + 1023) // 1024):  # of 128 bytes
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at + line * (1024 // bits)],
                                      dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_reciprocal(den, start, rows, n):
    """1 / den, and zero in rows that are not there or whose denominator was below eps, which is stored as infinity."""
    return 1.0 / tl.load(den + start + rows, mask=rows < n, other=float("inf"))


@triton.jit
def chunks_of_segment(seg, SEG, T, L: tl.constexpr):
    return tl.cdiv(tl.minimum(T - seg * SEG, SEG), L)


@triton.jit
def load_map(w, b, h, cols, MAP: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr):
    """W (P/2, P/2) and b (P/2) of head h; anything where there is no map."""
    HP: tl.constexpr = cols.shape[0]
    W = tl.zeros((HP, HP), dtype)
    bias = tl.zeros((HP,), tl.float32)
    if MAP is not None:
        W = tl.load(w + h * HP * HP + cols[:, None] * HP + cols[None, :]).to(dtype)
    if BIAS:
        bias = tl.load(b + h * HP + cols).to(tl.float32)
    return W, bias


@triton.jit
def widen(x):
    """x in float32; bfloat16 by shifts of pairs, since the compiler would round the number again that x was made from,
    and so keep that in registers, too."""
    if ASSEMBLY and x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
                                      dtype=tl.float32, is_pure=True, pack=2)
    return x.to(tl.float32)


@triton.jit
def nothing(n):
    """Zero, for n >= 0, without the compiler's knowing: where half of a pair is a constant, it rounds one by one."""
    return tl.minimum(n, 0).to(tl.float32)


@triton.jit
def softmaxes(u, scale):
    """scale softmax(u) and scale softmax(-u) over features."""
    p = tl.exp2(u * LOG2E - (tl.max(u, axis=1) * LOG2E)[:, None])
    m = tl.exp2((tl.min(u, axis=1) * LOG2E)[:, None] - u * LOG2E)
    return p * (scale / tl.sum(p, axis=1, keep_dims=True)), m * (scale / tl.sum(m, axis=1, keep_dims=True))


@triton.jit
def exponentials(u, scale, QUERY: tl.constexpr):
    """scale exp(u) and scale exp(-u), as hedgehog.py's safe_exp: u of queries less `top`, max |u|, of keys in 30."""
    top = tl.zeros((u.shape[0],), tl.float32)
    if QUERY:
        top = tl.max(tl.abs(u), axis=1)
        p, m = tl.exp2((u - top[:, None]) * LOG2E), tl.exp2((u + top[:, None]) * -LOG2E)
    else:
        u = tl.clamp(u, -30.0, 30.0, propagate_nan=tl.PropagateNan.ALL)
        p, m = tl.exp2(u * LOG2E), tl.exp2(u * -LOG2E)
    return p * scale, m * scale, top


@triton.jit
def halves(raw, w, b, scale, QUERY: tl.constexpr, MAP: tl.constexpr, BIAS: tl.constexpr, PREC: tl.constexpr):
    """The halves of phi(raw), of u = raw w + b, in float32, each row times its `scale`, and the logarithm of what phi
    of each row has been divided by."""
    top = tl.zeros((raw.shape[0],), tl.float32)
    u = tl.dot(raw, w, input_precision=PREC)
    if BIAS:
        u += b[None, :]
    if MAP == "hedgehog":
        p, m = softmaxes(u, scale)
    else:
        p, m, top = exponentials(u, scale, QUERY)
    return p, m, top


@triton.jit
def features(raw, x, start, rows, stride, cols, w, b, n, scale, QUERY: tl.constexpr, MAP: tl.constexpr,
             BIAS: tl.constexpr, PREC: tl.constexpr):
    """As `halves`, zero for rows that are not there. Without MAP, raw is the first half of phi, and the second lies
    beside it in x."""
    top = tl.zeros((raw.shape[0],), tl.float32)
    if MAP is not None:
        p, m, top = halves(raw, w, b, scale, QUERY, MAP, BIAS, PREC)
    else:
        p, m = raw.to(tl.float32), load_tile(x + cols.shape[0], start, rows, stride, cols, n, tl.float32)
        p, m = p * scale, m * scale
    return p, m, top


@triton.jit
def half_gradient(p, g, MAP: tl.constexpr):
    """d loss / d u of p = softmax(u) or p = exp(u), of which g is the gradient."""
    p = widen(p)
    if MAP == "hedgehog":
        g -= tl.sum(p * g, axis=1)[:, None]
    return p * g


@triton.jit
def below_bound(p, m):
    """The halves of keys, both zero where one is at its bound e^30: from there on u has no gradient."""
    inside = tl.maximum(p, m).to(tl.float32) < 1.0686e13  # e^30, 1.06865e13, is 1.0720e13 in bfloat16
    return tl.where(inside, p, 0.0), tl.where(inside, m, 0.0)


@triton.jit
def column_sums(x, factors, dtype: tl.constexpr, PREC: tl.constexpr):
    """The sums of the columns of a tile x in `dtype`, its rows times `factors` (float32) unless that is None.

    By a product with a tile of 16 rows, the least that it takes: a reduction over warps needs more instructions."""
    L: tl.constexpr = x.shape[0]
    row = tl.arange(0, 16)[:, None]
    if factors is None:
        f = tl.full((16, L), 1 / 16, tl.float32).to(dtype)
    else:  # in two parts: bfloat16 alone would round them by 0.4 %, both together by 1e-5
        high = factors.to(dtype).to(tl.float32)
        f = tl.where(row == 0, high[None, :], tl.where(row == 1, (factors - high)[None, :], 0.0)).to(dtype)
    return tl.sum(tl.dot(f, x, input_precision=PREC), axis=0)


# States: (P, DV + 1) in float32 from and to PyTorch, the last column the denominator's.


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
def store_state(s, program, half, rows, cols, width, S, z, first):
    at = s + ((2 * program + half) * rows.shape[0] + rows) * width
    tl.store(at[:, None] + cols[None, :], S)
    if first:
        tl.store(at + width - 1, z)


@triton.jit
def store_chunk_state(c, zs, program, half, rows, cols, DV: tl.constexpr, S, z, first):
    at = (2 * program + half) * rows.shape[0] + rows
    tl.store(c + at[:, None] * DV + cols[None, :], S.to(c.dtype.element_ty))
    if first:
        tl.store(zs + at, z)


@triton.jit
def load_chunk_state(states, before, program, seg, half, rows, cols, DV: tl.constexpr, SEGMENTS: tl.constexpr):
    """The sum before a chunk within its segment, and with SEGMENTS what came before the segment."""
    at = rows[:, None] * DV + cols[None, :]
    x = tl.load(states + (2 * program + half) * rows.shape[0] * DV + at)
    if SEGMENTS:
        x = (x.to(tl.float32) + tl.load(before + (2 * seg + half) * rows.shape[0] * DV + at)).to(x.dtype)
    return x


@triton.jit
def load_chunk_z(z, before, program, seg, half, rows, SEGMENTS: tl.constexpr):
    x = tl.load(z + (2 * program + half) * rows.shape[0] + rows)
    if SEGMENTS:
        x += tl.load(before + (2 * seg + half) * rows.shape[0] + rows)
    return x


@triton.jit
def feature_gradient(g, dA, other, values, state, y, start, rows, stride, n, states, before, program, seg, half, cols,
                     DV: tl.constexpr, BV: tl.constexpr, SEGMENTS: tl.constexpr, dtype: tl.constexpr,
                     PREC: tl.constexpr):
    """One half of dphi_k: g + dA^T phi_q + v R^T, with y = v, other = that half of phi_q and states = R. Where all
    columns are one block, v and R are at hand: values and state."""
    g = tl.dot(dA, other, g, input_precision=PREC)
    for j in tl.static_range(DV // BV):
        c = j * BV + tl.arange(0, BV)
        if DV > BV:
            values = load_tile(y, start, rows, stride, c, n, dtype)
            state = load_chunk_state(states, before, program, seg, half, cols, c, DV, SEGMENTS)
        g = tl.dot(values, tl.trans(state), g, input_precision=PREC)
    return g


@triton.jit
def store_weight_gradient(dw, db, program, cols, dW, dB, BIAS: tl.constexpr):
    """What one program adds to the gradients of W and b."""
    HP: tl.constexpr = cols.shape[0]
    tl.store(dw + program * HP * HP + cols[:, None] * HP + cols[None, :], dW)
    if BIAS:
        tl.store(db + program * HP + cols, dB)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Grid: (segments, B H, blocks of v's columns), without the last for the gradients.


@triton.jit
def forward_kernel(q, k, v, wq, wk, bq, bk, s0, o, den, log_den, s1,
                   qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, H, T, SEG, eps,
                   HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                   BIAS: tl.constexpr, HAS_S0: tl.constexpr, LOG_DEN: tl.constexpr, STORE_S1: tl.constexpr,
                   dtype: tl.constexpr, PREC: tl.constexpr):
    bh, seg, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h, n_seg = bh // H, bh % H, tl.num_programs(1)
    q, k, v, o = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, o + b * ob + h * oh
    cols, vcols, rows = tl.arange(0, HP), block * BV + tl.arange(0, BV), tl.arange(0, L)
    causal = rows[:, None] >= rows[None, :]
    WQ, BQ = load_map(wq, bq, h, cols, MAP, BIAS, dtype)
    WK, BK = load_map(wk, bk, h, cols, MAP, BIAS, dtype)
    Sp, zp = load_state(s0, bh * n_seg + seg, 0, cols, vcols, DV + 1, HAS_S0)
    Sm, zm = load_state(s0, bh * n_seg + seg, 1, cols, vcols, DV + 1, HAS_S0)
    for i in tl.range(chunks_of_segment(seg, SEG, T, L), disable_licm=True):
        chunk = seg.to(tl.int64) * (SEG // L) + i
        start = chunk * L
        n = tl.minimum(T - start, L).to(tl.int32)
        rawq = load_tile(q, start, rows, qt, cols, n, dtype)
        rawk = load_tile(k, start, rows, kt, cols, n, dtype)
        x = load_tile(v, start, rows, vt, vcols, n, dtype)
        # q before k, float32 for as short as can be: registers are what there is least of
        qp, qm, top = features(rawq, q, start, rows, qt, cols, WQ, BQ, n, 1.0, True, MAP, BIAS, PREC)
        d = tl.sum(qp * zp[None, :] + qm * zm[None, :], axis=1)
        qp, qm = qp.to(dtype), qm.to(dtype)
        inside = (rows < n).to(tl.float32)
        kp, km, _ = features(rawk, k, start, rows, kt, cols, WK, BK, n, inside[:, None], False, MAP, BIAS, PREC)
        kp, km = kp.to(dtype), km.to(dtype)
        zp += column_sums(kp, None, dtype, PREC)
        zm += column_sums(km, None, dtype, PREC)
        A = tl.dot(qp, tl.trans(kp), input_precision=PREC)
        A = tl.dot(qm, tl.trans(km), A, input_precision=PREC)
        A = tl.where(causal, A, nothing(n))
        exact = d + tl.sum(A, axis=1)  # for the backward pass, which rounds weights that are already divided
        exact = tl.where(exact < eps, float("inf"), exact)  # such a row attends to nothing: zero, with zero gradient
        A = A.to(dtype)
        d += tl.sum(widen(A), axis=1)  # of the rounded weights, so that they sum to one
        y = tl.dot(qp, Sp.to(dtype), input_precision=PREC)
        y = tl.dot(qm, Sm.to(dtype), y, input_precision=PREC)
        y = tl.dot(A, x, y, input_precision=PREC)
        store_tile(o, start, rows, ot, vcols, n, y * tl.where(exact == float("inf"), 0.0, 1.0 / d)[:, None])
        if block == 0:
            tl.store(den + bh * T + start + rows, exact, mask=rows < n)
            if LOG_DEN:
                log = tl.where(exact == float("inf"), -1e30, tl.log(exact) + top)
                tl.store(log_den + bh * T + start + rows, log, mask=rows < n)
        Sp = tl.dot(tl.trans(kp), x, Sp, input_precision=PREC)
        Sm = tl.dot(tl.trans(km), x, Sm, input_precision=PREC)
    if STORE_S1:
        if seg == n_seg - 1:
            store_state(s1, bh, 0, cols, vcols, DV + 1, Sp, zp, block == 0)
            store_state(s1, bh, 1, cols, vcols, DV + 1, Sm, zm, block == 0)


@triton.jit
def walk(x, y, w, bias, o, den, dlog, deltas, chunks, z, total, seg, bh, block, n_seg,
         xb, xh, xt, yb, yh, yt, ob, oh, ot, H, T, SEG,
         HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
         BIAS: tl.constexpr, CHUNKS: tl.constexpr, TOTAL: tl.constexpr, BACKWARD: tl.constexpr, DLOG: tl.constexpr,
         dtype: tl.constexpr, PREC: tl.constexpr):
    """Sums of phi(x)^T [y, 1] over a segment, or in the backward pass, from its last token to its first, of
    (phi(x) / den)^T [y, delta] with y = do: with CHUNKS the sum before each chunk, with TOTAL that of the segment."""
    b, h, N = bh // H, bh % H, tl.cdiv(T, L)
    x, y = x + b * xb + h * xh, y + b * yb + h * yh
    if BACKWARD:
        o += b * ob + h * oh
    cols, vcols, rows = tl.arange(0, HP), block * BV + tl.arange(0, BV), tl.arange(0, L)
    W, B = load_map(w, bias, h, cols, MAP, BIAS, dtype)
    Sp, Sm = tl.zeros((HP, BV), tl.float32), tl.zeros((HP, BV), tl.float32)
    zp, zm = tl.zeros((HP,), tl.float32), tl.zeros((HP,), tl.float32)
    n_chunks = chunks_of_segment(seg, SEG, T, L)
    for i in range(n_chunks):
        chunk = seg.to(tl.int64) * (SEG // L) + (n_chunks - 1 - i if BACKWARD else i)
        start = chunk * L
        n = tl.minimum(T - start, L).to(tl.int32)
        if CHUNKS:
            store_chunk_state(chunks, z, bh * N + chunk, 0, cols, vcols, DV, Sp, zp, block == 0)
            store_chunk_state(chunks, z, bh * N + chunk, 1, cols, vcols, DV, Sm, zm, block == 0)
        raw = load_tile(x, start, rows, xt, cols, n, dtype)
        scale = (rows < n).to(tl.float32)
        after = start + (-L if BACKWARD else L)
        prefetch(x, after, rows, xt, HP, T)
        prefetch(y, after, rows, yt, DV, T)
        if BACKWARD:
            prefetch(o, after, rows, ot, DV, T)
            scale = load_reciprocal(den, bh * T + start, rows, n)
            delta = tl.zeros((L,), tl.float32)
            if DLOG:
                delta += tl.load(dlog + bh * T + start + rows, mask=rows < n, other=0.0)
            for j in tl.static_range(DV // BV):
                c = j * BV + tl.arange(0, BV)
                delta -= tl.sum(load_tile(o, start, rows, ot, c, n, tl.float32)
                                * load_tile(y, start, rows, yt, c, n, tl.float32), axis=1)
            if CHUNKS:
                if block == 0:
                    tl.store(deltas + bh * T + start + rows, delta, mask=rows < n)
        value = load_tile(y, start, rows, yt, vcols, n, dtype)
        p, m, _ = features(raw, x, start, rows, xt, cols, W, B, n, scale[:, None], BACKWARD, MAP, BIAS, PREC)
        p, m = p.to(dtype), m.to(dtype)
        Sp = tl.dot(tl.trans(p), value, Sp, input_precision=PREC)
        Sm = tl.dot(tl.trans(m), value, Sm, input_precision=PREC)
        if BACKWARD:
            zp += column_sums(p, delta, dtype, PREC)
            zm += column_sums(m, delta, dtype, PREC)
        else:
            zp += column_sums(p, None, dtype, PREC)
            zm += column_sums(m, None, dtype, PREC)
    if TOTAL:
        store_state(total, bh * n_seg + seg, 0, cols, vcols, DV + 1, Sp, zp, block == 0)
        store_state(total, bh * n_seg + seg, 1, cols, vcols, DV + 1, Sm, zm, block == 0)


@triton.jit
def states_kernel(k, v, wk, bk, s, zs, ts, q, do, wq, bq, o, den, dlog, deltas, r, zr, tr,
                  kb, kh, kt, vb, vh, vt, qb, qh, qt, yb, yh, yt, ob, oh, ot, H, T, SEG,
                  HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                  BIAS: tl.constexpr, TOTAL: tl.constexpr, BACKWARD: tl.constexpr, DLOG: tl.constexpr,
                  dtype: tl.constexpr, PREC: tl.constexpr):
    """For the forward pass the total of each segment of k and v. For the backward pass the sums before each chunk, S_n
    and R_n, by independent programs of one launch: together they fill the GPU's last wave better than in turns."""
    bh, seg, block, n_seg = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    if BACKWARD and block < DV // BV:  # the longer walk first
        walk(q, do, wq, bq, o, den, dlog, deltas, r, zr, tr, seg, bh, block, n_seg, qb, qh, qt, yb, yh, yt, ob, oh, ot,
             H, T, SEG, HP, DV, BV, L, MAP, BIAS, True, TOTAL, True, DLOG, dtype, PREC)
    else:
        walk(k, v, wk, bk, o, den, dlog, deltas, s, zs, ts, seg, bh, block % (DV // BV), n_seg, kb, kh, kt, vb, vh, vt,
             0, 0, 0, H, T, SEG, HP, DV, BV, L, MAP, BIAS, BACKWARD, TOTAL, False, False, dtype, PREC)


@triton.jit
def prefix_kernel(sums, first, last, states, z, n_seg, HP: tl.constexpr, DV: tl.constexpr, HAS_FIRST: tl.constexpr,
                  HAS_LAST: tl.constexpr, CHUNKS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """(B H, n_seg, P, DV + 1) sums of the segments -> the sum before each, beginning with `first` or zero: in place, or
    with CHUNKS in the layout of the chunks' states. The sum of all goes to `last`."""
    bh, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size: tl.constexpr = 2 * HP * (DV + 1)
    row, col, inside = at // (DV + 1), at % (DV + 1), at < size
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_FIRST:
        total += tl.load(first + bh * size + at, mask=inside, other=0.0)
    for i in range(n_seg):
        seg = bh * n_seg + (n_seg - 1 - i if BACKWARD else i)
        own = tl.load(sums + seg * size + at, mask=inside, other=0.0)
        if CHUNKS:
            tl.store(states + (seg * 2 * HP + row) * DV + col, total.to(states.dtype.element_ty),
                     mask=inside & (col < DV))
            tl.store(z + seg * 2 * HP + row, total, mask=inside & (col == DV))
        else:
            tl.store(sums + seg * size + at, total, mask=inside)
        total += own
    if HAS_LAST:
        tl.store(last + bh * size + at, total, mask=inside)


@triton.jit
def grad_q_kernel(q, k, v, wq, wk, bq, bk, s, z, s0, z0, do, den, deltas, dq, dw, db,
                  qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, xb, xh, xt, H, T, SEG, WALK,
                  HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                  BIAS: tl.constexpr, SEGMENTS: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    bh, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, N = bh // H, bh % H, tl.cdiv(T, L)
    q, k, v = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh
    do, dq, den, deltas = do + b * gb + h * gh, dq + b * xb + h * xh, den + bh * T, deltas + bh * T
    cols, rows = tl.arange(0, HP), tl.arange(0, L)
    causal = rows[:, None] >= rows[None, :]
    WQ, BQ = load_map(wq, bq, h, cols, MAP, BIAS, dtype)
    WK, BK = load_map(wk, bk, h, cols, MAP, BIAS, dtype)
    dW, dB = tl.zeros((HP, HP), tl.float32), tl.zeros((HP,), tl.float32)
    segment = bh * tl.cdiv(T, WALK) + seg.to(tl.int64) * SEG // WALK
    for i in tl.range(chunks_of_segment(seg, SEG, T, L), disable_licm=True):
        chunk = seg.to(tl.int64) * (SEG // L) + i
        start = chunk * L
        n = tl.minimum(T - start, L).to(tl.int32)
        program = bh * N + chunk
        rawk = load_tile(k, start, rows, kt, cols, n, dtype)
        dy = load_tile(do, start, rows, gt, tl.arange(0, BV), n, dtype)
        x = load_tile(v, start, rows, vt, tl.arange(0, BV), n, dtype)
        raw = load_tile(q, start, rows, qt, cols, n, dtype)
        delta = tl.load(deltas + start + rows, mask=rows < n, other=0.0)
        after = start + L
        prefetch(q, after, rows, qt, HP, T)
        prefetch(k, after, rows, kt, HP, T)
        prefetch(v, after, rows, vt, DV, T)
        prefetch(do, after, rows, gt, DV, T)
        if after < T:
            prefetch(s + (program + 1) * 2 * HP * DV, 0, cols, DV, DV, HP)
            prefetch(s + (program * 2 + 3) * HP * DV, 0, cols, DV, DV, HP)
        inside = (rows < n).to(tl.float32)
        kp, km, _ = features(rawk, k, start, rows, kt, cols, WK, BK, n, inside[:, None], False, MAP, BIAS, PREC)
        kp, km = kp.to(dtype), km.to(dtype)
        dA = tl.zeros((L, L), tl.float32) + delta[:, None]
        gp = delta[:, None] * load_chunk_z(z, z0, program, segment, 0, cols, SEGMENTS)[None, :]
        gm = delta[:, None] * load_chunk_z(z, z0, program, segment, 1, cols, SEGMENTS)[None, :]
        for j in tl.static_range(DV // BV):
            c = j * BV + tl.arange(0, BV)
            if j > 0:
                dy = load_tile(do, start, rows, gt, c, n, dtype)
                x = load_tile(v, start, rows, vt, c, n, dtype)
            dA = tl.dot(dy, tl.trans(x), dA, input_precision=PREC)
            state = load_chunk_state(s, s0, program, segment, 0, cols, c, DV, SEGMENTS)
            gp = tl.dot(dy, tl.trans(state), gp, input_precision=PREC)
            state = load_chunk_state(s, s0, program, segment, 1, cols, c, DV, SEGMENTS)
            gm = tl.dot(dy, tl.trans(state), gm, input_precision=PREC)
        dA = tl.where(causal, dA, nothing(n)).to(dtype)
        r = load_reciprocal(den, start, rows, n)[:, None]
        gp = tl.dot(dA, kp, gp, input_precision=PREC)
        gm = tl.dot(dA, km, gm, input_precision=PREC)
        if MAP is not None:
            p, m, _ = halves(raw, WQ, BQ, 1.0, True, MAP, BIAS, PREC)
            du = (half_gradient(p, gp, MAP) - half_gradient(m, gm, MAP)) * r
            if BIAS:
                dB += tl.sum(du, axis=0)
            du = du.to(dtype)
            store_tile(dq, start, rows, xt, cols, n, tl.dot(du, tl.trans(WQ), input_precision=PREC))
            dW = tl.dot(tl.trans(raw), du, dW, input_precision=PREC)
        else:
            store_tile(dq, start, rows, xt, cols, n, gp * r)
            store_tile(dq + HP, start, rows, xt, cols, n, gm * r)
    if MAP is not None:
        store_weight_gradient(dw, db, bh * tl.num_programs(1) + seg, cols, dW, dB, BIAS)


@triton.jit
def grad_kv_kernel(q, k, v, wq, wk, bq, bk, r, z, r0, z0, do, den, deltas, dk, dv, dw, db,
                   qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, xb, xh, xt, yb, yh, yt, H, T, SEG, WALK,
                   HP: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, MAP: tl.constexpr,
                   BIAS: tl.constexpr, SEGMENTS: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    bh, seg = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, N = bh // H, bh % H, tl.cdiv(T, L)
    q, k, v = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh
    do, den, deltas = do + b * gb + h * gh, den + bh * T, deltas + bh * T
    dk, dv = dk + b * xb + h * xh, dv + b * yb + h * yh
    cols, rows = tl.arange(0, HP), tl.arange(0, L)
    causal = rows[:, None] <= rows[None, :]                       # (keys, queries): everything here is transposed
    WQ, BQ = load_map(wq, bq, h, cols, MAP, BIAS, dtype)
    WK, BK = load_map(wk, bk, h, cols, MAP, BIAS, dtype)
    dW, dB = tl.zeros((HP, HP), tl.float32), tl.zeros((HP,), tl.float32)
    segment = bh * tl.cdiv(T, WALK) + seg.to(tl.int64) * SEG // WALK
    for i in tl.range(chunks_of_segment(seg, SEG, T, L), disable_licm=True):
        chunk = seg.to(tl.int64) * (SEG // L) + i
        start = chunk * L
        n = tl.minimum(T - start, L).to(tl.int32)
        program = bh * N + chunk
        rawq = load_tile(q, start, rows, qt, cols, n, dtype)
        raw = load_tile(k, start, rows, kt, cols, n, dtype)
        dy = load_tile(do, start, rows, gt, tl.arange(0, BV), n, dtype)
        inside = (rows < n).to(tl.float32)
        scale = load_reciprocal(den, start, rows, n)
        # psi_q
        qp, qm, _ = features(rawq, q, start, rows, qt, cols, WQ, BQ, n, scale[:, None], True, MAP, BIAS, PREC)
        qp, qm = qp.to(dtype), qm.to(dtype)
        kp, km, _ = features(raw, k, start, rows, kt, cols, WK, BK, n, inside[:, None], False, MAP, BIAS, PREC)
        kp, km = kp.to(dtype), km.to(dtype)
        x = load_tile(v, start, rows, vt, tl.arange(0, BV), n, dtype)
        A = tl.dot(kp, tl.trans(qp), input_precision=PREC)
        A = tl.dot(km, tl.trans(qm), A, input_precision=PREC)
        A = tl.where(causal, A, nothing(n)).to(dtype)
        dA = tl.zeros((L, L), tl.float32) + tl.load(deltas + start + rows, mask=rows < n, other=0.0)[None, :]
        for j in tl.static_range(DV // BV):
            c = j * BV + tl.arange(0, BV)
            if j > 0:
                dy = load_tile(do, start, rows, gt, c, n, dtype)
                x = load_tile(v, start, rows, vt, c, n, dtype)
            y = tl.dot(A, dy, input_precision=PREC)
            Rp = load_chunk_state(r, r0, program, segment, 0, cols, c, DV, SEGMENTS)
            y = tl.dot(kp, Rp, y, input_precision=PREC)
            Rm = load_chunk_state(r, r0, program, segment, 1, cols, c, DV, SEGMENTS)
            y = tl.dot(km, Rm, y, input_precision=PREC)
            store_tile(dv, start, rows, yt, c, n, y)
            dA = tl.dot(x, tl.trans(dy), dA, input_precision=PREC)
        dA = tl.where(causal, dA, nothing(n)).to(dtype)
        if MAP == "hedgehog_exp":
            kp, km = below_bound(kp, km)
        g = tl.zeros((L, HP), tl.float32) + load_chunk_z(z, z0, program, segment, 0, cols, SEGMENTS)[None, :]
        g = feature_gradient(g, dA, qp, x, Rp, v, start, rows, vt, n, r, r0, program, segment, 0, cols, DV, BV,
                             SEGMENTS, dtype, PREC)
        if MAP is not None:
            du = half_gradient(kp, g, MAP)
        else:
            store_tile(dk, start, rows, xt, cols, n, g)
        g = tl.zeros((L, HP), tl.float32) + load_chunk_z(z, z0, program, segment, 1, cols, SEGMENTS)[None, :]
        g = feature_gradient(g, dA, qm, x, Rm, v, start, rows, vt, n, r, r0, program, segment, 1, cols, DV, BV,
                             SEGMENTS, dtype, PREC)
        if MAP is not None:
            du -= half_gradient(km, g, MAP)
            if BIAS:
                dB += tl.sum(du, axis=0)
            du = du.to(dtype)
            store_tile(dk, start, rows, xt, cols, n, tl.dot(du, tl.trans(WK), input_precision=PREC))
            dW = tl.dot(tl.trans(raw), du, dW, input_precision=PREC)
        else:
            store_tile(dk + HP, start, rows, xt, cols, n, g)
    if MAP is not None:
        store_weight_gradient(dw, db, bh * tl.num_programs(1) + seg, cols, dW, dB, BIAS)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def segments(programs, T, L, device, slower, extra):
    """(tokens of a segment, how many): what takes the least time, in whole waves of programs on the GPU, if cut a chunk
    takes `slower` times as long, the sums of each segment as long as one chunk, and `extra` chunks come on top."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    slots, n_chunks = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, -(-T // L)

    def time(c):
        waves, walk = -(-programs * c // slots), -(-n_chunks // c)
        return walk * waves if c == 1 else waves * (slower * walk + 1) + extra
    chunks = -(-n_chunks // min(range(1, min(n_chunks, 64) + 1), key=time))
    return chunks * L, -(-n_chunks // chunks)


def options(q, v, wq, bq, kind):
    """The compile-time part of every launch. HP: half the feature width, which is D where the map is made inside."""
    HP = q.shape[-1] // (1 if wq is not None else 2)
    DV = v.shape[-1]
    return dict(HP=HP, DV=DV, BV=min(DV, 64), MAP=None if wq is None else kind, BIAS=bq is not None,
                **products(v.dtype, HP))


def products(dtype, width):
    """How products are made of tensors in `dtype`, tiles of which are (L, width)."""
    bf16 = dtype == torch.bfloat16
    L = 64 if bf16 else 32 if width <= 64 else 16  # what fits into shared memory
    return dict(L=L, dtype=tl.bfloat16 if bf16 else tl.float32, PREC="ieee" if bf16 else "tf32x3",
                num_warps=4 if width <= 64 else 8)


def rows_in_reach(*tensors):
    """Copies of those with rows far apart: the kernels count within a chunk in 32 bits, from chunk to chunk in 64."""
    return [x if x.stride(2) < 2**24 else x.contiguous() for x in tensors]


def projections_like(*tensors):
    """For each (B, H, T, D) one over memory laid out as (B, T, H, D), so that merging the heads is a view."""
    return [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in tensors]


def prefix(sums, first, last, states, z, opt, backward):
    """`prefix_kernel` over sums (B H, n_seg, P (DV + 1)); `first`, `last`, and `states` and `z`, may be None."""
    n_seg, size = sums.shape[1:]
    prefix_kernel[(sums.shape[0], triton.cdiv(size, 1024))](
        sums, first, last, states, z, n_seg, HP=opt["HP"], DV=opt["DV"], HAS_FIRST=first is not None,
        HAS_LAST=last is not None, CHUNKS=states is not None, BACKWARD=backward, BLOCK=1024)


def attention_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wq: torch.Tensor | None,
                      wk: torch.Tensor | None, bq: torch.Tensor | None, bk: torch.Tensor | None,
                      state: torch.Tensor | None, return_state: bool, return_log_den: bool, eps: float,
                      kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, den (B, H, T), its logarithm with what queries have been divided by, the state after the last token
    (B, H, P, D+1)), the last two empty where nobody asked for them."""
    B, H, T, _ = q.shape
    opt = options(q, v, wq, bq, kind)
    o, den, log_den, s1 = attention_outputs(q, v, wq, return_state, return_log_den)
    n_blocks, size = opt["DV"] // opt["BV"], 2 * opt["HP"] * (opt["DV"] + 1)
    # The sums of the segments first: a walk of 0.4 times the length, and the prefix. (Measured, as below, on an H100.)
    seg, n_seg = segments(B * H * n_blocks, T, opt["L"], q.device, 1.4, 4)
    s0 = state
    if n_seg > 1:
        s0 = q.new_empty(B * H, n_seg, size, dtype=torch.float32)
        states_kernel[(B * H, n_seg, n_blocks)](
            k, v, wk, bk, None, None, s0, *[None] * 11, *k.stride()[:3], *v.stride()[:3], *[0] * 9, H, T, seg,
            TOTAL=True, BACKWARD=False, DLOG=False, num_stages=1, **opt)
        prefix(s0, state, None, None, None, opt, backward=False)
    num_stages = 2 if v.dtype == torch.bfloat16 and opt["HP"] <= 64 else 1  # elsewhere shared memory is full with one
    forward_kernel[(B * H, n_seg, n_blocks)](
        q, k, v, wq, wk, bq, bk, s0, o, den, log_den if return_log_den else None, s1, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], H, T, seg, eps, HAS_S0=s0 is not None,
        LOG_DEN=return_log_den, STORE_S1=return_state, num_stages=num_stages, **opt)
    return o, den, log_den, s1


def attention_outputs(q, v, wq, return_state, return_log_den):
    B, H, T, P = q.shape[:3] + (q.shape[-1] * (1 if wq is None else 2),)
    state = (B, H, P, v.shape[-1] + 1) if return_state else (0,)
    shapes = (B, H, T), (B, H, T) if return_log_den else (0,), state
    return (*projections_like(v), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes))


def attention_fake(q, k, v, wq, wk, bq, bk, state, return_state, return_log_den, eps, kind):
    return attention_outputs(q, v, wq, return_state, return_log_den)


def backward_kernels(do: torch.Tensor, dlog: torch.Tensor | None, ds1: torch.Tensor | None, q: torch.Tensor,
                     k: torch.Tensor, v: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor | None,
                     bq: torch.Tensor | None, bk: torch.Tensor | None, state: torch.Tensor | None, o: torch.Tensor,
                     den: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """[dq, dk, dv, dwq, dwk, dbq, dbk, dstate]; those that nothing asked for are empty."""
    B, H, T, _ = q.shape
    do, = rows_in_reach(*rows_in_one_piece(do))
    dlog, ds1 = (x if x is None else x.contiguous() for x in (dlog, ds1))
    opt = options(q, v, wq, bq, kind)
    HP, float32 = opt["HP"], torch.float32
    n_chunks = -(-T // opt["L"])
    seg = max(CHUNKS_PER_PROGRAM, -(-n_chunks // 65535)) * opt["L"]  # 65,535 is the most that a grid may have
    grid = (B * H, -(-T // seg))

    def parts(w, b):
        """Where each program writes its share of dW and db."""
        return (None if w is None else q.new_empty(B, H, grid[1], HP, HP, dtype=float32),
                None if b is None else q.new_empty(B, H, grid[1], HP, dtype=float32))

    (dwq, dbq), (dwk, dbk) = parts(wq, bq), parts(wk, bk)
    dq, dk, dv = projections_like(q, k, v)
    deltas = torch.empty_like(den)
    dstate = torch.empty_like(state) if state is not None else None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    n_blocks, size = opt["DV"] // opt["BV"], 2 * HP * (opt["DV"] + 1)
    # Segments are walked once, but the gradient kernels read more: as much as 20 chunks of this walk.
    walk_tokens, n_seg = segments(2 * B * H * n_blocks, T, opt["L"], q.device, 1.0, 20)
    if n_seg > 1:  # a program of the gradient kernels reads from one segment alone
        walk_tokens = -(-walk_tokens // seg) * seg
        n_seg = -(-T // walk_tokens)
    held = q.dtype if opt["dtype"] is tl.bfloat16 else float32
    s, r = q.new_empty(2, B * H, n_chunks, 2 * HP, opt["DV"], dtype=held)
    zs, zr = q.new_empty(2, B * H, n_chunks, 2 * HP, dtype=float32)
    total = n_seg > 1 or state is not None or ds1 is not None
    ts = tr = s0 = zs0 = r0 = zr0 = None
    if total:
        ts, tr = q.new_empty(2, B * H, n_seg, size, dtype=float32)
    states_kernel[(B * H, n_seg, 2 * n_blocks)](
        k, v, wk, bk, s, zs, ts, q, do, wq, bq, o, den, dlog, deltas, r, zr, tr, *k.stride()[:3], *v.stride()[:3],
        *q.stride()[:3], *do.stride()[:3], *o.stride()[:3], H, T, walk_tokens, TOTAL=total, BACKWARD=True,
        DLOG=dlog is not None, num_stages=1, **opt)
    if total:
        exact = float32 if state is not None or ds1 is not None else held  # a given state is rounded once, not twice
        s0, r0 = q.new_empty(2, B * H, n_seg, 2 * HP, opt["DV"], dtype=exact)
        zs0, zr0 = q.new_empty(2, B * H, n_seg, 2 * HP, dtype=float32)
        prefix(ts, state, None, s0, zs0, opt, backward=False)
        prefix(tr, ds1, dstate, r0, zr0, opt, backward=True)
    grad_kv_kernel[grid](q, k, v, wq, wk, bq, bk, r, zr, r0, zr0, do, den, deltas, dk, dv, dwk, dbk, *strides,
                         *dk.stride()[:3], *dv.stride()[:3], H, T, seg, walk_tokens, SEGMENTS=total, num_stages=1,
                         **opt)
    grad_q_kernel[grid](q, k, v, wq, wk, bq, bk, s, zs, s0, zs0, do, den, deltas, dq, dwq, dbq, *strides,
                        *dq.stride()[:3], H, T, seg, walk_tokens, SEGMENTS=total, num_stages=1,
                        **opt)
    empty = lambda: q.new_empty(0, dtype=float32)
    sums = [empty() if x is None else x.sum(dim=(0, 2)).to(w.dtype)
            for x, w in ((dwq, wq), (dwk, wk), (dbq, bq), (dbk, bk))]
    return [dq, dk, dv, *sums, empty() if dstate is None else dstate]


def backward_fake(do, dlog, ds1, q, k, v, wq, wk, bq, bk, state, o, den, kind):
    empty = q.new_empty(0, dtype=torch.float32)
    return [*projections_like(q, k, v),
            *(torch.empty_like(empty if w is None else w) for w in (wq, wk, bq, bk)),
            torch.empty_like(empty if state is None else state)]


def save_for_backward(ctx, inputs, output):
    q, k, v, wq, wk, bq, bk, state, return_state, return_log_den, _, kind = inputs
    ctx.save_for_backward(q, k, v, wq, wk, bq, bk, state, output[0], output[1])
    ctx.return_state, ctx.return_log_den, ctx.kind = return_state, return_log_den, kind


def run_backward(ctx, do, _, dlog, ds1):
    *inputs, o, den = ctx.saved_tensors
    dlog, ds1 = dlog if ctx.return_log_den else None, ds1 if ctx.return_state else None  # PyTorch makes zeros of none
    grads = torch.ops.hedgehog.attention_backward(do, dlog, ds1, *inputs, o, den, ctx.kind)
    return (*(g if x is not None else None for g, x in zip(grads, inputs)), None, None, None, None)


def no_second_derivative(ctx, *_):
    raise NotImplementedError("the fused kernels have no second derivative: where a gradient is differentiated again "
                              "(create_graph=True), ask for form='chunked'")


def on_device_of_first(kernels):
    """Triton launches on the current device, which need not be the one of the tensors."""
    def launch(x, *others):
        with torch.cuda.device_of(x):  # does nothing for a tensor on the CPU
            return kernels(x, *others)
    return launch


def register(name, forward, forward_fake, save, backward, kernels, kernels_fake):
    """hedgehog::name, and hedgehog::name_backward, which `backward` calls.

    torch.library.custom_op would do this in one line, and check at each call that no output shares memory with an
    input, which takes longer than a small forward pass."""
    name = f"hedgehog::{name}"
    for op, launch, fake in ((name, forward, forward_fake), (f"{name}_backward", kernels, kernels_fake)):
        torch.library.define(op, torch.library.infer_schema(launch, mutates_args=()))
        torch.library.impl(op, "default", on_device_of_first(launch))
        torch.library.register_fake(op, fake)
    torch.library.register_autograd(name, backward, setup_context=save)
    torch.library.register_autograd(f"{name}_backward", no_second_derivative)


register("attention", attention_kernels, attention_fake, save_for_backward, run_backward, backward_kernels,
         backward_fake)


# ---------------------------------------------------------------------------------------------------------------------
# What hedgehog.py calls


# KiB that a program takes on a Hopper GPU, with half the features at most 64, and with more.
SHARED = {torch.bfloat16: (96, 148), torch.float16: (136, 136), torch.float32: (136, 136)}


@torch.compiler.assume_constant_result
def gpu(index):
    """(compute capability, KiB of shared memory that a program may have)."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin // 1024


def unsupported(x, P, D, has_map):
    """Why the kernels cannot run on tensors like x with q (B, H, T, P) and v (B, H, T, D), or None."""
    if x.dtype not in SHARED:
        return f"dtype {x.dtype}, the kernels take bfloat16, float16 and float32"
    if D not in (32, 64, 128):
        return f"head width {D}, the kernels take 32, 64 and 128"
    if has_map and P != D:
        return f"q and k of width {P} beside v of width {D}, with the map the kernels take one width for all"
    if not has_map and P not in (32, 64, 128, 256):
        return f"feature width {P}, the kernels take 32, 64, 128 and 256"
    if x.is_cuda:
        if torch.version.hip:
            return "an AMD GPU, the kernels hold instructions of NVIDIA's"
        capability, shared = gpu(x.device.index)
        needed = SHARED[x.dtype][int((P if has_map else P // 2) > 64)]
        if capability < (8, 0):
            return f"a GPU of compute capability {capability[0]}.{capability[1]}, the kernels take 8.0 and newer"
        if shared < needed:
            return f"{shared} KiB of shared memory, the kernels take {needed} for {x.dtype} at this width"
    elif not INTERPRETED and x.device.type != "meta":  # meta tensors have shapes, and start no kernel
        return f"tensors on {x.device}, the kernels take those on a GPU: form='chunked' runs anywhere"
    return None


def check_inputs(q, k, v, wq, wk, bq, bk, state, kind):
    """A sentence for each call that would fail in a kernel, or be silently wrong."""
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3] or q.shape[2] < 1:
        raise ValueError(f"expected q and k (B, H, T, P) and v (B, H, T, D) with T >= 1, got {tuple(q.shape)}, "
                         f"{tuple(k.shape)} and {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        raise ValueError(f"the last axis of q, k and v must be contiguous, got strides {q.stride()}, {k.stride()} and "
                         f"{v.stride()}: call contiguous() on them")
    B, H, _, W = q.shape
    P, D = W * (1 if wq is None else 2), v.shape[-1]
    shapes = dict(wq=(H, W, W), wk=(H, W, W), bq=(H, W), bk=(H, W), state=(B, H, P, D + 1))
    for (name, shape), x in zip(shapes.items(), (wq, wk, bq, bk, state)):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
        dtypes = [torch.float32] if name == "state" else list(SHARED)
        if x is not None and x.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if (wq is None) != (wk is None) or (bq is None) != (bk is None) or wq is None and bq is not None:
        raise ValueError("give both weights or none, and both biases or none, biases only with weights")
    if kind not in FUSED_MAPS:
        raise ValueError(f"unknown map {kind!r}: the kernels make {' and '.join(FUSED_MAPS)}, give others' features")
    devices = {x.device for x in (q, k, v, wq, wk, bq, bk, state) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(map(str, devices))}")
    why = unsupported(v, W, D, wq is not None)
    if why:
        raise ValueError(f"hedgehog_triton cannot run this: {why}")


def fused_attention(q, k, v, wq=None, wk=None, bq=None, bk=None, state=None, return_state=False, eps=1e-30,
                    kind="hedgehog", return_log_den=False):
    """Causal linear attention, with wq, wk (H, D, D) of raw q, k (B, H, T, D), without them of features (B, H, T, P).

    v: (B, H, T, D), of one dtype with q and k. They may be views, such as heads of one projection, but the last axis is
    contiguous. kind: the map that wq and wk belong to, one of FUSED_MAPS. Returns y (B, H, T, D), and with
    return_log_den and return_state a tuple, y and then each of them in float32: the logarithm of the denominators of
    phi as it is, not divided (B, H, T), -1e30 for a row that attends to nothing, and the state (B, H, P, D+1). Raises
    ValueError for what does not match, and for what `unsupported` names.
    Under torch.autocast raw q, k and v are cast, as for softmax attention; weights and state are not, nor features,
    which may span more than float16 can.
    """
    if wq is not None:
        q, k, v = as_autocast(q, k, v)
    check_inputs(q, k, v, wq, wk, bq, bk, state, kind)
    top = None
    if v.dtype != torch.bfloat16 and v.shape[-1] == 128 and wq is not None:  # W and its parts do not fit on the chip
        q, k = affine(q, wq, bq), affine(k, wk, bk)
        if return_log_den and kind == "hedgehog_exp":
            top = q.detach().abs().amax(-1)
        q, k = phi(q, kind, is_query=True), phi(k, kind)
        wq = wk = bq = bk = None
    q, k, v = rows_in_reach(q, k, v)
    wq, wk, bq, bk, state = (x if x is None else x.contiguous() for x in (wq, wk, bq, bk, state))
    y, _, log_den, state = torch.ops.hedgehog.attention(q, k, v, wq, wk, bq, bk, state, return_state, return_log_den,
                                                        eps, kind)
    log_den = log_den if top is None else log_den + top
    more = [log_den] * return_log_den + [state] * return_state
    return (y, *more) if more else y


def affine(x, w, b):
    with torch.autocast(x.device.type, enabled=False):
        u = x.float() @ w.float()  # weights may be float16, in which exp(u) would overflow
        return u if b is None else u + b.float().unsqueeze(-2)


def phi(u, kind, is_query=False):
    with torch.autocast(u.device.type, enabled=False):
        if kind == "hedgehog_exp":
            return safe_exp(torch.cat((u, -u), dim=-1), is_query)
        return torch.stack((u, -u), dim=-2).softmax(dim=-1).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# HybridAttention: softmax over the last W keys, and over what is older, by the kernels above, as if it were one more.
# Grid: (B H blocks of L tokens). Logarithms of weights are to base 2, as the exponential of a GPU.


@triton.jit
def block_of(T, L: tl.constexpr):
    """(which of the B H heads, the first token of this program's block)."""
    program, N = tl.program_id(0), tl.cdiv(T, L)
    return (program // N).to(tl.int64), (program % N).to(tl.int64) * L


@triton.jit
def blocks_back(start, W, L: tl.constexpr):
    """How many blocks hold keys in the window of a query of the block that begins with `start`."""
    return (tl.cdiv(tl.minimum(W - 1, start), L) + 1).to(tl.int32)


@triton.jit
def scores(x, y, distance, W, PREC: tl.constexpr):
    """x y^T / sqrt(D), to base 2, and -inf where the `distance` from key to query is not in the window."""
    D: tl.constexpr = x.shape[1]
    s = tl.dot(x, tl.trans(y), input_precision=PREC) * (LOG2E * D ** -0.5)
    return tl.where((distance >= 0) & (distance < W), s, float("-inf"))


@triton.jit
def weight_of_old(x, c, gate_bias, log_den, h, start, rows, first, n):
    """The logarithm of what all older than the window weighs for queries x: log_den times the gate. Before `first`
    there is none, and it says what log_den says of a query that attends to nothing."""
    log = tl.load(log_den + start + rows, mask=between(rows, first, n), other=-1e30)
    return (log + tl.sum(x.to(tl.float32) * c[None, :], axis=1) + tl.load(gate_bias + h).to(tl.float32)) * LOG2E


@triton.jit
def window_kernel(q, k, v, far, log_den, gate, gate_bias, y, log_total,
                  qb, qh, qt, kb, kh, kt, vb, vh, vt, fb, fh, ft, yb, yh, yt, H, T, W,
                  D: tl.constexpr, L: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    bh, start = block_of(T, L)
    b, h = bh // H, bh % H
    q, k, v, y = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, y + b * yb + h * yh
    far, log_den, log_total = far + b * fb + h * fh, log_den + bh * (T - W), log_total + bh * T
    cols, rows = tl.arange(0, D), tl.arange(0, L)
    n = tl.minimum(T - start, L).to(tl.int32)
    first = tl.maximum(W - start, 0).to(tl.int32)  # row that has older keys, which far begins with
    c = tl.load(gate + h * D + cols).to(tl.float32)
    x = load_tile(q, start, rows, qt, cols, n, dtype)
    top = weight_of_old(x, c, gate_bias, log_den, h, start - W, rows, first, n)
    total = tl.full((L,), 1.0, tl.float32)
    o = load_tile(far, start - W, rows, ft, cols, n, tl.float32, first)
    # From the block's own keys to the oldest, so that no row's maximum is ever -inf.
    for i in range(blocks_back(start, W, L)):
        at = start - i * L
        key = load_tile(k, at, rows, kt, cols, tl.minimum(T - at, L).to(tl.int32), dtype)
        s = scores(x, key, i * L + rows[:, None] - rows[None, :], W, PREC)
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        value = load_tile(v, at, rows, vt, cols, tl.minimum(T - at, L).to(tl.int32), dtype)
        o = tl.dot(p.to(dtype), value, o * shrink[:, None], input_precision=PREC)
        top = higher
    store_tile(y, start, rows, yt, cols, n, o * (1.0 / total)[:, None])
    tl.store(log_total + start + rows, top + tl.log2(total), mask=rows < n)


@triton.jit
def window_grad_q_kernel(q, k, v, far, log_den, gate, gate_bias, y, log_total, do, dq, dfar, dlog_den, dgate, deltas,
                         qb, qh, qt, kb, kh, kt, vb, vh, vt, fb, fh, ft, yb, yh, yt, gb, gh, gt, xb, xh, xt, zb, zh, zt,
                         H, T, W, D: tl.constexpr, L: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    bh, start = block_of(T, L)
    b, h, old = bh // H, bh % H, bh * (T - W)
    q, k, v, y = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, y + b * yb + h * yh
    do, dq, far, dfar = do + b * gb + h * gh, dq + b * xb + h * xh, far + b * fb + h * fh, dfar + b * zb + h * zh
    log_den, dlog_den, log_total, deltas = log_den + old, dlog_den + old, log_total + bh * T, deltas + bh * T
    cols, rows = tl.arange(0, D), tl.arange(0, L)
    n = tl.minimum(T - start, L).to(tl.int32)
    first = tl.maximum(W - start, 0).to(tl.int32)
    c = tl.load(gate + h * D + cols).to(tl.float32)
    x = load_tile(q, start, rows, qt, cols, n, dtype)
    dy = load_tile(do, start, rows, gt, cols, n, dtype)
    log = tl.load(log_total + start + rows, mask=rows < n, other=float("inf"))
    wide = dy.to(tl.float32)
    delta = tl.sum(wide * load_tile(y, start, rows, yt, cols, n, tl.float32), axis=1)
    dshare = tl.sum(wide * load_tile(far, start - W, rows, ft, cols, n, tl.float32, first), axis=1)
    share = tl.exp2(weight_of_old(x, c, gate_bias, log_den, h, start - W, rows, first, n) - log)
    dlog = share * (dshare - delta)
    tl.store(deltas + start + rows, delta, mask=rows < n)  # nothing before: the compiler moves no load above a store
    store_tile(dfar, start - W, rows, zt, cols, n, share[:, None] * wide, first)
    tl.store(dlog_den + (start - W) + rows, dlog, mask=between(rows, first, n))
    tl.store(dgate + tl.program_id(0).to(tl.int64) * D + cols, column_sums(x, dlog, dtype, PREC))
    g = tl.zeros((L, D), tl.float32)
    for i in range(blocks_back(start, W, L)):
        at = start - i * L
        key = load_tile(k, at, rows, kt, cols, tl.minimum(T - at, L).to(tl.int32), dtype)
        value = load_tile(v, at, rows, vt, cols, tl.minimum(T - at, L).to(tl.int32), dtype)
        p = tl.exp2(scores(x, key, i * L + rows[:, None] - rows[None, :], W, PREC) - log[:, None])
        ds = p * (tl.dot(dy, tl.trans(value), input_precision=PREC) - delta[:, None])
        g = tl.dot(ds.to(dtype), key, g, input_precision=PREC)
    store_tile(dq, start, rows, xt, cols, n, g * D ** -0.5 + dlog[:, None] * c[None, :])


@triton.jit
def window_grad_kv_kernel(q, k, v, log_total, do, deltas, dk, dv,
                          qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, xb, xh, xt, yb, yh, yt, H, T, W,
                          D: tl.constexpr, L: tl.constexpr, dtype: tl.constexpr, PREC: tl.constexpr):
    bh, start = block_of(T, L)
    b, h = bh // H, bh % H
    q, k, v, do = q + b * qb + h * qh, k + b * kb + h * kh, v + b * vb + h * vh, do + b * gb + h * gh
    dk, dv, log_total, deltas = dk + b * xb + h * xh, dv + b * yb + h * yh, log_total + bh * T, deltas + bh * T
    cols, rows = tl.arange(0, D), tl.arange(0, L)
    n = tl.minimum(T - start, L).to(tl.int32)
    key = load_tile(k, start, rows, kt, cols, n, dtype)
    value = load_tile(v, start, rows, vt, cols, n, dtype)
    gk, gv = tl.zeros((L, D), tl.float32), tl.zeros((L, D), tl.float32)
    for i in range(tl.cdiv(tl.minimum(L + W - 1, T - start), L).to(tl.int32)):  # up to the last query that sees a key
        at = start + i * L
        m = tl.minimum(T - at, L).to(tl.int32)
        x = load_tile(q, at, rows, qt, cols, m, dtype)
        dy = load_tile(do, at, rows, gt, cols, m, dtype)
        log = tl.load(log_total + at + rows, mask=rows < m, other=float("inf"))
        delta = tl.load(deltas + at + rows, mask=rows < m, other=0.0)
        p = tl.exp2(scores(x, key, i * L + rows[:, None] - rows[None, :], W, PREC) - log[:, None]).to(dtype)
        gv = tl.dot(tl.trans(p), dy, gv, input_precision=PREC)
        ds = widen(p) * (tl.dot(dy, tl.trans(value), input_precision=PREC) - delta[:, None])
        gk = tl.dot(tl.trans(ds.to(dtype)), x, gk, input_precision=PREC)
    store_tile(dk, start, rows, xt, cols, n, gk * D ** -0.5)
    store_tile(dv, start, rows, yt, cols, n, gv)


def window_launch(v):
    """(the grid, the compile-time part of every launch)."""
    B, H, T, D = v.shape
    opt = products(v.dtype, D)
    return (B * H * -(-T // opt["L"]),), dict(D=D, num_stages=2, **opt)  # three stages take more registers


def window_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far: torch.Tensor, log_den: torch.Tensor,
                   gate: torch.Tensor, gate_bias: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(y (B, H, T, D), the logarithm to base 2 of its denominators (B, H, T)): softmax over the last `window` keys, and
    from query `window` on also over one more, of value far (B, H, T - window, D) and weight exp(log_den + q.c + b) with
    c = gate (H, D), b = gate_bias (H,)."""
    y, log_total = window_fake(q, k, v, far, log_den, gate, gate_bias, window)
    grid, opt = window_launch(v)
    window_kernel[grid](q, k, v, far, log_den, gate, gate_bias, y, log_total, *q.stride()[:3], *k.stride()[:3],
                        *v.stride()[:3], *far.stride()[:3], *y.stride()[:3], *q.shape[1:3], window, **opt)
    return y, log_total


def window_fake(q, k, v, far, log_den, gate, gate_bias, window):
    return *projections_like(v), q.new_empty(q.shape[:3], dtype=torch.float32)


def window_backward_kernels(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far: torch.Tensor,
                            log_den: torch.Tensor, gate: torch.Tensor, gate_bias: torch.Tensor, y: torch.Tensor,
                            log_total: torch.Tensor, window: int) -> list[torch.Tensor]:
    """[dq, dk, dv, dfar, dlog_den, dgate, dgate_bias]."""
    do, = rows_in_reach(*rows_in_one_piece(do))
    B, H, T, D = q.shape
    grid, opt = window_launch(v)
    dq, dk, dv, dfar = projections_like(q, k, v, far)
    dlog_den, deltas = torch.empty_like(log_den), torch.empty_like(log_total)
    dgate = q.new_empty(B, H, -(-T // opt["L"]), D, dtype=torch.float32)                  # a part by every program
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    window_grad_q_kernel[grid](
        q, k, v, far, log_den, gate, gate_bias, y, log_total, do, dq, dfar, dlog_den, dgate, deltas, *strides,
        *far.stride()[:3], *y.stride()[:3], *do.stride()[:3], *dq.stride()[:3], *dfar.stride()[:3], H, T, window, **opt)
    window_grad_kv_kernel[grid](q, k, v, log_total, do, deltas, dk, dv, *strides, *do.stride()[:3], *dk.stride()[:3],
                                *dv.stride()[:3], H, T, window, **opt)
    return [dq, dk, dv, dfar, dlog_den, dgate.sum(dim=(0, 2)).to(gate.dtype),
            dlog_den.sum(dim=(0, 2)).to(gate_bias.dtype)]


def window_backward_fake(do, q, k, v, far, log_den, gate, gate_bias, y, log_total, window):
    return [*projections_like(q, k, v, far), *(torch.empty_like(x) for x in (log_den, gate, gate_bias))]


def save_window(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], *output)
    ctx.window = inputs[-1]


def run_window_backward(ctx, do, _):
    return *torch.ops.hedgehog.window_backward(do, *ctx.saved_tensors, ctx.window), None


register("window", window_kernels, window_fake, save_window, run_window_backward, window_backward_kernels,
         window_backward_fake)


def hybrid_attention(q, k, v, wq, wk, bq, bk, gate, gate_bias, window, kind="hedgehog", return_state=False):
    """HybridAttention from raw q, k, v (B, H, T, D), T > window, without a past. gate (H, D), gate_bias (H,).

    What is older than the window is linear attention of the queries over the keys `window` tokens ago. The inputs are
    those of `fused_attention`, in one dtype: autocast is the caller's. Returns y (B, H, T, D), or with return_state
    (y, the state as HybridAttention has it). ValueError for what does not match.
    """
    W = window
    if q.ndim != 4 or not q.shape == k.shape == v.shape or not 0 < W < q.shape[2]:
        raise ValueError(f"expected q, k and v (B, H, T, D) with T > window >= 1, got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)} and window {W}")
    for name, x, shape in (("gate", gate, q.shape[1::2]), ("gate_bias", gate_bias, q.shape[1:2])):
        if x.shape != shape or not x.is_floating_point() or x.device != q.device:
            raise ValueError(f"{name} must be {tuple(shape)}, floating-point and on {q.device}, got {tuple(x.shape)}, "
                             f"{x.dtype} on {x.device}")
    q, k, v = rows_in_reach(q, k, v)
    far, log_den, *sums = fused_attention(q[:, :, W:], k[:, :, :-W], v[:, :, :-W], wq, wk, bq, bk, kind=kind,
                                          return_log_den=True, return_state=return_state)
    log_den, gate, gate_bias = (x.contiguous() for x in (log_den, gate, gate_bias))       # far: (B, H, T-W, D)
    y = torch.ops.hedgehog.window(q, k, v, far, log_den, gate, gate_bias, W)[0]
    if return_state:
        last_k, last_v = (x[:, :, -W:].to(torch.float32, copy=True) for x in (k, v))
        return y, (last_k, torch.nn.functional.pad(last_v, (0, 1), value=1.0), *sums)
    return y
