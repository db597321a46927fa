"""`fastce.jax` beside JAX's own formula and optax's loss, all under `jax.jit`.

    python -m benchmarks.integrations.jax [--quick]

Contestants take turns in one run; times are minima, ratios medians within a turn. "bare" is the
NumPy function on the same logits, its gradient to memory that exists; XLA makes its results anew,
and the first touch of fresh memory is most of the time where they are large. In "head" the
logits are x @ w and the gradient goes on to w.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fastce
import fastce.jax
from benchmarks.timing import Contestant, alternately, asked_for_quick

SHAPES = [(32, 10), (65536, 10), (4096, 1000), (1024, 32000)]
FEATURES = 16


def plain(logits, labels):
    """What one writes."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def through_python(logits, labels):
    """The NumPy function by way of a callback; loss and gradient for `jax.custom_vjp`."""

    def call(z, y):
        return fastce.cross_entropy_and_grad(z, y, reduction="none")

    shapes = (
        jax.ShapeDtypeStruct(labels.shape, jnp.float32),
        jax.ShapeDtypeStruct(logits.shape, logits.dtype),
    )
    return jax.pure_callback(call, shapes, logits, labels)


@jax.custom_vjp
def callback(logits, labels):
    return through_python(logits, labels)[0]


callback.defvjp(through_python, lambda grad, upstream: (grad * upstream[:, None], None))

LOSSES = {
    "fastce": fastce.jax.softmax_cross_entropy_with_integer_labels,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "plain": plain,
    "callback": callback,
}
WORKS = ("loss", "gradient", "head")


def contestant(work, loss, arrays):
    """A jitted call that waits for its result."""
    x, w, logits, labels = arrays
    if work == "loss":
        function, arguments = jax.jit(lambda z, y: loss(z, y).mean()), (logits, labels)
    elif work == "gradient":
        mean = lambda z, y: loss(z, y).mean()  # noqa: E731
        function, arguments = jax.jit(jax.value_and_grad(mean)), (logits, labels)
    else:
        mean = lambda w, x, y: loss(x @ w, y).mean()  # noqa: E731
        function, arguments = jax.jit(jax.value_and_grad(mean)), (w, x, labels)
    return Contestant(lambda: jax.block_until_ready(function(*arguments)))


def main() -> None:
    shapes, turns, seconds = ([(32, 10)], 1, 0.0) if asked_for_quick() else (SHAPES, 5, 0.02)
    rng = np.random.default_rng(0)
    print(
        "rows x classes   work       fastce ms"
        + "".join(f"{name + ' / fastce':>19}" for name in (*list(LOSSES)[1:], "bare"))
    )
    for rows, classes in shapes:
        x = rng.standard_normal((rows, FEATURES), np.float32)
        w = rng.standard_normal((FEATURES, classes), np.float32) / 4
        z, y = x @ w, rng.integers(0, classes, rows).astype(np.int32)
        arrays = tuple(map(jnp.asarray, (x, w, z, y)))
        bare = {
            "loss": partial(fastce.cross_entropy, z, y),
            "gradient": partial(fastce.cross_entropy_and_grad, z, y, out=np.empty_like(z)),
        }
        for work in WORKS:
            contestants = {
                name: contestant(work, loss, arrays)
                for name, loss in LOSSES.items()
                if not (name == "callback" and work == "loss")
            }
            if work in bare:
                contestants["bare"] = Contestant(bare[work])
            times = alternately(contestants, turns=turns, seconds=seconds)
            line = f"{rows:6} x {classes:<7} {work:9}{1e3 * times['fastce'].minimum:11.3f}"
            for name in (*list(LOSSES)[1:], "bare"):
                ratio = f"{times[name].over(times['fastce']):.2f}" if name in times else ""
                line += f"{ratio:>19}"
            print(line)


if __name__ == "__main__":
    main()
