"""A loss inside one's own compiled loop: logits live for one row and never become an array.

    python examples/njit_loop.py

A model with sparse features, such as words of a document: the logits of a row are the sum of a few
rows of the weights. Making them is so cheap that writing and reading an array of documents x
classes would take most of the time; and stochastic gradient descent needs the gradient of one row
before the next is computed, which no function of whole arrays can give.
"""

import numba
import numpy as np

import fastce
from fastce import rows


@numba.njit
def add_up(weight, features, logits):
    """The logits of one row."""
    logits[:] = weight[features[0]]
    for k in range(1, features.size):
        logits += weight[features[k]]


@numba.njit
def total_loss(weight, features, targets):
    """Sum of the losses, with room for the logits of one row."""
    logits = np.empty(weight.shape[1], weight.dtype)
    loss = 0.0
    for i in range(features.shape[0]):
        add_up(weight, features[i], logits)
        loss += rows.cross_entropy(logits, targets[i])
    return loss


@numba.njit(parallel=True, nogil=True)
def fused_loss(weight, features, targets):
    """Mean loss, on all threads."""
    threads = numba.get_num_threads()
    bounds = np.arange(threads + 1) * features.shape[0] // threads
    loss = 0.0
    for k in numba.prange(threads):
        part = slice(bounds[k], bounds[k + 1])
        loss += total_loss(weight, features[part], targets[part])
    return loss / features.shape[0]


@numba.njit(parallel=True, nogil=True)
def all_logits(weight, features):
    """The logits of all rows, for comparison."""
    logits = np.empty((features.shape[0], weight.shape[1]), weight.dtype)
    for i in numba.prange(features.shape[0]):
        add_up(weight, features[i], logits[i])
    return logits


def two_step_loss(weight, features, targets):
    """The same loss by way of an array of rows x classes."""
    return fastce.cross_entropy(all_logits(weight, features), targets)


@numba.njit
def descend(weight, features, targets, rate):
    """One epoch of stochastic gradient descent, row by row, and the mean loss along the way."""
    row = np.empty(weight.shape[1], weight.dtype)
    loss = 0.0
    for i in range(features.shape[0]):
        add_up(weight, features[i], row)
        loss += rows.cross_entropy_and_grad(row, targets[i], row, rate)  # in place
        for k in range(features.shape[1]):
            weight[features[i, k]] -= row
    return loss / features.shape[0]


def documents(count, words, vocabulary, classes, *, seed=0):
    """Words of documents whose classes each prefer some words, and the classes."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, count)
    topical = (targets[:, None] * 7919 + rng.integers(0, 50, (count, words))) % vocabulary
    anything = rng.integers(0, vocabulary, (count, words))
    return np.where(rng.random((count, words)) < 0.3, topical, anything), targets


def main():
    """Train, and compute the loss both ways."""
    features, targets = documents(4000, words=20, vocabulary=5000, classes=200)
    weight = np.zeros((5000, 200), np.float32)
    for epoch in range(3):
        print(f"epoch {epoch}: loss {descend(weight, features, targets, 0.1):.4f}")
    one, other = fused_loss(weight, features, targets), two_step_loss(weight, features, targets)
    print(f"fused {one:.6f}, in two steps {other:.6f}")


if __name__ == "__main__":
    main()
