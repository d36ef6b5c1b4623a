"""How fast a training run was, from the times of its steps, and how much faster than another."""

from __future__ import annotations

import statistics
from typing import Any

# The first steps pay for lazy initialisation and compilation: so many, or this share if that is less, are left out.
WARM_UP_STEPS = 5
WARM_UP_SHARE = 0.2
# Where the quartiles of the steps' ratios are further apart than this, something else was busy on the machine, or the
# steps gain by what is in them, as by padding: then most of them must differ by this much.
MOST_SPREAD = 1.3
FAR_FROM_EQUAL = 1.1


def warm_up(steps: int) -> int:
    """How many of the first steps do not count."""
    return min(WARM_UP_STEPS, int(steps * WARM_UP_SHARE))


def throughput(seconds: list[float], samples: list[int]) -> dict[str, Any]:
    """Samples per second of a run.

    Returns:
        ``samples_per_second``: the median over the steps of a step's samples by its time, which a few slow steps do
        not move. ``samples_per_second_mean``: all samples by all time. Both without the first steps;
        ``throughput_basis`` says how many.
    """
    skipped = warm_up(len(seconds))
    left_out = f" (without the first {skipped})" if skipped else ""
    kept = list(zip(samples[skipped:], seconds[skipped:], strict=True))
    return {
        "samples_per_second": statistics.median(count / second for count, second in kept),
        "samples_per_second_mean": sum(count for count, _ in kept) / sum(second for _, second in kept),
        "throughput_basis": f"median over {len(kept)} training steps{left_out}; no evaluation",
    }


def speedup(before: list[float], after: list[float]) -> dict[str, Any]:
    """How much faster the steps of one run are than the same steps of another.

    Two runs with the same data have the same batch at the same step, so each step is compared with its like: batches
    of short and of long texts do not blur the comparison. What is left is the noise of the machine.

    Args:
        before, after: seconds of the steps of the two runs.

    Returns:
        ``median`` of the steps' ratios, the quartiles ``low`` and ``high`` (between them lies the middle half), and
        ``verdict``: ``"clear"``, ``"no clear difference"`` or ``"too noisy to tell"``.
    """
    skipped = warm_up(len(before))
    ratios = [a / b for a, b in zip(before[skipped:], after[skipped:], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    verdict = "clear"
    if high > MOST_SPREAD * low and high > 1 / FAR_FROM_EQUAL and low < FAR_FROM_EQUAL:
        verdict = "too noisy to tell"
    elif low <= 1.01 and high >= 0.99:
        verdict = "no clear difference"
    return {"median": median, "low": low, "high": high, "verdict": verdict}
