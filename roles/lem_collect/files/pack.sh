# Pack the results of a campaign, and print the checksum and the path of the archive: pack.sh FOLDER
# The same results give the same bytes. If a running campaign adds files meanwhile, tar exits with 1.
[ -d "$1/results" ] || exit 0
scratch=$(mktemp -d "${TMPDIR:-/tmp}/lem-collect-XXXXXXXX") || exit 2
tar --create --gzip --file="$scratch/results.tar.gz" --directory="$1" --sort=name --mtime=@0 --owner=0 --group=0 \
  --numeric-owner --mode=a+rX --exclude='.lem-tmp-*' results
code=$?
if [ "$code" -gt 1 ]; then
  rm -rf "$scratch"
  exit "$code"
fi
sha256sum -- "$scratch/results.tar.gz"
