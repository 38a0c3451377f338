"""Local training: what one client does with the global model and its own examples.

Every engine is the same function, ``train(start, clients, plan) -> one LocalResult per client, in order``; the plain loop in
`local` is the ground truth that the others are compared with.
"""
