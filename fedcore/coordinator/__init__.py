"""The coordinator: the round loop over any Flower strategy and any grid, with atomic commits."""
