"""Differential privacy: mechanisms, their integer encoding for secure sums, and what the noise is drawn from."""
