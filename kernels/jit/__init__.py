"""The Triton kernels: `parts.py` holds what they share, every other file one kernel."""
