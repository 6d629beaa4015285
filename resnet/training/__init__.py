"""Training the reference models, and the experiments on it."""
