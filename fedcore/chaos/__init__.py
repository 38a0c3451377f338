"""Faults on purpose, and whether a federation of devices keeps its promises under them."""
