"""The files of a run, written and read: `record.json` and the trace. Reading needs no torch.

It may import config, ledger and runtime. Start at `schema.py`, whose parts are in `memory.py` and `results.py`: what is
written and what is read. `record_file.py` has the file itself; `save.py` writes the record of a loop outside the
harness.
"""
