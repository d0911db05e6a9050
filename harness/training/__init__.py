"""The training run. It may import every room below it, but not generation.

Start at `train.py`: data, engine, steps, validation. `engine.py` wraps DeepSpeed, `pipeline_engine.py` its pipeline
engine, `optimizers.py` chooses the optimizer, `checkpoint.py` saves and loads the full state.
"""
