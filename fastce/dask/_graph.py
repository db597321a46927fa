"""Graphs of tasks on the chunks of dask arrays, built from shapes and dtypes alone."""

import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

Key = tuple[Any, ...]
Index = tuple[int, ...]
Chunks = tuple[tuple[int, ...], ...]

# Results that one task merges: a tree of few levels, and little to hold at a time.
BRANCHES = 8


class Graph:
    """Tasks that may be done more than once, each known by its key.

    All are one layer of dask's graph. `dask.delayed` makes a layer of each and merges those of all
    that a task needs, so that what waits for every chunk takes time by the square of their number
    (see benchmarks/integrations/shards_cost.py).
    """

    def __init__(self, label: str, *sources: Any) -> None:
        self._name = f"{label}-{uuid.uuid4().hex}"
        self._tasks: dict[Any, Any] = {}
        self._sources = sources
        self._arrays = 0

    def task(self, function: Callable[..., Any], *keys: Key | None, **given: Any) -> Key:
        """Call a function of the results of other tasks, or None, and of what is given by name."""
        key = (self._name, len(self._tasks))
        self._tasks[key] = (functools.partial(function, **given), *keys)
        return key

    def tree(self, merge: Callable[..., Any], keys: Sequence[Key], branches: int = BRANCHES) -> Key:
        """Merge results, some at a time, until one is left."""
        while len(keys) > 1:
            keys = [
                self.task(merge, *keys[k : k + branches]) for k in range(0, len(keys), branches)
            ]
        return keys[0]

    def array(self, blocks: Mapping[Index, Key], chunks: Chunks, dtype: npt.DTypeLike) -> Any:
        """The dask array of these blocks."""
        self._arrays += 1
        name = f"{self._name}-{self._arrays}"
        layer: Any = {(name, *index): key for index, key in blocks.items()}
        sources: Any = [self]
        graph = HighLevelGraph.from_collections(name, layer, dependencies=sources)
        return da.Array(graph, name, chunks, dtype)

    def number(self, key: Key, dtype: npt.DTypeLike) -> Any:
        """The dask array of no dimension that a task results in."""
        return self.array({(): key}, (), dtype)

    def compute(self, key: Key) -> Any:
        """The result of a task, now."""
        return Delayed(key, self.__dask_graph__(), layer=self._name).compute()

    def __dask_graph__(self) -> HighLevelGraph:
        """What makes a graph a source of another one."""
        return HighLevelGraph.from_collections(self._name, self._tasks, dependencies=self._sources)

    def __dask_layers__(self) -> tuple[str, ...]:
        """The layer of the tasks."""
        return (self._name,)


def add(*parts: Any) -> Any:
    """The sum of numbers or arrays, in their order."""
    with np.errstate(all="ignore"):
        return sum(parts[1:], start=parts[0])


def pick(result: Any, *, item: int) -> Any:
    """One of several results of a task."""
    return result[item]


def in_chunk(start: Index, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a chunk that says where the chunk starts if a target in it is bad."""
    return functools.partial(_in_chunk, start, function)


def _in_chunk(start: Index, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
    try:
        return function(*args, **given)
    except IndexError as error:
        raise IndexError(f"{error}, in the chunk that starts at {start}") from None
