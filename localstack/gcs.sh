#!/usr/bin/env bash
# gcp-storage-emulator: Google Cloud Storage's JSON interface, which gcsfs speaks. It keeps no condition of a put or a
# deletion, and does not know the XML interface that gs:// URLs go through.
#
#   gcs.sh install | check | start [DIR [PORT]] | stop [DIR] | kill9 [DIR]
#
# Takes one port; asks for no credentials. Environment: PYTHON (where `install` puts it, and what runs it).
NAME=gcs
DEFAULT_PORT=9023
READY_WITHIN_S=30
STOP_WITHIN_S=3
# shellcheck source=localstack/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"
PYTHON=${PYTHON:-$PROJECT/.venv/bin/python}

install() {
  "$PYTHON" -m pip install --no-deps -r "$ROOM/gcs-requirements.txt"
}

missing() {
  "$PYTHON" -c 'import gcp_storage_emulator, google_crc32c' 2>/dev/null ||
    echo "no gcp-storage-emulator for $PYTHON; run localstack/gcs.sh install"
}

serve() {
  exec "$PYTHON" -m gcp_storage_emulator start --host 127.0.0.1 --port "$PORT" --in-memory
}

answers() {
  [ "$(http_status "http://127.0.0.1:$PORT/storage/v1/b?project=test")" = 200 ]
}

main "$@"
