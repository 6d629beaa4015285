"""Parity: whether two forms of a network are equal, and whether the evidence says so.

The oracle is always the eager model in float64. `evidence` asks whether the inputs can show a defect
at all (P0), `operators` holds every operator to its rounding error (P1), `network` compares whole
outputs and decisions (P2, P3).
"""
