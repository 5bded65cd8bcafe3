"""Everything that wants a GPU, checked and measured in one call: `python benchmarks/gpu/run.py`.

Each section is a module with a `run(machine)` that yields nothing and returns a `Result`; `run.py`
gives each a process of its own, so that one that crashes, hangs or poisons its CUDA context costs
its own result only.
"""
