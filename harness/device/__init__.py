"""What is special about a GPU's memory: its allocator, its kernels, its libraries, and what lies outside PyTorch.

It may import `config`, `ledger` and `tables`. The allocator and the tables of cards need no torch. Start at
`caching_allocator.py`, the twin of PyTorch's; `replay.py` has what a sequence of births and deaths reserves.
"""
