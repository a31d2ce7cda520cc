"""The worker: `lem worker` is a supervisor, and starts `lem worker --engine` itself."""

from __future__ import annotations

from lem.experiment.guardian import start_guarded

__all__ = ["run_engine_process", "run_supervisor"]


def run_supervisor() -> int:
    """The exit code of a worker whose channel is stdin and stdout."""
    from lem.experiment.supervisor import supervise

    return supervise()


def run_engine_process(control_fd: int, message_fd: int) -> int:
    """The exit code of an engine process that was given the descriptors of its supervisor's pipes."""
    start_guarded(control_fd, message_fd)
    # Imported after the fork: the guardian stays small.
    from lem.experiment.engine_process import serve_pipes

    return serve_pipes(control_fd, message_fd)
