"""The one error that trainers raise for what a user gave them: data, rewards, settings."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used. The message names the place; ``field`` is the setting it came from, whose place the command line knows."""

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field

    def at(self, places: dict[str, str]) -> InputError:
        """The same, with the place where ``field`` was set in front: a flag of the command line, or file and line."""
        return InputError(f"{places.get(self.field, self.field)}: {self}" if self.field else str(self))
