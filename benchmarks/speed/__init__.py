"""The speed program: ``python -m benchmarks speed``. Steps side by side in one run, for users and for contributors.

`models` are lists of parameters. For users, `typed` are the optimizers as they are typed, normopt's and others',
`memory` what they hold, `share` their part of a training step, and `page` shows it. For contributors, `candidates` are
steps by backend, `limit` what the memory allows (a `loop` on a CPU), `startup` the first step of a fresh process,
`asked` what was promised, and `report` shows it. `measure` times all in turns, `records` is what is kept, `plot` draws
it, and `run` does all that. normopt imports none of it.
"""
