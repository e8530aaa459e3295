#!/usr/bin/env bash
# Several machines by MPI, without ssh of our own:
#   launch/mpi.sh [options of mpirun] -- RUN.toml [options of `titan run`]
#   launch/mpi.sh -hosts a,b,c -ppn 1 -- configs/quickstart.toml
# The same Python environment and run folder must be at the same path on every machine.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python=${PYTHON:-$here/../.venv/bin/python}  # PYTHON names another one, with titan and mpi4py
[ -x "$python" ] || python=$(command -v python3) || {
  echo "mpi.sh: no Python: run \`make install\`, or set PYTHON to one that has titan and mpi4py" >&2
  exit 1
}
mpirun=${MPIRUN:-$(dirname "$python")/mpirun}
[ -x "$mpirun" ] || mpirun=$(command -v mpirun) || {
  echo "mpi.sh: no mpirun: \`pip install mpich\`, load your cluster's MPI, or set MPIRUN to its path" >&2
  exit 1
}
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
[ $# -gt 1 ] || {
  echo "mpi.sh: which run? launch/mpi.sh [options of mpirun] -- RUN.toml [options of \`titan run\`]" >&2
  exit 2
}
shift
exec "$mpirun" "${options[@]}" "$python" "$here/mpi_cluster.py" "$@"
