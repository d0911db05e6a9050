"""The files of a run, written and read: `record.json` and the trace. Reading needs no torch.

It may import ledger and runtime. Start at `record_file.py`, then `schema.py`; `save.py` writes the record of a loop
outside the harness.
"""
