"""Everything that runs where a bundle runs: neither PyTorch nor Triton is needed."""
