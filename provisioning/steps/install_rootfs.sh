#!/usr/bin/env bash
# Installs rootfs/ as it is over /, owned by root: programs (files that start with #!) 0755, everything else 0644.
set -euo pipefail

cd /tmp/mlflow-host-bake/rootfs
find . -name __pycache__ -prune -exec rm -rf {} +

while IFS= read -r -d '' file; do
  mode=0644
  if [ "$(head -c 2 "$file" | tr -d '\0')" = '#!' ]; then mode=0755; fi
  # -D makes missing directories and leaves the mode of existing ones alone.
  install -D -o root -g root -m "$mode" "$file" "/${file#./}"
done < <(find . -type f -print0)

# What nginx shows before a boot has begun is the page of a boot, with nothing done.
/opt/mlflow/bin/python -m mlflow_host.status

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

# MLflow's application is started as the boot will start it, once, on a database of its own.
/opt/mlflow/bin/python -m mlflow_host.server --check
/opt/mlflow/bin/python -W ignore -c "from mlflow_host.garbage.removal import check_release; check_release()"

# The schema that this release builds, so that no boot runs its migrations for an empty database.
(cd / && runuser -u postgres -- /opt/mlflow/bin/python -m mlflow_host.schema.blank /tmp/mlflow-host-blank.dump)
install -o root -g root -m 0644 /tmp/mlflow-host-blank.dump /usr/share/mlflow-host/blank.dump
rm /tmp/mlflow-host-blank.dump

# What a reader may POST follows from this release's own routes; one that nobody has classified ends the bake here.
/opt/mlflow/bin/python -W ignore -m mlflow_host.routes --write /usr/share/mlflow-host/reader-posts.map
