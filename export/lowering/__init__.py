"""Lowerings: the fused program as a file that another runtime executes."""
