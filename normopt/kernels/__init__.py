"""HOW a step runs fast: the whole walk of a param group in one to three passes over all of its tensors at once.

`flags` says what a plan means to a kernel, `tables` where the tensors lie, `numba` and `triton` are the kernels, and
`fused` runs them. What is computed is the mathematics of `norms` and `stages`, written once more for speed.
"""
