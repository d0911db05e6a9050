"""What a library's error says, short enough for a sentence of ours."""

LONGEST = 200


def first_line(error: BaseException, named: bool = False) -> str:
    """The first line of `error`; with its class where it is `named` so, where that line is one word, or empty."""
    line = next(iter(str(error).strip().splitlines()), "")[:LONGEST]
    name = type(error).__name__
    if not line:
        return name
    return f"{name}: {line}" if named or " " not in line else line
