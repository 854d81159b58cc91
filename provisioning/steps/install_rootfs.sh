#!/usr/bin/env bash
# Bake step: copy rootfs/ to / with root as the owner. Files that start with #! get mode 0755, all others get mode 0644.
set -euo pipefail

cd /tmp/mlflow-host-bake/rootfs
find . -name __pycache__ -prune -exec rm -rf {} +

while IFS= read -r -d '' file; do
  mode=0644
  if [ "$(head -c 2 "$file" | tr -d '\0')" = '#!' ]; then mode=0755; fi
  # The option -D creates missing directories, but does not change the mode of existing directories.
  install -D -o root -g root -m "$mode" "$file" "/${file#./}"
done < <(find . -type f -print0)

# Write the status page that nginx serves before the first boot step begins.
/opt/mlflow/bin/python -m mlflow_host.machine.status

shipped() { find "$1" -maxdepth 1 -type f -name "$2" -printf '%f\n' 2>/dev/null | sort; }

mapfile -t names < <(shipped usr/lib/sysusers.d '*.conf')
if [ ${#names[@]} -gt 0 ]; then systemd-sysusers "${names[@]}"; fi
mapfile -t names < <(shipped usr/lib/tmpfiles.d '*.conf')
if [ ${#names[@]} -gt 0 ]; then systemd-tmpfiles --create "${names[@]}"; fi

/opt/mlflow/bin/python -m compileall -q -j 0 /usr/lib/mlflow-host

sshd -t

systemctl daemon-reload
systemctl enable --quiet mlflow-host.target
mapfile -t names < <(shipped usr/lib/systemd/system 'mlflow-*')
systemd-analyze verify --recursive-errors=no "${names[@]/#//usr/lib/systemd/system/}"

# Start the server process on a temporary database, in the same way as at boot. The bake fails only if the server cannot
# answer requests. Features that this MLflow release does not support are recorded in fallbacks.json. record_facts.py
# copies them to image.json.
/opt/mlflow/bin/python -W ignore -m mlflow_host.bake.check_release

# Dump an empty database with this release's schema, so that no boot has to run the migrations on an empty database.
(cd / && runuser -u postgres -- /opt/mlflow/bin/python -m mlflow_host.bake.empty_database /tmp/mlflow-host-blank.dump)
install -o root -g root -m 0644 /tmp/mlflow-host-blank.dump /usr/share/mlflow-host/blank.dump
rm /tmp/mlflow-host-blank.dump

# Write the list of POST routes that readers may use, and the list of all routes for the audit trail. reader_routes.py
# lists the reading and the writing POST routes. A POST route that is in neither list is closed to readers.
/opt/mlflow/bin/python -W ignore -m mlflow_host.bake.reader_routes --write /usr/share/mlflow-host/reader-posts.map \
  --routes /usr/share/mlflow-host/routes.json
