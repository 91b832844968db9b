#!/usr/bin/env bash
# The store's tests with the oldest aiobotocore, in a virtual environment of their own, without torch.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-aiobotocore-oldest
oldest=tests/aiobotocore-oldest.txt
if [ ! -e $venv/ready ] || [ $oldest -nt $venv/ready ] || [ constraints.txt -nt $venv/ready ]; then
  "${PYTHON:-python3}" -m venv --clear $venv
  names=$(sed -n 's/==.*//p' $oldest | paste -sd '|')
  grep -vE "^($names|torch)==" constraints.txt >$venv/constraints.txt
  $venv/bin/pip install -q -c $venv/constraints.txt -r $oldest \
    awscrt click cryptography fsspec ml_dtypes msgspec 'moto[server]' numpy pytest pytest-asyncio pytest-timeout
  touch $venv/ready
fi
SERVERS=moto $venv/bin/python -m pytest \
  tests/test_store.py tests/test_send.py tests/test_receive.py tests/test_transport_*.py
