"""``rlkern <command>``: the trainers on the command line. What a user gave wrong is one line and exit code 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "grpo": "train a language model by GRPO on prompts and a reward function; without arguments, a built-in task",
    "ppo": "train a language model by PPO, with a critic, on prompts and a reward model or function; without arguments, the built-in task",
    "reward": "train a reward model on preferences between answers; without arguments, those of the built-in task",
}
USAGE = "usage: rlkern <command> [--help] [settings]\n\n" + "\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"rlkern: error: no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        trainer = importlib.import_module(f"rlkern.trainers.{command}")
        from rlkern.trainers.errors import InputError
    except ImportError as error:
        print(f"rlkern {command}: error: {error}; what the trainers need comes with: pip install 'rlkern[train]'", file=sys.stderr)
        return 2
    if "" not in sys.path:
        sys.path.insert(0, "")  # reward modules beside the user, as with python -m
    try:
        trainer.main(rest)
    except InputError as error:
        print(f"rlkern {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rlkern {command}: interrupted", file=sys.stderr)
        return 130
    return 0
