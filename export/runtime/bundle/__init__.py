"""The folder that travels: written whole, checked whole."""
