"""Kernels as a user writes them with the device functions of `fastce.cuda.rows`."""

import math

from numba import cuda

from fastce.cuda import rows


def losses_of_rows(z, y, losses):
    """One thread for each row, one pass over its classes."""
    i = cuda.grid(1)
    if i < z.shape[0]:
        m, rest = -math.inf, 0.0
        for j in range(z.shape[1]):
            m, rest = rows.merge(m, rest, float(z[i, j]), 0.0)
        losses[i] = rows.cross_entropy(m, rest, float(z[i, y[i]]), 1.0, 0.0, 0.0)


def gradients_of_rows(z, y, weight, smoothing, z_loss, cap, losses, grad):
    """The same with every option, and the gradient."""
    i = cuda.grid(1)
    if i < z.shape[0]:
        m, rest = -math.inf, 0.0
        for j in range(z.shape[1]):
            m, rest = rows.merge(m, rest, rows.capped(float(z[i, j]), cap), 0.0)
        gap, mass = 0.0, 0.0
        for j in range(z.shape[1]):  # what the labels lay on every class: here by smoothing
            u = smoothing / z.shape[1] * weight[j]
            gap += rows.weighted_gap(u, m - rows.capped(float(z[i, j]), cap))
            mass += u
        t = (1.0 - smoothing) * weight[y[i]]  # and on the target
        z_y = rows.capped(float(z[i, y[i]]), cap)
        lse = m + rows.log1p(rest)
        losses[i] = rows.cross_entropy(m, rest, z_y, t, gap, mass) + z_loss * lse * lse
        a = t + mass + 2.0 * z_loss * lse
        factor, power = rows.gradient_scale(m, rest, a)
        for j in range(z.shape[1]):
            x = float(z[i, j])
            u = smoothing / z.shape[1] * weight[j]
            g = rows.scaled(rows.capped(x, cap), m, factor, power) - u
            if j == y[i]:
                g = rows.target_gradient(m, rest, z_y, a, t + u)
            grad[i, j] = g * rows.cap_slope(x, cap)
