"""What rounding allows each operator, and the evidence that a comparison could have failed."""
