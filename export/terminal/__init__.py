"""What the scripts share: arguments, tables, progress."""
