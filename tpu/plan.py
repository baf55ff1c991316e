"""What a launch would do: files, then commands. Printed as a bash script that does the same, or done."""

import dataclasses
import shlex
import subprocess
from pathlib import Path

END = "END_OF_FILE"  # no line of our files is this: what users add to them stands within longer lines


class LaunchError(RuntimeError):
    """A command that failed, in one line: nothing after it was run."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A program and its arguments, and what they are for.

    may_fail: where nothing is there to be removed, say: its failure stops nothing.
    """

    why: str
    arguments: tuple[str, ...]
    may_fail: bool = False

    @property
    def line(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.arguments) + " || true" * self.may_fail


@dataclasses.dataclass(frozen=True)
class Plan:
    """Files that are written here, then commands in order, with what the user should know first.

    files: text by path, relative to where the launcher is called.
    """

    notes: tuple[str, ...]
    files: dict[Path, str]
    commands: tuple[Command, ...]

    def script(self) -> str:
        """All of it as a bash script. What it prints, `perform` does."""
        lines = ["#!/bin/bash", *(f"# {note}" for note in self.notes), "set -e"]
        for path, text in self.files.items():
            quoted = shlex.quote(str(path))
            lines += ["", f"mkdir -p {shlex.quote(str(path.parent))}", f"cat > {quoted} <<'{END}'", text + END]
        for command in self.commands:
            lines += ["", f"# {command.why}", command.line]
        return "\n".join(lines) + "\n"

    def perform(self) -> None:
        """Writes the files and runs the commands, each said before it runs. LaunchError at the first that fails."""
        for path, text in self.files.items():
            print(f"writing {path}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for command in self.commands:
            print(f"\n{command.why}\n+ {command.line}", flush=True)
            try:
                status = subprocess.run(command.arguments).returncode
            except FileNotFoundError as error:
                program = command.arguments[0]
                raise LaunchError(f"there is no {program} on this machine: see tpu/README.md, What you need") from error
            if status and not command.may_fail:
                raise LaunchError(f"exit status {status} of: {command.line}; nothing after it was run")
