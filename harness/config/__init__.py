"""From `key=value` overrides to typed, checked settings. It imports neither torch nor any other room.

Start at `settings.py`, which has every field with its type, range and default; `rules/` has the rules between fields.
"""
