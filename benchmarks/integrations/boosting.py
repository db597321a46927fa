"""Softmax objectives of `fastce.boosting` beside XGBoost's and LightGBM's own.

    python -m benchmarks.integrations.boosting [--quick]

Whole trainings of the same trees, in turns: times are minima, ratios medians within a turn. The
objective alone is timed on the scores of that training; the rest of the difference is what a
library does around a custom objective: XGBoost predicts all rows anew in each round, and both
hand the arrays over.
"""

import lightgbm
import numpy as np
import xgboost

from benchmarks.timing import Contestant, alternately, asked_for_quick
from fastce.boosting import softmax_objective

ROWS, FEATURES, ROUNDS = 50000, 10, 10
CLASSES = [3, 10, 50]


def trainings(rows: int, classes: int) -> dict[str, Contestant]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, rows)
    x = rng.normal(size=(rows, FEATURES)) + rng.normal(size=(classes, FEATURES))[y]
    matrix, data = xgboost.DMatrix(x, y), lightgbm.Dataset(x, y, free_raw_data=False)
    first = {"num_class": classes, "max_depth": 4, "base_score": 0.5, "objective": "multi:softprob"}
    second = {
        "num_class": classes, "num_leaves": 15, "boost_from_average": False, "verbose": -1,
        "num_threads": 2,
    }  # fmt: skip
    ours = {name: softmax_objective(name) for name in ("xgboost", "lightgbm")}
    scores = {
        "xgboost": rng.normal(size=(rows, classes)).astype(np.float32),
        "lightgbm": np.asfortranarray(rng.normal(size=(rows, classes))),
    }
    labels = y.astype(np.float32)

    def train_lightgbm(objective):
        return lightgbm.train(second | {"objective": objective}, data, ROUNDS)

    return {
        "xgboost own": Contestant(lambda: xgboost.train(first, matrix, ROUNDS)),
        "xgboost ours": Contestant(
            lambda: xgboost.train(first, matrix, ROUNDS, obj=ours["xgboost"])
        ),
        "xgboost objective": Contestant(lambda: ours["xgboost"](labels, scores["xgboost"])),
        "lightgbm own": Contestant(lambda: train_lightgbm("multiclass")),
        "lightgbm ours": Contestant(lambda: train_lightgbm(ours["lightgbm"])),
        "lightgbm objective": Contestant(lambda: ours["lightgbm"](labels, scores["lightgbm"])),
    }


def main() -> None:
    rows, each, turns = (200, [3], 1) if asked_for_quick() else (ROWS, CLASSES, 3)
    print(f"{rows} rows, {FEATURES} features, {ROUNDS} rounds; ms per training or per call")
    print(
        "classes   library     own objective   ours   ours / own   the objective alone, per round"
    )
    for classes in each:
        times = alternately(trainings(rows, classes), turns=turns, seconds=0.0)
        for library in ("xgboost", "lightgbm"):
            own, ours, alone = (times[f"{library} {k}"] for k in ("own", "ours", "objective"))
            print(
                f"{classes:7}   {library:9}{1e3 * own.minimum:16.1f}{1e3 * ours.minimum:7.1f}"
                f"{ours.over(own):13.2f}{1e3 * alone.minimum:33.2f}"
            )


if __name__ == "__main__":
    main()
