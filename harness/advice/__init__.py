"""What would fit, and what would save: each answer is a rehearsal's. It may import analysis and rehearsal.

Start at `explain.py` for one run and at `fit.py` for the search among configs.
"""
