"""What lies on disk after a run: `record.json` and the trace, written and read. It reads without torch.

It may import ledger and runtime. Start at `record_file.py`, then `schema.py`; `save.py` leaves the record of
anybody's loop.
"""
