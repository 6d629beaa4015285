"""INT8: from pictures to ranges, from ranges to scales, and a fused program that computes with them."""
