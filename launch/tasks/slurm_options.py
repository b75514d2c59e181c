"""What a site's SLURM asks of a job: options of sbatch from the command line and from a site's profile.

The profile `~/.config/cfusion/cluster.yaml` holds them once for everything that is submitted; the command line
overrides it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from cfusion.config import Section, validate
from cfusion.errors import ConfigError
from cfusion.yaml_files import read_yaml

PROFILE = Path("cfusion") / "cluster.yaml"
_BY_OPTION = {
    "time": "--hours", "cpus-per-task": "--cpus", "gpus-per-node": "--gpus", "mem": "--mem", "nodes": "--nodes",
    "job-name": "--name", "array": "--max-parallel and --chunk",
}  # fmt: skip
"""Options of sbatch that follow from options of this program; not every command has each."""
_ANSWER_SECONDS = 30.0

OptionsT = TypeVar("OptionsT", bound="SlurmQueueOptions")


@dataclass(frozen=True)
class SlurmQueueOptions:
    """What differs from cluster to cluster.

    Attributes:
        partition: Partition; None: the default one.
        account: Account that is charged.
        extra: Further options of sbatch, such as `{"mem": "0", "requeue": ""}`; an empty value is a bare flag.
        setup: Lines of shell before the work, such as `module load cuda`.
        qos: Quality of service.
        constraint: Features that a node must have.
        exclusive: Whether to ask for nodes that no other job shares.
    """

    partition: str | None = None
    account: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    qos: str | None = field(default=None, kw_only=True)
    constraint: str | None = field(default=None, kw_only=True)
    exclusive: bool = field(default=False, kw_only=True)

    def directives(self, own: Mapping[str, str]) -> dict[str, str]:
        """Return the options of sbatch in addition to those of the plan, `own`; an empty value is a bare flag.

        Raises:
            ConfigError: An option breaks out of its line, is no option, or belongs to the plan.
        """
        named = {key: getattr(self, key) for key in ("partition", "account", "qos", "constraint")}
        chosen = {key: value for key, value in named.items() if value} | ({"exclusive": ""} if self.exclusive else {})
        for key, value in self.extra.items():
            if not re.fullmatch(r"[a-z][a-z-]*", key):
                raise ConfigError(f"--sbatch {key}={value}: {key!r} is not an option of sbatch.", "Such as: mem=64G.")
            if key in own:
                raise ConfigError(f"--sbatch {key}={value}: {key} follows from the plan.", _instead(key))
            if chosen.get(key, value) != value:
                raise ConfigError(f"--sbatch {key}={value}: {key} is also given as {chosen[key]!r}.", "Give one.")
            chosen[key] = value
        return {key: one_line(f"--sbatch {key}", value) for key, value in chosen.items()}

    def setup_lines(self) -> list[str]:
        """Return the lines of shell before the work; one that fails ends the job with 2, before hours are spent.

        Raises:
            ConfigError: One of them has a line break.
        """
        lines: list[str] = []
        for line in self.setup:
            failed = shlex.quote(f"error: --setup {one_line('--setup', line)!r} failed.")
            remedy = "'Mend it, or append || true if that does not matter.'"
            lines += [line, f'[ "$?" -eq 0 ] || {{ echo {failed} {remedy} >&2; exit {ConfigError.exit_code}; }}']
        return lines

    def over_profile(self: OptionsT) -> OptionsT:
        """Return these options, and those of the site's profile where they say nothing; setup lines of both."""
        profile = read_profile()
        if profile is None:
            return self
        values: dict[str, Any] = {
            key: getattr(self, key) or getattr(profile, key) for key in ("partition", "account", "qos", "constraint")
        }
        extra = {key: value or "" for key, value in profile.sbatch.items()} | dict(self.extra)
        return replace(
            self, **values, exclusive=self.exclusive or profile.exclusive, extra=extra,
            setup=(*profile.setup, *self.setup),
        )  # fmt: skip


class ClusterProfile(Section):
    """A site's options for SLURM, in `~/.config/cfusion/cluster.yaml`; the command line overrides them."""

    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that a node must have."""
    exclusive: bool = False
    """Whether to ask for nodes that no other job shares."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the work, such as `module load cuda`."""
    sbatch: dict[str, str | None] = Field(default_factory=dict)
    """Further options of sbatch, as KEY: VALUE; a bare flag has no value."""


def _instead(key: str) -> str:
    """Return what to do where an option of sbatch is not free."""
    return f"Give {_BY_OPTION[key]} instead." if key in _BY_OPTION else "Leave it out: the job needs it as it is."


def profile_path() -> Path:
    """Return where the site's profile is."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / PROFILE


def read_profile() -> ClusterProfile | None:
    """Read the site's profile; None without one.

    Raises:
        ConfigError: It cannot be read, or has an unknown key.
    """
    path = profile_path()
    return validate(ClusterProfile, read_yaml(path), str(path)) if path.is_file() else None


def parse_sbatch(options: Sequence[str]) -> dict[str, str]:
    """Return `KEY=VALUE` and bare flags as options; a leading `--` may be there."""
    pairs = (option.removeprefix("--").partition("=") for option in options)
    return {key: value for key, _, value in pairs}


def one_line(option: str, value: str) -> str:
    """Return the value, refused where it would break out of its line of a script.

    Raises:
        ConfigError: It has a line break.
    """
    if re.search(r"[\r\n\0]", value):
        raise ConfigError(f"{option}: {value!r} holds a line break.")
    return value


def most_cores(partition: str | None) -> int | None:
    """Return the cores of the largest node of a partition, None: of the default one; None if SLURM does not say."""
    if shutil.which("sinfo") is None:
        return None
    command = ["sinfo", "--noheader", "--format=%P %c", *([f"--partition={partition}"] if partition else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 2]
    # The default partition has a star, and 64+ means that some nodes have more.
    wanted = [cores for name, cores in rows if partition or name.endswith("*")] or [cores for _, cores in rows]
    found = [int(cores.rstrip("+")) for cores in wanted if cores.rstrip("+").isdigit()]
    return max(found, default=None)
