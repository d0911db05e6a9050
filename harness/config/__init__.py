"""From `key=value` words to typed settings that make sense together. It imports neither torch nor any other room.

Start at `settings.py`, which has every field with its type, range and default; `rules/` has what holds between them.
"""
