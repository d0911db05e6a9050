"""How long a step takes: at best, by a machine's limits, and by an estimate with its error.

`roofline.py` is the tool; `roofline_model.py` has the limits, `estimate.py` a step's operators by the efficiency that
others measured, which is in `efficiency.json`, and `communication.py` what ranks send. `efficiency_fit.py` and
`link_fit.py` make that file.
"""
