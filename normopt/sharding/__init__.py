"""DTensors: the sharding of tensors over the ranks of a process group, and the collectives of a step.

`layout` describes a sharding, `exchange` gathers partial sums, `matrices` maps whole tensors, and `agreement`
checks that all ranks make the same step.
"""
