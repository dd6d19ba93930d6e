"""The public data sets: what they are, whether they came through whole, and their conversion."""
