"""The kernels of `triton_geometry_attention`, and what they share.

A program takes one head of one line of tokens and some of its queries (`to_keys`: of its keys), and
goes over the other side in blocks of the same size; scores and bias exist in registers only. Tokens
are turned as they are read. Scores, bias and sums are float32. Nothing is added atomically: every
result is the same each time.
"""
# ruff: noqa: ANN001, ANN201, ANN202, N803 - arguments: pointers and numbers on the device

from typing import no_type_check

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # the exponential of the device is that of base 2


@triton.jit
@no_type_check
def attend(
    query, key, value, found, partition, sine, cosine, position, depth, weight, decay,
    scale, M, L, n, q_b, q_m, q_l, q_n, v_b, v_m, v_l, v_n, t_m, t_l, d_b, d_m, d_l,
    f_b, f_m, f_l, f_n,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    PLANE: tl.constexpr, TF32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the queries find, and the logarithms of the sums of their exponentials."""
    b, m, head, i, line = _place(M, L, n, BLOCK)
    known = i < L
    query += b * q_b + m * q_m + head * q_n
    key += b * q_b + m * q_m + head * q_n
    value += b * v_b + m * v_m + head * v_n
    sine += m * t_m
    cosine += m * t_m
    depth += b * d_b + m * d_m
    to_image, to_depth = _factors(weight, decay, head)
    q = _turned(query, sine, cosine, i, known, q_l, t_l, C, WIDTH)
    y, x, z = _geometry(position, depth, i, known, d_l, PLANE)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, VALUES], tl.float32)
    for start in range(0, L, BLOCK):
        j = start + tl.arange(0, BLOCK)
        here = j < L
        k = _turned(key, sine, cosine, j, here, q_l, t_l, C, WIDTH)
        v = _tokens(value, j, here, v_l, D, VALUES)
        y_j, x_j, z_j = _geometry(position, depth, j, here, d_l, PLANE)
        apart, deeper = _distances(y, x, z, y_j, x_j, z_j, PLANE)
        scores = _product(q, tl.trans(k), TF32) * (scale * LOG2E)
        scores += to_image * apart + to_depth * deeper
        scores = tl.where(here[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        share = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(share, axis=1)
        sums = sums * fade[:, None] + _product(share.to(v.dtype), v, TF32)
        top = higher
    _write(found + b * f_b + m * f_m + head * f_n, sums / total[:, None], i, known, f_l, D, VALUES)
    tl.store(partition + line * L + i, top + tl.log2(total), mask=known)


@triton.jit
@no_type_check
def to_queries(
    query, key, value, found, gradient, partition, overlap, to_query, to_weight,
    sine, cosine, position, depth, weight, decay,
    scale, M, L, n, q_b, q_m, q_l, q_n, v_b, v_m, v_l, v_n, t_m, t_l, d_b, d_m, d_l,
    f_b, f_m, f_l, f_n, g_b, g_m, g_l, g_n, r_b, r_m, r_l, r_n,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    PLANE: tl.constexpr, TF32: tl.constexpr, BLOCK: tl.constexpr,
    MORE: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Also the overlap of gradient and result, which the keys need, and the programs' weights."""
    b, m, head, i, line = _place(M, L, n, BLOCK)
    known = i < L
    query += b * q_b + m * q_m + head * q_n
    key += b * q_b + m * q_m + head * q_n
    value += b * v_b + m * v_m + head * v_n
    sine += m * t_m
    cosine += m * t_m
    depth += b * d_b + m * d_m
    to_image, to_depth = _factors(weight, decay, head)
    q = _turned(query, sine, cosine, i, known, q_l, t_l, C, WIDTH)
    y, x, z = _geometry(position, depth, i, known, d_l, PLANE)
    g = _tokens(gradient + b * g_b + m * g_m + head * g_n, i, known, g_l, D, VALUES)
    f = _tokens(found + b * f_b + m * f_m + head * f_n, i, known, f_l, D, VALUES)
    both = tl.sum(g.to(tl.float32) * f.to(tl.float32), axis=1)
    tl.store(overlap + line * L + i, both, mask=known)
    logarithm = tl.load(partition + line * L + i, mask=known, other=float("inf"))
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    of_image = tl.zeros([BLOCK], tl.float32)
    of_depth = tl.zeros([BLOCK], tl.float32)
    for start in range(0, L, BLOCK):
        j = start + tl.arange(0, BLOCK)
        here = j < L
        k = _turned(key, sine, cosine, j, here, q_l, t_l, C, WIDTH)
        v = _tokens(value, j, here, v_l, D, VALUES)
        y_j, x_j, z_j = _geometry(position, depth, j, here, d_l, PLANE)
        apart, deeper = _distances(y, x, z, y_j, x_j, z_j, PLANE)
        scores = _product(q, tl.trans(k), TF32) * (scale * LOG2E)
        scores += to_image * apart + to_depth * deeper
        share = tl.where(here[None, :], tl.exp2(scores - logarithm[:, None]), 0.0)
        to_scores = share * (_product(g, tl.trans(v), TF32) - both[:, None])
        sums += _product(to_scores.to(k.dtype), k, TF32)
        if WEIGHED:
            of_image += tl.sum(to_scores * apart, axis=1)
            of_depth += tl.sum(to_scores * deeper, axis=1)
    if WEIGHED:
        rate = tl.load(decay + head)
        tl.store(to_weight + 2 * tl.program_id(0), rate * tl.sum(of_image, axis=0))
        tl.store(to_weight + 2 * tl.program_id(0) + 1, rate * tl.sum(of_depth, axis=0))
    to_query += b * r_b + m * r_m + head * r_n
    _write_turned_back(to_query, sums * scale, sine, cosine, i, known, r_l, t_l, C, WIDTH, MORE)


@triton.jit
@no_type_check
def to_keys(
    query, key, value, gradient, partition, overlap, to_key, to_value,
    sine, cosine, position, depth, weight, decay,
    scale, M, L, n, q_b, q_m, q_l, q_n, v_b, v_m, v_l, v_n, t_m, t_l, d_b, d_m, d_l,
    g_b, g_m, g_l, g_n, r_b, r_m, r_l, r_n, w_b, w_m, w_l, w_n,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr,
    PLANE: tl.constexpr, TF32: tl.constexpr, BLOCK: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    """Keys are the rows here, queries the columns."""
    b, m, head, j, line = _place(M, L, n, BLOCK)
    known = j < L
    query += b * q_b + m * q_m + head * q_n
    key += b * q_b + m * q_m + head * q_n
    value += b * v_b + m * v_m + head * v_n
    gradient += b * g_b + m * g_m + head * g_n
    sine += m * t_m
    cosine += m * t_m
    depth += b * d_b + m * d_m
    to_image, to_depth = _factors(weight, decay, head)
    k = _turned(key, sine, cosine, j, known, q_l, t_l, C, WIDTH)
    v = _tokens(value, j, known, v_l, D, VALUES)
    y, x, z = _geometry(position, depth, j, known, d_l, PLANE)
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    values = tl.zeros([BLOCK, VALUES], tl.float32)
    for start in range(0, L, BLOCK):
        i = start + tl.arange(0, BLOCK)
        here = i < L
        q = _turned(query, sine, cosine, i, here, q_l, t_l, C, WIDTH)
        g = _tokens(gradient, i, here, g_l, D, VALUES)
        y_i, x_i, z_i = _geometry(position, depth, i, here, d_l, PLANE)
        logarithm = tl.load(partition + line * L + i, mask=here, other=float("inf"))
        both = tl.load(overlap + line * L + i, mask=here, other=0.0)
        apart, deeper = _distances(y, x, z, y_i, x_i, z_i, PLANE)
        scores = _product(k, tl.trans(q), TF32) * (scale * LOG2E)
        scores += to_image * apart + to_depth * deeper
        share = tl.exp2(scores - logarithm[None, :])  # 0 where there is no query
        values += _product(share.to(g.dtype), g, TF32)
        to_scores = share * (_product(v, tl.trans(g), TF32) - both[None, :])
        sums += _product(to_scores.to(q.dtype), q, TF32)
    _write(to_value + b * w_b + m * w_m + head * w_n, values, j, known, w_l, D, VALUES)
    to_key += b * r_b + m * r_m + head * r_n
    _write_turned_back(to_key, sums * scale, sine, cosine, j, known, r_l, t_l, C, WIDTH, MORE)


@triton.jit
@no_type_check
def _place(M, L, n, BLOCK: tl.constexpr):
    """Image, line and head of this program, its tokens, and the number of its line and head."""
    blocks = tl.cdiv(L, BLOCK)
    line = tl.program_id(0) // blocks
    token = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    # 64 bits where numbers grow with the batch; offsets inside a line fit 32.
    batch = (line // (M * n)).to(tl.int64)
    return batch, ((line // n) % M).to(tl.int64), line % n, token, line.to(tl.int64)


@triton.jit
@no_type_check
def _factors(weight, decay, head):
    """What a distance in the image and one in depth add to the scores of base 2."""
    rate = tl.load(decay + head) * LOG2E
    return rate * tl.load(weight), rate * tl.load(weight + 1)


@triton.jit
@no_type_check
def _geometry(position, depth, token, known, d_l, PLANE: tl.constexpr):
    """One or two coordinates and the depth of each token."""
    z = tl.load(depth + token * d_l, mask=known, other=0.0)
    if PLANE:
        y = tl.load(position + 2 * token, mask=known, other=0.0)
        x = tl.load(position + 2 * token + 1, mask=known, other=0.0)
    else:
        y = tl.load(position + token, mask=known, other=0.0)
        x = y
    return y, x, z


@triton.jit
@no_type_check
def _distances(y, x, z, other_y, other_x, other_z, PLANE: tl.constexpr):
    """In the image and in depth, of all pairs."""
    apart = tl.abs(y[:, None] - other_y[None, :])
    if PLANE:
        apart += tl.abs(x[:, None] - other_x[None, :])
    return apart, tl.abs(z[:, None] - other_z[None, :])


@triton.jit
@no_type_check
def _product(a, b, TF32: tl.constexpr):
    """In float32; of float32 as torch's setting says."""
    return tl.dot(a, b, input_precision="tf32" if TF32 else "ieee")


@triton.jit
@no_type_check
def _tokens(first, token, known, stride, C: tl.constexpr, WIDTH: tl.constexpr):
    c = tl.arange(0, WIDTH)
    place = first + token[:, None] * stride + c[None, :]
    return tl.load(place, mask=known[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
@no_type_check
def _angles(sine, cosine, token, known, t_l, C: tl.constexpr, WIDTH: tl.constexpr):
    """Sine and cosine of each pair."""
    pair = tl.arange(0, WIDTH // 2)
    place = token[:, None] * t_l + pair[None, :]
    inside = known[:, None] & (pair < C // 2)[None, :]
    sin = tl.load(sine + place, mask=inside, other=0.0)
    return sin, tl.load(cosine + place, mask=inside, other=0.0)


@triton.jit
@no_type_check
def _rotated(tokens, sin, cos, WIDTH: tl.constexpr):
    pairs = tl.reshape(tokens, [tokens.shape[0], WIDTH // 2, 2])
    first, second = tl.split(pairs)
    both = tl.join(first * cos - second * sin, second * cos + first * sin)
    return tl.reshape(both, [tokens.shape[0], WIDTH])


@triton.jit
@no_type_check
def _turned(
    first, sine, cosine, token, known, stride, t_l,
    C: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens = _tokens(first, token, known, stride, C, WIDTH)
    sin, cos = _angles(sine, cosine, token, known, t_l, C, WIDTH)
    return _rotated(tokens.to(tl.float32), sin, cos, WIDTH).to(tokens.dtype)


@triton.jit
@no_type_check
def _write(first, tokens, token, known, stride, C: tl.constexpr, WIDTH: tl.constexpr):
    c = tl.arange(0, WIDTH)
    place = first + token[:, None] * stride + c[None, :]
    tl.store(place, tokens.to(first.dtype.element_ty), mask=known[:, None] & (c < C)[None, :])


@triton.jit
@no_type_check
def _write_turned_back(
    first, tokens, sine, cosine, token, known, stride, t_l,
    C: tl.constexpr, WIDTH: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """A gradient turns the other way; with `MORE` it is added to what is there."""
    sin, cos = _angles(sine, cosine, token, known, t_l, C, WIDTH)
    tokens = _rotated(tokens, -sin, cos, WIDTH)
    if MORE:
        tokens += _tokens(first, token, known, stride, C, WIDTH).to(tl.float32)
    _write(first, tokens, token, known, stride, C, WIDTH)
