"""The processes of a run and their machine: the world, failures, progress, trackers, memory, and the hardware's rates.

It may import config and ledger. Start at `world.py`.
"""
