"""What pushes models back to devices: deltas, signed repository, staged rollout."""
