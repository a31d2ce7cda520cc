"""A checksum of the names, sizes and times of the files in a folder; empty without the folder: listing.py FOLDER."""
import hashlib
import os
import sys

lines = []
for folder, _, names in os.walk(sys.argv[1], followlinks=True):
    for name in names:
        path = os.path.join(folder, name)
        found = os.stat(path)
        lines.append("%s %d %d" % (os.path.relpath(path, sys.argv[1]), found.st_size, found.st_mtime))
print(hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest() if lines else "")
