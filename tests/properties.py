"""Settings of property tests.

The drawn examples are the same in every run, so that a red run is the change's doing. ``HYPOTHESIS_PROFILE=explore``
draws others, ten times as many, and looks for the smallest call that fails; ``quick`` draws the first quarter.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "")
SHARE = {"": 1.0, "explore": 10.0, "quick": 0.25}[PROFILE]


def examples(count: int) -> settings:
    """``count`` examples, each of which may take its time: Triton's interpreter does."""
    return settings(
        max_examples=max(int(count * SHARE), 1),
        deadline=None,
        derandomize=PROFILE != "explore",
        # In the interpreter a search for the smallest takes longer than all the other tests together.
        phases=tuple(Phase) if PROFILE == "explore" else (Phase.explicit, Phase.generate),
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
