"""The training run. It may import all that is below it, and no generation.

Start at `train.py`: data, engine, steps, validation. `engine.py` is DeepSpeed, `pipeline_engine.py` its pipeline,
`checkpoint.py` the full state on disk.
"""
