"""Fused steps: all stages of a param group in one to three passes over all of its tensors at once.

`flags` defines what the stages lower to, `tables` the tables of addresses and chunks. `numba` and `triton` are the
kernels, and `fused` checks the tensors' memory and runs them. The mathematics is that of `norms` and `stages`.
"""
