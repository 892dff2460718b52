"""DTensors: how what a norm needs whole is met where tensors are spread over the ranks of a process group.

`layout` says how a tensor lies; `exchange` lets the walks of a step go in lockstep, so that what they have to
know of other ranks travels together; `direction` meets each norm's needs, and `matrices` brings whole ones together.
"""
