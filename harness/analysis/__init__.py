"""Tools that read records: summaries, comparisons, the roofline, findings and sweeps.

It may import record, and neither torch nor any code of a run. Start at `compare.py`. `findings/` has
what is unexpected in a run, `moves/` what it sends, `speed/` what bounds it, `sweeps/` several runs as one table.
"""
