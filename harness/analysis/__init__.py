"""What records say: summaries, comparisons, the roofline, findings and sweeps.

It may import record, and neither torch nor anything that runs. Start at `compare.py`.
`findings*.py` say what is surprising in a run's memory; `sweep*.py` draw several runs as one table.
"""
