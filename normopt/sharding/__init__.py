"""DTensors: how tensors are sharded over the ranks of a process group, and what the ranks exchange in a step.

`layout` describes a sharding, `exchange` gathers partial sums, `matrices` maps whole tensors, and `agreement`
checks that all ranks make the same step.
"""
