"""Tools that read records: summaries, comparisons, the roofline, findings and sweeps.

It may import record, and neither torch nor any code of a run. Start at `compare.py`.
`findings*.py` find what is unexpected in a run's memory; `sweep*.py` show several runs as one table.
"""
