"""Training: the loops, what they read, and what they write."""
