"""The native trainer: C generated for one network, compiled on this machine, that does a client's whole local training.

A model becomes a list of layers (layers.py), these are fused into blocks with a place for every value (blocks.py, memory.py),
kernels are written for each block (forward.py, weight_gradients.py, input_gradients.py, dense.py, normalisation.py, plain.py)
and put together (emit.py), compiled (build.py) and called (trainer.py). The plain torch loop stays the reference that every
program is compared with.
"""
