# A reload removes GPUs from containers that use the legacy hook, so never during a campaign.
running=$(systemctl list-units --plain --no-legend --state=active,activating,deactivating 'lem-campaign@*.service')
if [ -n "$running" ]; then
  echo "systemd must be reloaded, but a campaign runs here: $running" >&2
  exit 1
fi
systemctl daemon-reload
