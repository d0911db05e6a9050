"""The words of a command that runs: Hydra's flags, and the overrides. It imports nothing heavy."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from harness.config.refusal import Refusal

ANY = ("",)
"""The choices of a flag that takes any value."""


class Flag(NamedTuple):
    """A flag of Hydra's: its short form, the values that it takes (none: it takes no value), and its meaning.

    Its value may be left out where there is a `default`.
    """

    short: str
    choices: tuple[str, ...]
    meaning: str
    default: str | None = None


INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

FLAGS = {
    "--multirun": Flag(
        "-m", (), "run every combination of values: zero=0,1,2 or train.micro_batch=range(1,5)"
    ),
    "--run": Flag("-r", (), "run once; the default"),
    "--cfg": Flag("-c", ("job", "hydra", "all"), "check and print the config, run nothing"),
    "--resolve": Flag("", (), "with --cfg: print values in place of interpolations"),
    "--package": Flag("-p", ANY, "with --cfg: print only this part of the config"),
    "--info": Flag("-i", INFO, "print how Hydra makes the config", "all"),
    "--config-dir": Flag("-cd", ANY, "a directory with groups, options and configs of your own"),
    "--config-path": Flag("-cp", ANY, "the directory of the primary config, in place of conf/"),
    "--config-name": Flag("-cn", ANY, "the primary config, in place of config"),
    "--shell-completion": Flag(
        "-sc", (), "install=bash, or zsh or fish, prints what completes words in that shell"
    ),
    "--hydra-help": Flag("", (), "Hydra's own help"),
}
"""By long name. Those that Hydra has and that are not here do nothing for a run."""

COMMANDS = ("--multirun", "--run", "--cfg", "--info", "--shell-completion", "--hydra-help")
"""Flags that say what to do; at most one of them."""

_LONG = {flag.short: name for name, flag in FLAGS.items() if flag.short} | {name: name for name in FLAGS}


class Command(NamedTuple):
    """A command's flags with their values, by long name, and the other words."""

    flags: dict[str, str]
    overrides: list[str]

    def directory(self, flag: str) -> str | None:
        """The absolute path of the directory that `flag` names. Raises Refusal where there is none."""
        if flag not in self.flags:
            return None
        path = os.path.abspath(os.path.expanduser(self.flags[flag]))
        if not os.path.isdir(path):
            raise Refusal(flag, self.flags[flag], "no such directory")
        return path

    @property
    def config_name(self) -> str:
        """The name of the primary config."""
        return self.flags.get("--config-name", "config").removesuffix(".yaml")


def split(words: Sequence[str]) -> Command:
    """`words` as flags and overrides. Raises Refusal for a flag that does not exist, or that has a wrong value."""
    flags: dict[str, str] = {}
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif name not in _LONG:
            from difflib import get_close_matches

            close = get_close_matches(name, [*FLAGS, "--help", "--version"], n=1)
            raise Refusal(
                name, value, f"no such flag; {f'did you mean {close[0]}?' if close else '--help lists them'}"
            )
        else:
            long = _LONG[name]
            flags[long] = _value(long, value if equals else None, rest)
    commands = [flag for flag in COMMANDS if flag in flags]
    if len(commands) > 1:
        raise Refusal(commands[0], flags[commands[0]], f"not together with {commands[1]}; leave one out")
    return Command(flags, overrides)


def _value(name: str, value: str | None, rest: list[str]) -> str:
    """The value of a flag: after its =, or the next of `rest`, which is taken."""
    flag = FLAGS[name]
    if not flag.choices:
        if value is not None:
            raise Refusal(name, value, "it takes no value; leave it out")
        return ""
    if (
        value is None
        and rest
        and (rest[0] in flag.choices or (flag.choices == ANY and not rest[0].startswith("-")))
    ):
        value = rest.pop(0)
    if value is None:
        value = flag.default
    if value is None and rest and flag.choices != ANY:
        value = rest[0]
    if not value or (flag.choices != ANY and value not in flag.choices):
        wanted = "give a value" if flag.choices == ANY else f"one of {', '.join(flag.choices)}"
        raise Refusal(name, value or "", f"no such value; {wanted}" if value else wanted)
    return value
