"""A training run as one HTML page and as pictures."""
