"""From `key=value` overrides to typed, checked settings. It imports neither torch nor any other room.

Start at `settings.py`. `fields/` has every field with its type, range and default; `rules/` has what holds
between them.
"""
