"""Pictures and labels as inputs of a network."""
