"""Paired measurements: rounds in random order, thread CPU time, quartiles."""

import gc
import random
import statistics
import time
from contextlib import contextmanager


class Wrong(Exception):
    """Two sides that should agree do not."""


def repeated(step):
    """A variant out of a step in Python: seconds of n steps."""

    def run(n):
        start = time.thread_time()
        for _ in range(n):
            step()
        return time.thread_time() - start

    return run


def looped(steps):
    """A variant out of steps(n), which loops in C++: seconds of n steps."""

    def run(n):
        start = time.thread_time()
        steps(n)
        return time.thread_time() - start

    return run


class Watch:
    """Adds up the time within `with` statements. What lies between them is
    neither timed nor profiled."""

    def __init__(self, set_timed):
        self.seconds = 0.0
        self.set_timed = set_timed

    def __enter__(self):
        self.set_timed(True)
        self.start = time.thread_time()

    def __exit__(self, *_):
        self.seconds += time.thread_time() - self.start
        self.set_timed(False)


@contextmanager
def no_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def quartiles(values):
    """Median, lower and upper quartile, and how many there are."""
    if len(values) == 1:
        return {"median": values[0], "q25": values[0], "q75": values[0], "n": 1}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "n": len(values)}


def rounds(variants, count, warm_ups=2, sample=5e-3, repeats=None):
    """Runs every variant once a round, in random order.

    A variant is called with a number of steps and gives their seconds. A sample
    takes about `sample` seconds. Returns seconds a step, by variant and round.
    """
    names = list(variants)
    order = random.Random(0)
    with no_collection():
        for _ in range(max(warm_ups, 1)):
            once = max(variants[name](1) for name in names)
        k = repeats or max(1, min(1000, round(sample / max(once, 1e-7))))
        for name in names if k > 1 else []:
            variants[name](k)
        times = {name: [] for name in names}
        for _ in range(count):
            order.shuffle(names)
            for name in names:
                times[name].append(variants[name](k) / k)
    return times, k


def ratio(times, above, below):
    """Quartiles of the ratio of two variants, round by round."""
    if above not in times or below not in times:
        return None
    return quartiles([a / b for a, b in zip(times[above], times[below])])


def error(a, b):
    """The largest difference, relative to the largest value of b."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        raise Wrong(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if not a.isfinite().all():
        raise Wrong("a result is not finite")
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


def agree(ours, theirs, names, tolerance=1e-5):
    """Errors by name; Wrong where one is above the tolerance."""
    if len(ours) != len(theirs):
        raise Wrong(f"{len(ours)} results against {len(theirs)}")
    errors = {}
    for name, a, b in zip(names, ours, theirs):
        errors[name] = max(error(a, b), errors.get(name, 0.0))
    for name, e in errors.items():
        if not e <= tolerance:
            raise Wrong(f"{name} differs by {e:.1e}, more than {tolerance:.0e}")
    return errors
