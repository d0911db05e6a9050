"""Which configs fit, and which changes save memory; rehearsals give each answer. It may import analysis and rehearsal.

Start at `explain.py` for one run, at `fit.py` for the search among configs, and at `jobs.py` for sweeps.
"""
