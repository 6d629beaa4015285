"""The reference model family, its weights, data and training. Knows nothing of fusion or export."""
