"""Loss and gradient of chunked logits, and softmax regression, on a local cluster of processes.

python examples/dask_cluster.py [--quick]
"""

import argparse

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster

import fastce
import fastce.dask
from fastce.sklearn import SoftmaxRegression


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data, threads, no cluster")
    quick = parser.parse_args().quick
    if quick:
        compare(200, 300)
        return
    with LocalCluster(n_workers=2, threads_per_worker=1) as cluster, Client(cluster):
        compare(20000, 5000)


def compare(rows: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, classes), np.float32)
    targets = rng.integers(0, classes, rows)
    z = da.from_array(logits, chunks=(rows // 4, classes // 3))
    loss, grad = dask.compute(*fastce.dask.cross_entropy_and_grad(z, targets))
    expected, gradient = fastce.cross_entropy_and_grad(logits, targets)
    print(f"loss {loss:.6f}, in one piece {expected:.6f}")
    assert np.allclose(grad, gradient, rtol=1e-5, atol=1e-9)

    x = rng.standard_normal((rows, 10))
    y = np.argmax(x[:, :3] + rng.gumbel(size=(rows, 3)), axis=1)
    chunked = SoftmaxRegression().fit(da.from_array(x, chunks=(rows // 4, 10)), y)
    model = SoftmaxRegression().fit(x, y)
    print(f"log likelihood {chunked.log_likelihood(x, y):.3f}, {model.log_likelihood(x, y):.3f}")
    assert np.allclose(chunked.coef_, model.coef_, atol=1e-3)


if __name__ == "__main__":
    main()
