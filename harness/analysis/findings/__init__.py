"""What people do not expect in a run, each from figures of its record, for `harness explain` and the report.

Start at `finding.py`. Each other file has functions from a `Run` to its findings, and lists them as they are printed.
"""
