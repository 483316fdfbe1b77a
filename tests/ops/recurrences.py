"""The recurrences step by step in NumPy's float64, with their gradients by hand."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def scanned(a, x):
    h = np.zeros_like(x)
    for t in range(x.shape[1]):
        h[:, t] = a[:, t] * (h[:, t - 1] if t else 0) + x[:, t]
    return h


def scanned_back(a, h, g):
    adjoint = np.flip(scanned(np.flip(np.roll(a, -1, axis=1), 1), np.flip(g, 1)), 1)
    return adjoint * np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], axis=1), adjoint


def gated(gates, c, log_decay, scale, first):
    """States and what their gradient needs, in float64."""
    gates, c, log_decay, scale = (np.asarray(v, np.float64) for v in (gates, c, log_decay, scale))
    f, i = sigmoid(gates)
    rate = -8 * np.log1p(np.exp(log_decay))
    log_a = rate * f
    square, first = -np.expm1(2 * log_a), np.asarray(first)[..., None]
    size = np.where(first, 1.0, np.sqrt(np.maximum(square, 1e-6)))
    a = np.where(first, 0.0, np.exp(log_a))
    bound = first | (square < 1e-6)
    return scanned(a, size * i * scale * c), (f, i, a, size, bound, rate, c, scale, log_decay)


def gated_back(h, parts, g):
    """By hand: gradients of gates, c, log_decay and scale."""
    f, i, a, size, bound, rate, c, scale, log_decay = parts
    da, dx = scanned_back(a, h, np.asarray(g, np.float64))
    dsize = dx * i * scale * c
    dlog_a = da * a - np.where(bound, 0.0, dsize * a**2 / size)
    drate = (dlog_a * f).sum((0, 1))
    return (np.stack([dlog_a * rate * f * (1 - f), dx * size * scale * c * i * (1 - i)]),
            dx * size * i * scale, -8 * sigmoid(log_decay) * drate,
            (dx * size * i * c).sum((0, 1)))
