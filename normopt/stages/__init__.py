"""What happens to a gradient on its way to the weights: one file a stage, functions over lists of tensors.

The lists are parallel: entry i of each belongs to parameter i. No stage knows of optimizers, param
groups or other stages; [`engine`][normopt.engine] walks them in their one order. A function whose
name ends in ``_`` writes into its first argument; every other one leaves its inputs as they were.
"""
