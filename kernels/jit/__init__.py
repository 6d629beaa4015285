"""The Triton kernels: parts, splits, epilogue and held are what they share, every other file is one kernel."""
