"""What a run moves, read from its record: `harness traffic`, `harness links`, and traces for simulators.

`transfers.py` reads the record's rows; the others draw them (`traffic.py`), compare them with what links can carry
(`links.py`, `links_model.py`, `fabric.py`) and write them for ASTRA-sim (`chakra.py`).
"""
