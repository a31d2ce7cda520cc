# What lem has on this host, as checksums and lines of name=value: look.sh USER CONFIG_DIR FILE…
user=$1 config_dir=$2
shift 2
sha256sum -- "$@" 2>/dev/null
stat -c 'mode=%a %U %G %n' -- "$@" 2>/dev/null
[ -d "$config_dir/campaigns" ] && echo "campaigns=yes"
echo "groups=$(id -nG "$user" 2>/dev/null)"
[ -e /etc/tmpfiles.d/lem-rapl.conf ] && echo "rapl=yes"
systemctl list-units --plain --no-legend --state=active,activating,deactivating 'lem-campaign@*.service' 2>/dev/null \
  | grep -q . && echo "running=yes"
exit 0
