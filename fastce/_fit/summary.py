"""Estimates, what they are known to, and tests of them, as a table."""

import dataclasses
from typing import Any

from scipy import special

from fastce._fit.coordinates import Vector
from fastce._fit.passes import Array

_COLUMNS = ("estimate", "standard_error", "z", "p", "lower", "upper")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What tells each class from the reference: a table that prints, and its columns as arrays.

    Attributes
    ----------
    classes : numpy.ndarray of shape (C - 1,)
        The classes, without the reference.
    reference : object
        The class that they are compared with.
    features : numpy.ndarray of shape (P,)
        Names of the features, and "(intercept)" last if there is one.
    estimate, standard_error : numpy.ndarray of shape (C - 1, P)
        Differences of coefficients to those of the reference, and their standard errors.
    z, p : numpy.ndarray of shape (C - 1, P)
        Their quotient, and the probability of one as far from 0 if the difference were 0 (Wald).
    lower, upper : numpy.ndarray of shape (C - 1, P)
        Limits of the confidence intervals.
    confidence : float
        Their level.
    """

    classes: Array
    reference: Any
    features: Array
    estimate: Vector
    standard_error: Vector
    z: Vector
    p: Vector
    lower: Vector
    upper: Vector
    confidence: float

    @classmethod
    def of(
        cls, estimate: Vector, error: Vector, classes: Array, reference: Any, features: Array,
        confidence: float,
    ) -> "Summary":  # fmt: skip
        """The table of estimates and their standard errors."""
        z = estimate / error
        margin = float(special.ndtri((1 + confidence) / 2)) * error
        return cls(
            classes, reference, features, estimate, error, z, 2 * special.ndtr(-abs(z)),
            estimate - margin, estimate + margin, confidence,
        )  # fmt: skip

    def to_frame(self) -> Any:
        """Return the table as a pandas.DataFrame, a row for each class and feature."""
        import pandas  # type: ignore[import-untyped, unused-ignore]

        index = pandas.MultiIndex.from_product(
            [self.classes, self.features], names=["class", "feature"]
        )
        return pandas.DataFrame({c: getattr(self, c).ravel() for c in _COLUMNS}, index=index)

    def __str__(self) -> str:
        level = f"{100 * self.confidence:.10g}%"
        head = ("class", "feature", "estimate", "std. error", "z", "p", level, "interval")
        formats = (".5g", ".4g", ".2f", ".3g", ".5g", ".5g")
        rows = [head]
        for k, label in enumerate(self.classes):
            for j, feature in enumerate(self.features):
                numbers = (getattr(self, column)[k, j] for column in _COLUMNS)
                cells = (format(n, f) for n, f in zip(numbers, formats, strict=True))
                rows.append((str(label), str(feature), *cells))  # type: ignore[arg-type]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if k < 2 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]  # fmt: skip
        return "\n".join([f"relative to class {self.reference}", *lines])
