"""Entry point of lem.pyz. Old Pythons must be able to parse it: lem/__main__.py rejects them."""

import sys
import zipimport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType  # noqa: F401 - in a comment that every Python can parse

_ARCHIVE = sys.path[0]


class Importer(zipimport.zipimporter):
    """Compiles each module once. Python's own importer does it twice: for the module's file name, and to run it."""

    def get_filename(self, fullname):
        # type: (str) -> str
        self._codes = {fullname: zipimport.zipimporter.get_code(self, fullname)}
        return str(self._codes[fullname].co_filename)

    def get_code(self, fullname):
        # type: (str) -> CodeType
        codes = self.__dict__.pop("_codes", {})
        return codes.get(fullname) or zipimport.zipimporter.get_code(self, fullname)


def _importer_of(path):
    # type: (str) -> Importer
    if not path.startswith(_ARCHIVE):
        raise ImportError(path)
    return Importer(path)


if hasattr(zipimport.zipimporter, "find_spec"):  # Python 3.10 or newer
    sys.path_hooks.insert(0, _importer_of)
    sys.path_importer_cache.pop(_ARCHIVE, None)

from lem.__main__ import run  # noqa: E402 - imported by the importer above

sys.exit(run())
