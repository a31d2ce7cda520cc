"""Entry point of lem.pyz. Old Pythons must be able to parse it: lem/__main__.py rejects them."""

import contextlib
import gc
import sys
import types
import zipimport

if sys.version_info < (3, 10):  # noqa: UP036 - what lem/base/importer.py needs
    from lem import __main__

    sys.exit(__main__.run())

cache = None
with contextlib.suppress(zipimport.ZipImportError):  # unpacked, lem is imported as any other program
    source = zipimport.zipimporter(sys.path[0] + "/lem/base").get_code("importer")
    # Executed, not imported: an import from a zip compiles a module twice, of which this one should save the others.
    importer = types.ModuleType("lem.base.importer")
    sys.modules[importer.__name__] = importer
    exec(source, vars(importer))  # noqa: S102 # nosec B102
    cache = importer.install(sys.path[0])

from lem import __main__  # noqa: E402

code = __main__.run()
if cache:
    with contextlib.suppress(KeyboardInterrupt):  # the command is done
        cache.save()
if sys.argv[1:2] != ["worker"]:  # an engine may have something to clean up
    gc.freeze()  # else Python looks for garbage several times as it ends
sys.exit(code)
