"""The frame of every command: flags in, and one plain line where the user's input is at fault."""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict

from dopsd_jax.core import distributed
from dopsd_jax.core.checks import path_problem
from dopsd_jax.core.log import show

# Of a GPU's memory what JAX takes when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says
# otherwise. Its own default, three quarters, leaves too little of a card of 24 GB.
MEM_FRACTION = "0.92"
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
HELP = {"--help", "-help", "--helpshort", "-h", "-?"}
# What stands above the flags that a module defines for several commands, by its last name.
HEADINGS = {
    "model": "how the model is read", "metric_weights": "metrics",
    "distributed": "several processes",
}


def run_command(
    main: Callable[[], None], *, errors: tuple[type[Exception], ...] = ()
) -> None:
    """Parses the flags, runs `main` and exits.

    ValueError and OSError, whose messages are written for users, and `errors` end the command
    with "error: .." and status 1. Anything else is a fault of the program and keeps its traceback.
    """
    def guarded(argv: Sequence[str]) -> None:
        show()
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected arguments {argv[1:]}; is a text not quoted?")
            distributed.skip_missing_tpu()
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEM_FRACTION)
            collect_garbage_seldom()
            main()
        except (ValueError, OSError, *errors) as e:
            raise SystemExit(f"error: {e}") from e

    app.run(guarded, flags_parser=parse_flags)


def collect_garbage_seldom() -> None:
    """Has Python look for unreachable cycles less often, and not among what was imported.

    Tracing a network makes millions of objects that live on; looking through them again and again
    took a tenth of the time of a short run.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def run_module(module: str, *argv: str) -> None:
    """Runs another command of the project in this process, shown first, as a user would type it.

    It finds imported, traced and compiled what the commands before it needed as well. What its
    `main` raises is raised here.

    Args:
        module: Its name, such as dopsd_jax.train.
        argv: Its flags.
    """
    print(f"\n$ python -m {shlex.join([module, *argv])}", flush=True)
    command = importlib.import_module(module)
    with flags_of_its_own(module, *argv):
        command.define_flags()
        parse_flags(sys.argv)
        command.main()


@contextlib.contextmanager
def flags_of_its_own(*argv: str) -> Iterator[None]:
    """Sets this command's flags aside, and its sys.argv, for as long as another command runs."""
    values = flags.FLAGS
    # Flags of libraries stay: they are defined where a library is imported, once.
    ours, given = _own_flags(values), sys.argv
    for _, flag in ours:
        delattr(values, flag.name)
    sys.argv = list(argv)
    try:
        yield
    finally:
        for _, flag in _own_flags(values):
            delattr(values, flag.name)
        sys.argv = given
        for module, flag in ours:
            flags.DEFINE_flag(flag, module_name=module)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flags; what is wrong with them, --config's file and keys included, ends the command.

    Returns:
        What is no flag, the program's name first.
    """
    values = flags.FLAGS
    try:
        if HELP & set(argv[1:]):
            print(help_text(values))
            raise SystemExit(0)
        expanded = values.read_flags_from_files(list(argv), force_gnu=False)
        if "config" in values:
            check_config_flags(expanded)
        rest = values(argv)  # also makes flags of the config's keys that are given
        check_given_once(expanded, values)
        return rest
    except flags.UnrecognizedFlagError as e:
        raise SystemExit(f"error: {unknown_flags(expanded, values) or e}") from e
    except flags.IllegalFlagValueError as e:
        missing = re.findall(r"Flag (--\w+) must have a value other than None", str(e))
        words = "\n  ".join(f"{flag} is needed; --help says what it is" for flag in missing)
        raise SystemExit(f"error: {words or str(e) + _expected_type(str(e))}") from e
    except (flags.Error, ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from e


def help_text(values: flags.FlagValues) -> str:
    """What a command is for, with examples, and its flags, those of several commands by heading."""
    doc = (sys.modules["__main__"].__doc__ or "").strip()
    groups = {"flags": values.main_module_help()}
    for module in sorted(values.flags_by_module_dict()):
        if module.startswith("dopsd_jax.") and (text := values.module_help(module)):
            groups[HEADINGS.get(module.rpartition(".")[2], module)] = text
    parts = [re.sub(r"(?<=\S) {2,}(?=--)", " \\\\\n        ", doc)]
    # Each begins with the module's name, which says nothing to a user.
    parts += [f"{title}:\n{text.strip().partition(chr(10))[2]}" for title, text in groups.items()]
    if "config" in values:
        parts.append(
            "keys of the config:\n  --config.KEY=VALUE sets one, as --config.seed=1 and "
            "--config.lora.rank=32.\n  docs/keys.md has all of them, and so has: "
            "python -m dopsd_jax.run.keys"
        )
    return "\n\n".join(parts)


def flag_names(values: flags.FlagValues) -> list[str]:
    """The flags of a command itself, without those of absl and other libraries."""
    return sorted(flag.name for _, flag in _own_flags(values) if "." not in flag.name)


def _own_flags(values: flags.FlagValues) -> list[tuple[str, flags.Flag]]:
    """(module, flag) of what modules of this package define, and of --config's keys."""
    return [
        (module, flag) for module, found in values.flags_by_module_dict().items() for flag in found
        if module == sys.argv[0] or module.startswith("dopsd_jax.")
        or flag.name.startswith("config.")
    ]


def unknown_flags(argv: Sequence[str], values: flags.FlagValues) -> str:
    """Says of every unknown flag which may be meant: one of the command's, or a config's key."""
    known = {name: f"--{name}" for name in flag_names(values)}
    if "config" in values and values["config"].value is not None:
        known |= {key: f"--config.{key}" for key in config_keys(values["config"].value)}
    problems = []
    for name, _ in given_flags(argv, values, unknown=True):
        near = _near(name.replace("-", "_").lower(), list(known))
        hint = f"did you mean {' or '.join(known[k] for k in near)}? " if near else ""
        problems.append(f"--{name}: no such flag; {hint}--help lists all")
    return "\n  ".join(problems)


def check_given_once(argv: Sequence[str], values: flags.FlagValues) -> None:
    """Refuses a flag that takes one value and is given twice, of which absl would take the last.

    Args:
        argv: The command line, the program's name first.
        values: The flags there are, the config's keys among them.

    Raises:
        ValueError: With every such flag and all that is given for it.
    """
    given: dict[str, list[str]] = {}
    for name, value in given_flags(argv, values):
        if not isinstance(values[name], flags.MultiFlag):
            given.setdefault(values[name].name, []).append(value)
    problems = [
        f"--{name} takes one value and is given {len(all_values)}: {', '.join(all_values)}; "
        "give it once"
        for name, all_values in given.items() if len(all_values) > 1
    ]
    if problems:
        raise ValueError("\n  ".join(problems))


def given_flags(
    argv: Sequence[str], values: flags.FlagValues, *, unknown: bool = False
) -> Iterator[tuple[str, str]]:
    """(name, value) of what a command line gives, as far as absl reads flags.

    Args:
        argv: The command line, the program's name first.
        values: The flags there are, the config's keys among them.
        unknown: Yield what is no flag in place of what is one.
    """
    waiting = iter(argv[1:])
    for arg in waiting:
        if not arg.startswith("-") or arg in ("-", "--"):
            return  # absl too reads no flag beyond these
        name, equals, value = arg.lstrip("-").partition("=")
        if name not in values and name[:2] == "no" and name[2:] in values:
            name, equals, value = name[2:], "=", "false"
        if name not in values:
            # --undefok, which absl handles itself, allows other names.
            if unknown and name != "undefok":
                yield name, value
            continue
        if not equals:
            value = "true" if values[name].boolean else next(waiting, "")
        if not unknown:
            yield name, value


def _expected_type(message: str) -> str:
    """What a value of the config must be, for a message that says that it is something else."""
    match = re.match(r"flag --config\.([\w.]+)=", message)
    if not match:
        return ""
    value = config_keys(load_config(flags.FLAGS["config"].config_filename))[match[1]]
    return f"; expected {type(value).__name__}, such as {value!r}"


def check_config_flags(argv: Sequence[str]) -> None:
    """Refuses a config file that cannot be run, and every --config.KEY that it does not have.

    config_flags itself answers either with a traceback.

    Raises:
        ValueError: With the nearest keys there are.
    """
    given = [m[1] for arg in argv[1:] if (m := OVERRIDE.match(arg))]
    path = None
    for i, arg in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", arg, re.S):
            path = match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
    if path is None:
        if given:
            raise ValueError(f"--config.{given[0]} needs --config FILE before it")
        return
    known = config_keys(load_config(path))
    problems = [
        f"--config.{key}: no such key; {_nearest(key, known)}see docs/keys.md"
        for key in dict.fromkeys(given) if key not in known
    ]
    if problems:
        raise ValueError("\n  ".join(problems))


def _nearest(key: str, known: Sequence[str]) -> str:
    """"did you mean A or B? " of the known keys that `key` may stand for; "" for none."""
    near = _near(key, known)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _near(key: str, known: Sequence[str]) -> list[str]:
    """The known names that may be meant: itself, its own keys, by its initials, alike."""
    if key in known:
        return [key]
    inside = [k for k in known if k.startswith(f"{key}.")]
    initials = [k for k in known if "".join(w[0] for w in re.split(r"[._]", k)) == key]
    return list(dict.fromkeys(inside or initials + difflib.get_close_matches(key, known, n=3)))


def config_keys(config: ConfigDict) -> dict[str, object]:
    """{"seed": 30, "lora.rank": 64, ..}: every key that holds a value, with it."""
    keys: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            keys |= {f"{key}.{k}": v for k, v in config_keys(value).items()}
        else:
            keys[key] = value
    return keys


def load_config(path: str, *, flag: str = "config") -> ConfigDict:
    """The config of a file with a function get_config().

    Args:
        path: "FILE" or "FILE:ARGUMENT", where the argument is handed to get_config.
        flag: The flag that names the file, for errors.

    Raises:
        ValueError: No such file, or whatever goes wrong in it, with the line.
    """
    file, *argument = path.split(":", 1)
    if not Path(file).is_file():
        raise ValueError(
            f"--{flag} {file}: no such file; take one of configs/, such as configs/tiny.py"
        )
    try:
        get_config = runpy.run_path(file).get("get_config")
        config = get_config(*argument) if callable(get_config) else None
    except Exception as e:  # the file is the user's program: any error in it is the user's to see
        hint = ""
        if isinstance(e, ModuleNotFoundError) and str(e.name).split(".")[0] == "configs":
            hint = "; run the command in the folder that holds configs/"
        where = _line_in(file, e)
        raise ValueError(f"--{flag} {file}{where}: {type(e).__name__}: {e}{hint}") from e
    if not callable(get_config):
        raise ValueError(
            f"--{flag} {file}: has no get_config(), which should return a config made from "
            "configs.common.base()"
        )
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--{flag} {file}: get_config() should return a ConfigDict made from "
            f"configs.common.base(), it returned {type(config).__name__}"
        )
    return config


def _line_in(file: str, error: Exception) -> str:
    """", line N": where in `file` an error came up."""
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    return f", line {frames[-1]}" if frames else ""


def check_kind(config: ConfigDict, example: str, *keys: str) -> None:
    """Makes sure that a config is one for this command, not for another.

    Args:
        config: As given.
        example: A config file of the command.
        *keys: That configs of the command have.

    Raises:
        ValueError: Some of them are missing.
    """
    if missing := [key for key in keys if key not in config]:
        raise ValueError(f"--config: expected a config of this command, such as {example}, got one "
                         f"without {', '.join(missing)}")


def check_directory(path: str | Path) -> None:
    """Makes sure that `path` is a directory that can be written, or could be made one.

    Makes nothing: to be called before long work whose result goes there.

    Raises:
        ValueError: A file is in the way, writing is not permitted, or no path is like that.
    """
    if problem := path_problem(str(path)):
        raise ValueError(f"{path!s:.60}..: {problem}")
    path = Path(path).absolute()
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        wanted = "" if existing == path else f" for {path}"
        found = "a file" if existing.exists() else "a link to nothing"
        raise ValueError(f"{existing}: expected a directory{wanted}, found {found}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing}: no permission to write here")
