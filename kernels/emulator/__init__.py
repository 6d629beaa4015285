"""Executes the PTX of compiled kernels on a CPU, on numpy arrays, and says what is formally wrong with it."""
