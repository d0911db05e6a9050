"""The processes of a run and their machine: the world, failures, progress, memory and rates of the hardware.

It may import config and ledger. Start at `world.py`.
"""
