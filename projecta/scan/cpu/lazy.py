"""The multi-resolution scan in the `cpu` kernels: four rows of states share a period of updates.

A block of p tokens sums v = h + sum of x B, two operations per token and state, and decays once, at its end:

    h' = f(A S) h + f(A S (p - 1) / (2 p)) (v - h)          S: the block's sum of delta; x = delta u

f is the exponential if `exact` is not None, else max(0, 1 + z / 8)^8. A is passed as A log2 e or A / 8. In a
short last block the last token reads v too. `projecta.mrss` explains the formula.
"""

from projecta._cpu.simd import BYTES, exp2_product_safe, fma, lanes, line, load, prefetch, splat, store, zero
from projecta._cpu.threads import inner
from projecta.scan.cpu.layout import UNROLL


@inner
def _four(T, at, width):
    return load(T, at), load(T, at + width), load(T, at + 2 * width), load(T, at + 3 * width)


@inner
def _keep(T, at, width, x):
    store(T, at, x[0])
    store(T, at + width, x[1])
    store(T, at + 2 * width, x[2])
    store(T, at + 3 * width, x[3])


@inner
def _weights(B, varying, constant, width, steady):
    """B or C of four rows: one number broadcast to all lanes if it varies in time (`steady` is None), else a
    vector."""
    if steady is None:
        return splat(B, varying), splat(B, varying + 1), splat(B, varying + 2), splat(B, varying + 3)
    return _four(B, constant, width)


@inner
def _gain(x, b, v):
    """x b + v, row by row."""
    return fma(x, b[0], v[0]), fma(x, b[1], v[1]), fma(x, b[2], v[2]), fma(x, b[3], v[3])


@inner
def _read_out(c, h, y):
    """y + the sum of c h, as two independent chains."""
    return fma(c[2], h[2], fma(c[0], h[0], y)) + fma(c[3], h[3], c[1] * h[1])


@inner
def _factor_and_slope(s, a, exact):
    """f(z) and f'(z), z = A S."""
    if exact is not None:
        f = exp2_product_safe(s, a)
        return f, f
    q = line(s, a)
    square = q * q
    fourth = square * square
    return fourth * fourth, fourth * square * q


@inner
def _factor(s, a, exact):
    f, _ = _factor_and_slope(s, a, exact)
    return f


@inner
def _decayed(s, a, exact):
    return _factor(s, a[0], exact), _factor(s, a[1], exact), _factor(s, a[2], exact), _factor(s, a[3], exact)


@inner
def _settle(f, h, r, v):
    """f h + r (v - h), row by row."""
    return (
        fma(f[0], h[0], r[0] * (v[0] - h[0])), fma(f[1], h[1], r[1] * (v[1] - h[1])),
        fma(f[2], h[2], r[2] * (v[2] - h[2])), fma(f[3], h[3], r[3] * (v[3] - h[3])),
    )  # fmt: skip


@inner
def _rest(tokens):
    """The mean fraction of a block's exponent by which its inputs decay."""
    return (tokens - 1) / (2.0 * tokens)


@inner
def _times(x, b):
    return x * b[0], x * b[1], x * b[2], x * b[3]


@inner
def _end(span, a, h, v, tokens, exact):
    """The states at the end of a block of `tokens` tokens."""
    rest = _decayed(span * _rest(tokens), a, exact)
    return _settle(_decayed(span, a, exact), h, rest, v)


@inner
def advance(tiles, first, steps, A, weights, w, n, H, ahead, periods, at, exact, steady_B, steady_C):
    """Advance the states H of a block over steps of a tile, from `first` on, and add C h to Y.

    `tiles` are S, X, Y and `weights` B, C. The four rows from 4 i on have the period periods[at + i]. A block
    begins at `first`.
    """
    (S, X, Y), (B, C) = tiles, weights
    width = lanes(S)
    for q in range(0, n, UNROLL):
        k, look, p = q * width, 4 * ((q // UNROLL) & 3), periods[at + q // UNROLL]
        near, stride, shift, mask = ahead[look], ahead[look + 1], ahead[look + 2], ahead[look + 3]
        a, h, end, t = _four(A, k, width), _four(H, k, width), first + steps, first
        if p == 1:
            for i in range(first, end):
                prefetch(near + (i >> shift) * stride + (i & mask) * BYTES)
                b, s = w + i * n + q, load(S, i * width)
                x = _times(load(X, i * width), _weights(B, b, k, width, steady_B))
                f = _decayed(s, a, exact)
                h = fma(f[0], h[0], x[0]), fma(f[1], h[1], x[1]), fma(f[2], h[2], x[2]), fma(f[3], h[3], x[3])
                store(Y, i * width, _read_out(_weights(C, b, k, width, steady_C), h, load(Y, i * width)))
            t = end
        while t < end:
            tokens = min(p, end - t)
            last = t + p - 1  # this token reads the decayed state; a short block has no such token
            span, v = zero(S), h
            for i in range(t, min(last, end)):
                prefetch(near + (i >> shift) * stride + (i & mask) * BYTES)
                b = w + i * n + q
                span = span + load(S, i * width)
                v = _gain(load(X, i * width), _weights(B, b, k, width, steady_B), v)
                store(Y, i * width, _read_out(_weights(C, b, k, width, steady_C), v, load(Y, i * width)))
            if last < end:
                prefetch(near + (last >> shift) * stride + (last & mask) * BYTES)
                b = w + last * n + q
                span = span + load(S, last * width)
                v = _gain(load(X, last * width), _weights(B, b, k, width, steady_B), v)
                h = _end(span, a, h, v, tokens, exact)
                y = _read_out(_weights(C, b, k, width, steady_C), h, load(Y, last * width))
                store(Y, last * width, y)
            else:
                h = _end(span, a, h, v, tokens, exact)
            t += tokens
        _keep(H, k, width, h)


@inner
def _slopes(s, a, exact):
    """f and f' of four rows."""
    f0, d0 = _factor_and_slope(s, a[0], exact)
    f1, d1 = _factor_and_slope(s, a[1], exact)
    f2, d2 = _factor_and_slope(s, a[2], exact)
    f3, d3 = _factor_and_slope(s, a[3], exact)
    return (f0, f1, f2, f3), (d0, d1, d2, d3)


@inner
def _products(x, y):
    return x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3]


@inner
def _retrace_each(
    T, o, area, first, steps, a, a_at, B, C, w, n, q, h, hs, g, sums, dB, pb, tb, dC, pc, tc, exact,
    steady_B, steady_C, ahead, near, next_states,
):  # fmt: skip
    """`retrace` for period 1; returns the gradients of the states before the chunk and of A."""
    width = lanes(T)
    S, X, G, Y, DX, DS = o, o + area, o + 2 * area, o + 3 * area, o + 4 * area, o + 5 * area
    k, c_at = q * width, a_at + q * width
    line_, stride, shift, mask = ahead[near], ahead[near + 1], ahead[near + 2], ahead[near + 3]
    for i in range(first, first + steps):
        prefetch(line_ + (i >> shift) * stride + (i & mask) * BYTES)
        b, here = w + (i - first) * n + q, i * width
        x = _times(load(T, X + here), _weights(B, b, c_at, width, steady_B))
        f = _decayed(load(T, S + here), a, exact)
        h = fma(f[0], h[0], x[0]), fma(f[1], h[1], x[1]), fma(f[2], h[2], x[2]), fma(f[3], h[3], x[3])
        store(T, Y + here, _read_out(_weights(C, b, c_at, width, steady_C), h, load(T, Y + here)))
        _keep(hs, (i - first + 1) * 4 * width, width, h)
    for i in range(first + steps - 1, first - 1, -1):
        here, b, j = i * width, w + (i - first) * n + q, (i - first) * 4 * width
        prefetch(next_states + (q + ((i - first) & 3)) * BYTES)
        s, x, y_grad = load(T, S + here), load(T, X + here), load(T, G + here)
        to = (i - first) * tc + pc + k
        _keep(dC, to, width, _gain(y_grad, _four(hs, j + 4 * width, width), _four(dC, to, width)))
        g = _gain(y_grad, _weights(C, b, c_at, width, steady_C), g)
        to = (i - first) * tb + pb + k
        _keep(dB, to, width, _gain(x, g, _four(dB, to, width)))
        store(T, DX + here, _read_out(g, _weights(B, b, c_at, width, steady_B), load(T, DX + here)))
        f, d = _slopes(s, a, exact)
        m = _products(_products(d, g), _four(hs, j, width))
        sums = _gain(s, m, sums)
        store(T, DS + here, _read_out(m, a, load(T, DS + here)))
        g = _products(f, g)
    return g, sums


@inner
def _block_back(
    T, o, area, first, end, start, a, c_at, B, C, w, n, q, g, sums, hs, dB, pb, tb, dC, pc, tc, p, exact,
    steady_B, steady_C, next_states,
):  # fmt: skip
    """Go back through the block at step `start` of the chunk; return the gradients before it."""
    width = lanes(T)
    S, X, G, DX, DS = o, o + area, o + 2 * area, o + 4 * area, o + 5 * area
    k = q * width
    t = first + start
    tokens, last, behind = min(p, end - t), t + p - 1, min(t + p, end) - 1
    span = zero(T)
    for i in range(t, behind + 1):
        span = span + load(T, S + i * width)
    h, v = _four(hs, start * 4 * width, width), _four(hs, (behind - first + 1) * 4 * width, width)
    x, y_grad = load(T, X + behind * width), load(T, G + behind * width)
    b, to = w + (behind - first) * n + q, (behind - first) * tc + pc + k
    if last < end:  # its last token read h'
        _keep(dC, to, width, _gain(y_grad, v, _four(dC, to, width)))
        g = _gain(y_grad, _weights(C, b, c_at, width, steady_C), g)
        v = _gain(x, _weights(B, b, c_at, width, steady_B), _four(hs, (behind - first) * 4 * width, width))
    rest = _rest(tokens)
    short = span * rest
    f, d = _slopes(span, a, exact)
    r, e = _slopes(short, a, exact)
    m = (  # the gradient of A S
        g[0] * fma(d[0], h[0], e[0] * rest * (v[0] - h[0])),
        g[1] * fma(d[1], h[1], e[1] * rest * (v[1] - h[1])),
        g[2] * fma(d[2], h[2], e[2] * rest * (v[2] - h[2])),
        g[3] * fma(d[3], h[3], e[3] * rest * (v[3] - h[3])),
    )
    sums, ds = _gain(span, m, sums), _read_out(m, a, zero(T))
    r, f = _products(r, g), _products(f, g)
    g = f[0] - r[0], f[1] - r[1], f[2] - r[2], f[3] - r[3]
    for i in range(behind, t - 1, -1):
        here, b, j = i * width, w + (i - first) * n + q, (i - first) & 3
        prefetch(next_states + (q + j) * BYTES)
        x = load(T, X + here)
        if i < last:
            to, y_grad = (i - first) * tc + pc + k, load(T, G + here)
            _keep(
                dC, to, width,
                _gain(y_grad, _four(hs, (i - first + 1) * 4 * width, width), _four(dC, to, width)),
            )  # fmt: skip
            r = _gain(y_grad, _weights(C, b, c_at, width, steady_C), r)
        to = (i - first) * tb + pb + k
        _keep(dB, to, width, _gain(x, r, _four(dB, to, width)))
        store(T, DX + here, _read_out(r, _weights(B, b, c_at, width, steady_B), load(T, DX + here)))
        store(T, DS + here, load(T, DS + here) + ds)
    g = g[0] + r[0], g[1] + r[1], g[2] + r[2], g[3] + r[3]
    return g, sums


@inner
def retrace(
    tile, first, steps, A, a_at, weights, place, states, carry, dA, sinks, p, exact, steady_B, steady_C,
    looks
):  # fmt: skip
    """One chunk and four rows of states: recompute the states, then go back through them.

    Let G be the gradient of h'. r starts as f(A S (p - 1) / (2 p)) G. Each token but the last adds C_t dy_t
    to r; then dB_t = r x_t and dx_t = r B_t. The gradient of h is f(A S) G + the sum of these C_t dy_t.

    tile: T, o, area. weights: B, C. place: w, n, q. states: H, own, hs. sinks: dB, pb, tb, dC, pc, tc.
    looks: ahead, look, next_states. All as in `backward.retrace`.
    """
    (T, o, area), (B, C), (w, n, q), (H, own, hs) = tile, weights, place, states
    (dB, pb, tb, dC, pc, tc), (ahead, look, next_states) = sinks, looks
    width = lanes(T)
    S, X, Y = o, o + area, o + 3 * area
    k, c_at = q * width, a_at + q * width
    a, h, end = _four(A, c_at, width), _four(H, own + k, width), first + steps
    _keep(hs, 0, width, h)  # followed by the state that each token reads
    near, g, sums = look + 4 * ((q // UNROLL) & 3), _four(carry, c_at, width), _four(dA, c_at, width)
    if p == 1:
        g, sums = _retrace_each(
            T, o, area, first, steps, a, a_at, B, C, w, n, q, h, hs, g, sums, dB, pb, tb, dC, pc, tc, exact,
            steady_B, steady_C, ahead, near, next_states,
        )  # fmt: skip
        _keep(carry, c_at, width, g)
        _keep(dA, c_at, width, sums)
        return
    line_, stride, shift, mask = ahead[near], ahead[near + 1], ahead[near + 2], ahead[near + 3]
    for t in range(first, end, p):
        tokens, last = min(p, end - t), t + p - 1
        span, v = zero(T), h
        for i in range(t, min(t + p, end)):
            prefetch(line_ + (i >> shift) * stride + (i & mask) * BYTES)
            b, here = w + (i - first) * n + q, i * width
            span = span + load(T, S + here)
            v = _gain(load(T, X + here), _weights(B, b, c_at, width, steady_B), v)
            if i == last:
                h = _end(span, a, h, v, tokens, exact)
                v = h
            store(T, Y + here, _read_out(_weights(C, b, c_at, width, steady_C), v, load(T, Y + here)))
            _keep(hs, (i - first + 1) * 4 * width, width, v)
    for start in range((steps - 1) // p * p, -1, -p):
        g, sums = _block_back(
            T, o, area, first, end, start, a, c_at, B, C, w, n, q, g, sums, hs, dB, pb, tb, dC, pc, tc, p,
            exact, steady_B, steady_C, next_states,
        )  # fmt: skip
    _keep(carry, c_at, width, g)
    _keep(dA, c_at, width, sums)
