"""Words that every room uses; nothing here knows what a network is."""
