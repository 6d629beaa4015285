"""From an nn.Module to the fused program, the one thing all lowerings share."""
