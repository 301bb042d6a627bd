"""The small model that runs when no -m is given; data only."""
