"""What lies between the fused operators, as problems: element by element, and pools. No operators of torch's."""
