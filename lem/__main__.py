"""Start of the program.

Everything here can be read by Python 2.7, so that an old Python says in one line what is missing instead of
pointing at syntax that it does not know. Nothing else is imported before that is checked.
"""

import sys

OLDEST_PYTHON = (3, 10)


def run():
    # type: () -> int
    if sys.version_info < OLDEST_PYTHON:
        found, oldest = "%d.%d" % sys.version_info[:2], "%d.%d" % OLDEST_PYTHON
        sys.stderr.write("lem needs Python %s or newer; this is Python %s (%s)\n" % (oldest, found, sys.executable))
        return 2
    if sys.argv[1:] == ["worker", "--load"]:  # started with every server, and needs nothing of the command line
        from lem.engines.server.loop import serve_pipes

        return serve_pipes()
    from lem.cli.main import main

    return main(sys.argv[1:], sys.stdout, sys.stderr)


if __name__ == "__main__":
    sys.exit(run())
