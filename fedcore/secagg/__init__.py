"""Secure aggregation: one upload per client, a committee that unmasks sums. Pure: bytes in, bytes out; no sockets, no clock."""
