"""Command: a script for bash that completes commands, flags, paths and keys of a config.

    python -m dopsd_jax.completion --out ~/.local/share/bash-completion/completions/dopsd

There bash-completion finds it; elsewhere, source it in ~/.bashrc. It is written once, and starts no
Python when it completes. Needs shtab (`pip install -e '.[completion]'`).
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from absl import flags

from dopsd_jax.__main__ import COMMANDS, described
from dopsd_jax.core import cli
from dopsd_jax.core.files import write_atomic
from dopsd_jax.run.keys import KEYS

FLAGS = flags.FLAGS

# bash makes three words of --flag=value, of which shtab's script knows nothing.
EQUALS = """
_dopsd() {
    local words=() cword=0 i
    for i in "${!COMP_WORDS[@]}"; do
        [[ ${COMP_WORDS[i]} == = && $i -ne $COMP_CWORD ]] && continue
        [[ $i -eq $COMP_CWORD ]] && cword=${#words[@]}
        words+=("${COMP_WORDS[i]#=}")
    done
    local COMP_WORDS=("${words[@]}") COMP_CWORD=$cword
    _shtab_dopsd "$1" "${COMP_WORDS[cword]}" "${COMP_WORDS[cword-1]}"
}
complete -o bashdefault -F _dopsd dopsd
"""


def parser() -> argparse.ArgumentParser:
    """All commands with their flags and values, as shtab takes them."""
    whole = argparse.ArgumentParser("dopsd", add_help=False)
    commands = whole.add_subparsers()
    for command in COMMANDS:
        words, _ = described(command)
        one = commands.add_parser(command, description=words, help=words)
        for flag in flags_of(command):
            names = [f"--{flag.name}", *([f"--no{flag.name}"] if flag.boolean else [])]
            choices = getattr(flag.parser, "enum_values", None)
            for name in names:
                _add(one, name, flag.help, flag.boolean, choices)
            if flag.name == "config":
                for key, entry in KEYS.items():
                    choices = ["true", "false"] if isinstance(entry.default, bool) else None
                    _add(one, f"--config.{key}", entry.meaning, False, choices)
    return whole


def flags_of(command: str) -> list[flags.Flag]:
    """The flags that a command defines, by name; none of them stays defined."""
    module = f"dopsd_jax.{'data.__main__' if command == 'data' else command}"
    with cli.flags_of_its_own(module):
        importlib.import_module(module).define_flags()
        return [FLAGS[name] for name in cli.flag_names(FLAGS)]


def _add(one: argparse.ArgumentParser, name: str, words: str, alone: bool, choices) -> None:
    """One flag. Whatever takes a value and is no choice is completed as a path."""
    import shtab

    words = words.replace("%", "%%").partition(";")[0]
    if alone:
        one.add_argument(name, action="store_true", help=words)
    elif choices:
        one.add_argument(name, choices=choices, help=words)
    else:
        one.add_argument(name, help=words).complete = shtab.FILE


def define_flags() -> None:
    """The command's flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("out", None, "Where the script goes.", required=True)


def main() -> None:
    try:
        import shtab
    except ImportError as e:
        raise ValueError(
            f"the script needs the package shtab ({e}): pip install -e '.[completion]'"
        ) from e
    out = Path(FLAGS.out).expanduser()
    cli.check_directory(out.parent)
    script = shtab.complete(parser(), shell="bash") + EQUALS
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, script)
    print(f"{out}; a new shell knows it, or this one after: source {out}")


if __name__ == "__main__":
    define_flags()
    cli.run_command(main)
