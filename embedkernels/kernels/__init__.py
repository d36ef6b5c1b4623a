"""Triton kernels with their tile tables. Importing a module of this package needs Triton; ``ops`` decides when."""
