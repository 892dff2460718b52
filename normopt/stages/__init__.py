"""The stages from a gradient to a weight update, one file per stage, as functions over lists of tensors.

The lists are parallel: entry i of each belongs to parameter i. Stages do not depend on optimizers, param
groups or each other; [`engine`][normopt.engine] calls them in a fixed order. A function whose name ends
in ``_`` writes to its first argument; all others leave their inputs unchanged.
"""
