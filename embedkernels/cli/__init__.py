"""Commands: ``embedkernels doctor`` and ``embedkernels finetune``."""
