#!/usr/bin/env bash
# One machine:  launch/local.sh RUN.toml [options of `titan run`]
# A second call goes on where the first one ended.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

titan=${TITAN:-$here/../.venv/bin/titan}  # TITAN names another one
[ -x "$titan" ] || titan=$(command -v titan) || {
  echo "local.sh: no titan: run \`make install\`, put it on the PATH, or set TITAN to its path" >&2
  exit 1
}
[ $# -gt 0 ] || {
  echo "local.sh: which run? launch/local.sh RUN.toml [options of \`titan run\`]" >&2
  exit 2
}
exec "$titan" run "$@" --resume
