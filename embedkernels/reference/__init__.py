"""Each op in a few lines of plain PyTorch: the specification, the fallback, the thing tests compare with."""
