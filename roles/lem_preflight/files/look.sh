# Why this host is not fit, as lines of problem=TEXT and warning=TEXT; nothing is changed.
# look.sh PYTHON DISTRIBUTIONS STATE_DIR STATE_MIB DOCKER_DIR IMAGES_MIB GPU_RUNTIME REFUSE_RUNNING EXCEPT
python=$1 distributions=$2 gpu_runtime=$7 refuse_running=$8 except=$9

. /etc/os-release
case " $distributions " in
  *" $ID "*) ;;
  *) echo "warning=$ID $VERSION_ID is an unknown distribution; known are $distributions" ;;
esac

init=$(cat /proc/1/comm)
[ "$init" = systemd ] || echo "problem=campaigns run as systemd units, but PID 1 here is $init"

version=$("$python" -I -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
case $version in
  "") found="does not run here" ;;
  [012].* | 3.[0-9] | 3.[0-9].*) found="is $version" ;;
  *) found= ;;
esac
[ -z "$found" ] || echo "problem=lem needs Python 3.10 or newer; lem_python is $python, which $found" \
  "(Rocky 9: dnf install python3.11, lem_python: /usr/bin/python3.11)"

check_space() {
  path=$1
  while [ ! -d "$path" ]; do path=$(dirname "$path"); done
  free=$(df -Pk "$path" | awk 'NR == 2 { print int($4 / 1024) }')
  [ "$free" -ge "$2" ] || echo "problem=$1: $2 MiB are required, $free MiB are free"
}
check_space "$3" "$4"
check_space "$5" "$6"

if [ "$refuse_running" = yes ]; then
  states=active,activating,deactivating
  running=$(systemctl list-units --plain --no-legend --state=$states 'lem-campaign@*.service' 2>/dev/null \
    | awk -v except="lem-campaign@$except.service" '$1 != except { printf "%s%s", separator, $1; separator = ", " }')
  [ -z "$running" ] || echo "problem=a campaign runs here: $running; wait for it, or stop it with playbooks/stop_campaign.yml"
fi

# Where Docker is not installed yet, lem_nvidia checks it later.
if [ "$gpu_runtime" = yes ] && command -v docker >/dev/null && ! ls /etc/cdi/nvidia* /var/run/cdi/nvidia* >/dev/null 2>&1 \
  && ! docker info --format '{{json .Runtimes}}' 2>/dev/null | grep -q '"nvidia"'; then
  echo "problem=containers cannot use a GPU here: Docker has no nvidia runtime and there is no CDI specification;" \
    "install the NVIDIA Container Toolkit, then run playbooks/provision.yml"
fi
exit 0
