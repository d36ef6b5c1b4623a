"""What a device could do at best, and how near to that a measured time is."""

from __future__ import annotations


def share_of_ceiling(floor: dict[str, float], ceilings: dict[str, float], median_us: float) -> float | None:
    """The least time that a case's bytes and operations need on this device, over the time it took."""
    seconds = max(
        floor["bytes"] / ceilings["copy_bytes_per_s"],
        floor["flops"] / ceilings["bf16_flops_per_s"],
    )
    return seconds * 1e6 / median_us if seconds and median_us else None
