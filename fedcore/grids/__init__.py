"""Grids: where the clients of a run live. Each is a ``flwr.serverapp.Grid``, so any Flower strategy runs on any of them."""
