"""A linear model of few classes: products, loss and gradient in one pass over the observations.

A matrix product with ten columns is bound by memory and by the overhead of a library made for large
ones, and a gradient takes two.  Here a block of rows is copied into the cache, aligned and padded
with zeros, goes through both products there, and is never read again: 60000 x 784 by 10 classes
takes a third of the time of the two products by OpenBLAS.

Everything is padded: rows to ROWS, classes to TILE, features to two vectors.  What the padding adds
is zero: padded features and classes have zero weights, padded rows weigh nothing.
"""

import numpy as np

from fastce.cpu.elementary import exp_scale, exp_scaled, log1p
from fastce.cpu.jit import device, kernel
from fastce.cpu.memory import address, claim, item_size, load, store, zeros
from fastce.cpu.vector import both, convert, fma, lanes, maximum, splat, total, where

ROWS = 32  # of a block: one vector of float32, two of float64
TILE = 4  # classes at a time: with two rows their sums fill the registers of AVX-512


@device
def _vector(base, number, like):
    """The vector of numbers from `number` on."""
    return load(base, number * item_size(base), None, like)


@device
def _put(base, number, value):
    store(base, number * item_size(base), None, value)


@device
def _products(x, row, weight, at, features, z, place, bias, k):
    """Two rows times TILE classes: logits (or their directions) to z, rows side by side."""
    like = zeros(x)
    width = lanes(like)
    a0 = like
    a1 = like
    a2 = like
    a3 = like
    b0 = like
    b1 = like
    b2 = like
    b3 = like
    for j in range(0, features, width):
        p = _vector(x, row + j, like)
        q = _vector(x, row + features + j, like)
        w = _vector(weight, at + j, like)
        a0 = fma(p, w, a0)
        b0 = fma(q, w, b0)
        w = _vector(weight, at + features + j, like)
        a1 = fma(p, w, a1)
        b1 = fma(q, w, b1)
        w = _vector(weight, at + 2 * features + j, like)
        a2 = fma(p, w, a2)
        b2 = fma(q, w, b2)
        w = _vector(weight, at + 3 * features + j, like)
        a3 = fma(p, w, a3)
        b3 = fma(q, w, b3)
    z[place] = total(a0) + bias[k]
    z[place + 1] = total(b0) + bias[k]
    z[place + ROWS] = total(a1) + bias[k + 1]
    z[place + ROWS + 1] = total(b1) + bias[k + 1]
    z[place + 2 * ROWS] = total(a2) + bias[k + 2]
    z[place + 2 * ROWS + 1] = total(b2) + bias[k + 2]
    z[place + 3 * ROWS] = total(a3) + bias[k + 3]
    z[place + 3 * ROWS + 1] = total(b3) + bias[k + 3]


@device
def _add_outer(x, j, features, g, k, out):
    """Add the rows of a block times their gradients to two vectors of TILE classes."""
    like = zeros(x)
    width = lanes(like)
    at = k * features + j
    a0 = _vector(out, at, like)
    b0 = _vector(out, at + width, like)
    a1 = _vector(out, at + features, like)
    b1 = _vector(out, at + features + width, like)
    a2 = _vector(out, at + 2 * features, like)
    b2 = _vector(out, at + 2 * features + width, like)
    a3 = _vector(out, at + 3 * features, like)
    b3 = _vector(out, at + 3 * features + width, like)
    for i in range(ROWS):
        p = _vector(x, i * features + j, like)
        q = _vector(x, i * features + j + width, like)
        h = splat(g[k * ROWS + i], like)
        a0 = fma(p, h, a0)
        b0 = fma(q, h, b0)
        h = splat(g[(k + 1) * ROWS + i], like)
        a1 = fma(p, h, a1)
        b1 = fma(q, h, b1)
        h = splat(g[(k + 2) * ROWS + i], like)
        a2 = fma(p, h, a2)
        b2 = fma(q, h, b2)
        h = splat(g[(k + 3) * ROWS + i], like)
        a3 = fma(p, h, a3)
        b3 = fma(q, h, b3)
    _put(out, at, a0)
    _put(out, at + width, b0)
    _put(out, at + features, a1)
    _put(out, at + features + width, b1)
    _put(out, at + 2 * features, a2)
    _put(out, at + 2 * features + width, b2)
    _put(out, at + 3 * features, a3)
    _put(out, at + 3 * features + width, b3)


@device
def _cross_entropy(z, i, classes, y, labels, soft, s, p, at, like):
    """Loss of a vector of rows; their logits become gradients, and `p` their probabilities.

    The mathematics is that of `rows`, with lanes across rows: nothing cancels.
    """
    wide = convert(like, 0.0)
    m = wide - np.inf
    for k in range(classes):
        m = maximum(convert(_vector(z, k * ROWS + i, like), 0.0), m)
    bias, floor = exp_scale(0.0, wide)
    rest = wide
    seen = wide  # one more than the class of the first maximum
    gap = wide
    mass = wide
    for k in range(classes):
        value = convert(_vector(z, k * ROWS + i, like), 0.0)
        first = both(value == m, seen == 0.0)
        seen = where(first, float(k + 1), seen)
        e = exp_scaled(value - m, bias, floor)
        rest = rest + where(first, 0.0, e)
        h = _label(y, labels, soft, k, i, wide)
        gap = gap + where(h == 0.0, 0.0, h * (m - value))
        mass = mass + h
        _put(z, k * ROWS + i, convert(e, like))
    over = 1.0 / (1.0 + rest)
    for k in range(classes):
        q = convert(_vector(z, k * ROWS + i, like), 0.0) * over
        h = _label(y, labels, soft, k, i, wide)
        top = seen == float(k + 1)
        # mass q - h, as (mass - h) - mass (1 - q) where q is near one
        g = where(top, (mass - h) - mass * (rest * over), mass * q - h)
        _put(z, k * ROWS + i, convert(s * g, like))
        if p is not None:
            _put(p, at + k * ROWS + i, convert(q, like))
    return s * (gap + mass * log1p(rest))


@device
def _label(y, labels, soft, k, i, wide):
    if labels is None:
        return where(_vector(y, i, wide) == float(k), splat(1.0, wide), 0.0)
    return _vector(soft, k * ROWS + i, wide)


@device
def _curved(u, i, classes, s, p, at, like):
    """Directions of a vector of rows become products with the Hessian of their losses."""
    wide = convert(like, 0.0)
    mean = wide
    for k in range(classes):
        q = convert(_vector(p, at + k * ROWS + i, like), 0.0)
        mean = mean + q * convert(_vector(u, k * ROWS + i, like), 0.0)
    for k in range(classes):
        q = convert(_vector(p, at + k * ROWS + i, like), 0.0)
        v = convert(_vector(u, k * ROWS + i, like), 0.0)
        _put(u, k * ROWS + i, convert(s * q * (v - mean), like))


@device
def _aligned(count, like):
    """An array that starts where a cache line does, for vectors to be read at full speed."""
    memory = np.zeros(count + 16, like.dtype)
    skip = (64 - memory.ctypes.data % 64) % 64 // memory.itemsize
    return memory[skip : skip + count]


@kernel
def linear_pass(
    x, weight, bias, classes, targets, labels, sample_weight, probabilities, hessian,
    losses, bias_sums, sums, rows, counter,
):  # fmt: skip
    """One pass over x (N, D) on behalf of a model of few classes, in parts of `rows` rows.

    weight (classes and features padded) and bias make logits; each part adds its loss to `losses`
    and its gradients to `bias_sums` and `sums`.  If `hessian`, weight and bias are a direction and
    what is added is the Hessian of the loss times it, at the `probabilities` of a pass before (ROWS
    of each class side by side, block by block); otherwise these are written, unless None.
    """
    padded, features = weight.shape
    block = _aligned(ROWS * features, weight)
    z = _aligned(padded * ROWS, weight)
    y = np.zeros(ROWS)
    s = np.zeros(ROWS)
    soft = np.zeros(classes * ROWS)
    like = zeros(address(weight.reshape(-1)))
    wide = convert(like, 0.0)
    flat_weight = address(weight.reshape(-1))
    p = address(probabilities)
    while True:
        part = claim(counter)
        if part >= len(sums):
            return
        out = address(sums[part].reshape(-1))
        loss = wide
        for start in range(part * rows, min((part + 1) * rows, len(x)), ROWS):
            count = min(ROWS, len(x) - start)
            for i in range(count):
                row = x[start + i]
                to = block[i * features : i * features + len(row)]
                for j in range(len(row)):
                    to[j] = row[j]
                s[i] = 1.0 if sample_weight is None else sample_weight[start + i]
                if targets is not None:
                    y[i] = targets[start + i]
                if labels is not None:
                    for k in range(classes):
                        soft[k * ROWS + i] = labels[start + i, k]
            if count < ROWS:
                block[count * features :] = 0
                s[count:] = 0
            xs = address(block)
            for k in range(0, padded, TILE):
                for i in range(0, ROWS, 2):
                    _products(
                        xs, i * features, flat_weight, k * features, features,
                        z, k * ROWS + i, bias, k,
                    )  # fmt: skip
            of_block = start * padded
            for i in range(0, ROWS, lanes(like)):
                of = _vector(s, i, wide)
                if hessian is None:
                    loss = loss + _cross_entropy(
                        z, i, classes, y, labels, soft, of, p, of_block, like
                    )
                else:
                    _curved(z, i, classes, of, p, of_block, like)
                for k in range(classes):
                    bias_sums[part, k] += total(convert(_vector(z, k * ROWS + i, like), 0.0))
            for k in range(0, padded, TILE):
                for j in range(0, features, 2 * lanes(like)):
                    _add_outer(xs, j, features, z, k, out)
        losses[part] = total(loss)
