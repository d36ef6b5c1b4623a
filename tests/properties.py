"""Settings of property tests.

The drawn examples are the same in every run, so that a red run is the change's doing. ``HYPOTHESIS_PROFILE=explore``
draws others, ten times as many, and prints what repeats a failure.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXPLORE = os.environ.get("HYPOTHESIS_PROFILE") == "explore"


def examples(count: int) -> settings:
    """``count`` examples, each of which may take its time: Triton's interpreter does."""
    return settings(
        max_examples=count * (10 if EXPLORE else 1),
        deadline=None,
        derandomize=not EXPLORE,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
