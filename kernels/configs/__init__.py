"""Which launch configuration computes a problem: what is valid, chosen, tuned and targeted."""
