"""`fastce.jax` on four devices: what each case computes and exchanges, printed as JSON.

The devices are made of the CPU by XLA_FLAGS, which is read when JAX starts: hence a program. Its
only argument says whether the partitioner is Shardy or GSPMD, which came before.
"""

import functools
import json
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import fastce.jax
from tests.checks import draw, draw_soft, draw_targets

ROWS, CLASSES = 64, 100
FLAT = draw((ROWS, CLASSES)), draw_targets((ROWS,), CLASSES, np.int32)
SOFT = FLAT[0], draw_soft((ROWS, CLASSES), np.float32)
DEEP = draw((8, 12, 40)), draw_targets((8, 12), 40, np.int32)
IMAGES = DEEP[0], draw_targets((8, 40), 12, np.int32)


def both(logits, targets, **options):
    """The losses of rows, and a gradient that is another for each."""
    losses = functools.partial(fastce.jax.cross_entropy, reduction="none", **options)
    grad = jax.grad(lambda z: jnp.square(losses(z, targets)).sum())(logits)
    return losses(logits, targets), grad


def reduced(logits, targets, **options):
    return jax.value_and_grad(functools.partial(fastce.jax.cross_entropy, **options))(
        logits, targets
    )


def twin(name):
    function = getattr(fastce.jax, name)
    where = jnp.arange(ROWS) % 7 > 0
    return lambda z, y: jax.value_and_grad(lambda z: function(z, y, where=where).sum())(z)


def scanned(logits, targets):
    step = lambda c, zy: (c + fastce.jax.cross_entropy(*zy), None)  # noqa: E731
    return jax.lax.scan(step, 0.0, (logits, targets))[0]


LINE, GRID = (4,), (2, 2)
# What is computed, of what, on which mesh, and how logits and targets are divided along it.
DIVIDED = {
    "rows": (both, FLAT, LINE, P("a"), P("a")),
    "rows along both axes": (both, FLAT, GRID, P(("a", "b")), P(("a", "b"))),
    "targets on every device": (both, FLAT, LINE, P("a"), P()),
    "options": (functools.partial(both, ignore_index=3, label_smoothing=0.1, z_loss=0.01),
                FLAT, LINE, P("a"), P("a")),
    "probabilities": (both, SOFT, LINE, P("a"), P("a")),
    "batches and rows": (both, DEEP, GRID, P("a", "b"), P("a", "b")),
    "images": (functools.partial(both, axis=1), IMAGES, GRID, P("a", None, "b"), P("a", "b")),
    "vmap": (jax.vmap(both), DEEP, GRID, P("a", "b"), P("a", "b")),
    "mean": (reduced, FLAT, LINE, P("a"), P("a")),
    "sum": (functools.partial(reduced, reduction="sum"), SOFT, LINE, P("a"), P("a")),
    "normalizer": (functools.partial(reduced, normalizer=50.0), FLAT, LINE, P("a"), P("a")),
    "optax, integers": (twin("softmax_cross_entropy_with_integer_labels"), FLAT, LINE,
                        P("a"), P("a")),
    "optax, probabilities": (twin("softmax_cross_entropy"), SOFT, LINE, P("a"), P("a")),
    "gradient of the labels": (jax.grad(fastce.jax.cross_entropy, 1), SOFT, LINE, P("a"), P("a")),
    "checkpoint": (lambda z, y: reduced(jnp.tanh(z), y), FLAT, LINE, P("a"), P("a")),
    "scan": (scanned, DEEP, GRID, P(None, "b"), P(None, "b")),
}  # fmt: skip
# Kernels take rows whole, so that something has to be exchanged.
GATHERED = {
    "classes": (both, FLAT, LINE, P(None, "a"), P()),
    "classes, and targets along the same": (both, FLAT, LINE, P(None, "a"), P("a")),
    "rows and classes": (both, FLAT, GRID, P("a", "b"), P("a")),
    "classes of probabilities": (both, SOFT, LINE, P(None, "a"), P("a")),
    "targets along the other axis": (both, DEEP, GRID, P("a", "b"), P("b", "a")),
    "rows that do not come out even": (lambda z, y: both(z[:61], y[:61]), FLAT, LINE,
                                       P("a"), P("a")),
}  # fmt: skip
# Of these also where JAX's types say what is divided.
EXPLICIT = ("rows", "mean", "batches and rows", "classes", "rows and classes")


def mesh(shape, kind=AxisType.Auto):
    names = ("a", "b")[: len(shape)]
    return Mesh(np.array(jax.devices()).reshape(shape), names, axis_types=(kind,) * len(shape))


def exchanged(compiled):
    """What is exchanged, in the order of the program."""
    names = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    return re.findall(rf"= \(?(\S+?)(?:{{\S*)? ({names})\(", compiled.as_text())


def results_of(function, arrays, shape, *specs, kind=AxisType.Auto):
    """Which results have the bits that they have on one device, the worst error; exchanges."""
    want = jax.tree.leaves(jax.jit(function)(*arrays))
    on = mesh(shape, kind)
    placed = [
        jax.device_put(a, NamedSharding(on, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]
    compiled = jax.jit(function).lower(*placed).compile()
    got = jax.tree.leaves(compiled(*placed))
    return {
        "bits": [np.array_equal(a, b) for a, b in zip(got, want, strict=True)],
        "error": max(
            float(np.abs(np.asarray(a) - b).max()) for a, b in zip(got, want, strict=True)
        ),
        "exchanged": exchanged(compiled),
    }


def without_a_mesh():
    """Where JAX has no names for what things are divided along."""
    from jax._src.sharding_impls import GSPMDSharding  # which has no public name any more

    sharding = GSPMDSharding(
        tuple(jax.devices()), NamedSharding(mesh(LINE), P("a"))._to_xla_hlo_sharding(2)
    )
    placed = jax.device_put(FLAT[0], sharding)
    got, want = (jax.jit(both)(z, FLAT[1]) for z in (placed, FLAT[0]))
    return [np.array_equal(a, b) for a, b in zip(got, want, strict=True)]


W = draw((CLASSES, CLASSES), scale=0.1)
# What jax.shard_map is to be had of, of losses that are ours or optax's: where a value that differs
# among devices meets one that does not, derivatives are summed.
SHARD_MAP = {
    "losses": (lambda f, z, y: f(z, y), (P("a"), P("a")), P("a")),
    "sum": (lambda f, z, y: jax.lax.psum(f(z, y).sum(), "a"), (P("a"), P("a")), P()),
    "gradient of the mean": (
        lambda f, z, y: jax.grad(lambda z: jax.lax.pmean(f(z, y).mean(), "a"))(z),
        (P("a"), P("a")), P("a"),
    ),
    "gradient of shared weights": (
        lambda f, z, y: jax.grad(lambda w: jax.lax.psum(f(z @ w, y).sum(), "a"))(W),
        (P("a"), P("a")), P(),
    ),
    "shared logits": (
        lambda f, z, y: jax.grad(lambda z: f(z, y).sum())(z[:16]), (P(), P("a")), P(),
    ),
    "vmap": (
        lambda f, z, y: jax.vmap(jax.grad(lambda z, y: f(z, y).sum()))(z, y),
        (P("a"), P("a")), P("a"),
    ),
    "second derivatives": (
        lambda f, z, y: jax.jvp(jax.grad(lambda z: f(z, y).sum()), (z,), (z,))[1],
        (P("a"), P("a")), P("a"),
    ),
}  # fmt: skip


def error_in_shard_map(function, in_specs, out_specs):
    """How far losses by us are from those by optax."""

    def of(losses):
        body = functools.partial(function, losses)
        mapped = jax.shard_map(body, mesh=mesh(LINE), in_specs=in_specs, out_specs=out_specs)
        return np.asarray(jax.jit(mapped)(*FLAT))

    ours = of(functools.partial(fastce.jax.cross_entropy, reduction="none"))
    return float(np.abs(ours - of(optax.softmax_cross_entropy_with_integer_labels)).max())


def part_of_the_mesh():
    """Inside of shard_map over one axis of two, along which alone is divided by hand."""
    losses = functools.partial(fastce.jax.cross_entropy, reduction="none")
    mapped = jax.shard_map(
        losses, mesh=mesh(GRID), in_specs=(P("a"), P("a")), out_specs=P("a"), axis_names={"a"}
    )
    return np.array_equal(jax.jit(mapped)(*FLAT), losses(*FLAT))


def cached(folder):
    """Losses with two values of an option, and those on one device, where JAX keeps programs."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # Without the addresses of rules, of which a program in another process may have the same.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    found = []
    for smoothing in (0.0, 0.1):
        losses = functools.partial(
            fastce.jax.cross_entropy, reduction="none", label_smoothing=smoothing
        )
        placed = [jax.device_put(a, NamedSharding(mesh(LINE), P("a"))) for a in FLAT]
        found.append(np.array_equal(jax.jit(losses)(*placed), losses(*FLAT)))
    return found


def lowered(platform):
    """Which rules there are in a program for devices that need not be here."""
    sharding = NamedSharding(mesh(LINE), P("a"))
    placed = [jax.device_put(a, sharding) for a in FLAT]
    text = jax.jit(reduced).trace(*placed).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"#sdy.op_sharding_rule<(.*?)>(?=[,}])", text)


def program(partitioner):
    """All of it."""
    jax.config.update("jax_use_shardy_partitioner", partitioner == "shardy")
    cases = {name: results_of(*case) for name, case in (DIVIDED | GATHERED).items()}
    found = {"cases": cases, "without a mesh": without_a_mesh()}
    if partitioner == "shardy":
        found["explicit"] = {
            name: results_of(*(DIVIDED | GATHERED)[name], kind=AxisType.Explicit)
            for name in EXPLICIT
        }
        found["shard_map"] = {name: error_in_shard_map(*case) for name, case in SHARD_MAP.items()}
        found["part of the mesh"] = part_of_the_mesh()
        found["lowered"] = {platform: lowered(platform) for platform in ("cpu", "cuda", "tpu")}
        with tempfile.TemporaryDirectory() as folder:
            found["cached"] = cached(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    program(sys.argv[1])
