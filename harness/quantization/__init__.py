"""Packed weights: how a `quantization_config` is applied, and the tensor layouts of each method.

It may import config, ledger, device and record. Start at `method.py`. To add a method, add a line to `METHODS` and a
layout to `layouts.py`.
"""
