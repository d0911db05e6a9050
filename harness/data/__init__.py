"""The input tokens: text, batches of it for training, prompts and workloads for generation.

It may import config, record and runtime. Start at `token_batches.py` for training and at `prompts.py` for generation.
"""
