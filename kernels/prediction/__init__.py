"""A floor under a kernel's time: `sass.py` reads its machine code, `block.py` follows it, `floor.py` sums up."""
