#!/usr/bin/env bash
# The recipes whose packages the project's environment is made without, in that environment: torchtitan, ray.
set -euo pipefail
cd "$(dirname "$0")/.."

install() { .venv/bin/pip install -q -c constraints.txt "$@"; }
for name in "${@:-torchtitan}"; do
  case $name in
    torchtitan) # its checkpoint manager needs none of its datasets and loggers, which ask for another fsspec than ours
      install tyro
      install --no-deps torchtitan spmd_types
      ;;
    ray) install 'ray[train]' ;;
    *) echo "no recipe of this script: $name" >&2; exit 2 ;;
  esac
  .venv/bin/python -c "import $name" # else its tests would be passed over
  SERVERS=moto .venv/bin/python -m pytest "tests/test_$name.py"
done
