"""Measuring: what kernels compile to (no GPU needed), how fast they run, and the report of one GPU session."""
