"""Hugging Face: one table of adapters, patch and unpatch, report, attention interface."""
