"""Entry point of lem.pyz. Old Pythons must be able to parse it: lem/__main__.py rejects them."""

import contextlib
import sys

from lem import __main__

if sys.version_info < __main__.OLDEST_PYTHON:
    sys.exit(__main__.run())

from lem.base import importer

cache = importer.install(sys.path[0])
code = __main__.run()
with contextlib.suppress(KeyboardInterrupt):  # the command is done
    cache.save()
sys.exit(code)
