"""A checksum of the names, sizes and times of the files in a folder; empty without the folder: listing.py FOLDER."""

import hashlib
import os
import sys
from pathlib import Path

lines = []
for folder, _, names in os.walk(sys.argv[1], followlinks=True):
    for name in names:
        path = Path(folder, name)
        found = path.stat()
        lines.append(f"{path.relative_to(sys.argv[1])} {found.st_size} {int(found.st_mtime)}")
print(hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest() if lines else "")
