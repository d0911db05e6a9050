"""What is special about a device: how its allocator works, and what lies outside it. It may import config and ledger.

Start reading at `outside.py` for what is left for torch on a card.
"""
