"""The speed program: ``python -m benchmarks speed``. Steps side by side in one run, each against a measured limit.

`models` are lists of parameters, `candidates` the optimizers that step them, `limit` what the memory allows (a `loop`
on a CPU); `measure` times them in turns, `startup` the first step of a fresh process; `records` is what is kept,
`asked` what was promised of it; `report` and `plot` show it, and `run` does all that. normopt imports none of it.
"""
