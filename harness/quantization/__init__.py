"""Weights that are packed: what a `quantization_config` comes to, and the layouts of each method.

It may import config. Start at `method.py`; a method more is a line in `METHODS` and a layout in `layouts.py`.
"""
