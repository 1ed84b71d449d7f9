"""`python -m cantata.torchrun ARGUMENTS`: torchrun, which knows what a run's exit codes mean.

It takes torchrun's arguments and starts processes as torchrun does. Of its own:

- A run that was preempted (75), or whose configuration is wrong (2), is not started again, whatever
  `--max-restarts` says, and its code is the launcher's. Plain torchrun ends with 1 after both.
- SIGTERM and SIGUSR1 are passed on to the workers, which save and end; a second SIGTERM gives them 30
  seconds. Plain torchrun does that at the first one, and dies of SIGUSR1, leaving them without a launcher.
- Processes that are started again never meet the addresses of those before them.
- A SIGUSR1 that comes while a worker still imports its libraries is held back until the worker can note it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

if __name__ == "__main__":
    # First of all: importing torch takes seconds. Workers inherit the mask and lift it (`StopRequest`).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from cantata.core.errors import PREEMPTED, ConfigError

FINAL = (PREEMPTED, ConfigError.exit_code)
"""Exit codes of a worker that starting it again would not change for the better."""
TERMINATED = 128 + signal.SIGTERM

_PARTING_SECONDS = 1.0
"""The first launcher to leave takes the store of all with it; others look after their workers every 0.1 s."""


class Agent(LocalElasticAgent):
    """Starts and watches the workers of one machine."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._terminated = False
        signal.signal(signal.SIGTERM, self._terminate)
        threading.Thread(target=self._pass_on_usr1, daemon=True).start()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        codes = {failure.exitcode for failure in result.failures.values()}
        final = next((code for code in FINAL if code in codes), None)
        if final is None and codes and self._terminated:
            final = TERMINATED
        if final is not None:
            time.sleep(_PARTING_SECONDS)
            raise SystemExit(final)
        return result

    def _terminate(self, number: int, frame: Any) -> None:
        if self._pcontext is None or self._terminated:
            raise SystemExit(TERMINATED)  # Workers that are left have 30 seconds.
        self._terminated = True
        self._tell_workers(signal.SIGTERM)

    def _pass_on_usr1(self) -> None:
        while True:
            self._tell_workers(signal.sigwait({signal.SIGUSR1}))

    def _tell_workers(self, number: int) -> None:
        for pid in self._pcontext.pids().values() if self._pcontext is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def main(argv: Sequence[str] | None = None) -> None:
    """Start workers and wait for them; leaves by `SystemExit` with their code where it is one of `FINAL`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    # The launcher offers no other way to choose the agent, and would install its own handler of SIGTERM.
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    # Else processes that are started again meet in the store of those before them, find the addresses that
    # these left, and wait for the dead. So each start has a store of its own, in its rank 0.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    given = list(sys.argv[1:] if argv is None else argv)
    if "--standalone" in given:
        # The machine's own name need not resolve.
        given.insert(0, "--local-addr=localhost")
    run.main(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *given])


if __name__ == "__main__":
    main()
