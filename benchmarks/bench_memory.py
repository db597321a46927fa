"""Memory of calls on many logits, for asv."""

from collections.abc import Callable
from typing import Any

from benchmarks.cases import CASES, LARGE, LOSSES, WORKS, Case, data
from benchmarks.memory import extra


class Memory:
    """What `peakmem_call` has beyond `peakmem_reference` is what the call needs."""

    params = LOSSES
    param_names = ("work",)
    call: Callable[[], Any]

    def setup(self, work: str) -> None:
        WORKS[work].contestant(data(Case((8, 32000)))).call()  # compiles, starts threads
        self.call = WORKS[work].contestant(data(CASES[LARGE[0]])).call

    def peakmem_reference(self, work: str) -> None:
        pass

    def peakmem_call(self, work: str) -> None:
        self.call()

    def track_extra_bytes(self, work: str) -> int:
        traced, resident = extra(self.call)
        return max(traced, resident or 0)

    track_extra_bytes.unit = "bytes"  # type: ignore[attr-defined]
