#!/usr/bin/env bash
# Azurite: Microsoft's emulator of Azure's blobs, from the npm registry, in a directory of its own. Needs node and npm.
#
#   azurite.sh install | check | start [DIR [PORT]] | stop [DIR] | kill9 [DIR]
#
# Takes one port. The account is devstoreaccount1, its key the one that all emulators have. Environment: AZURITE_HOME.
NAME=azurite
DEFAULT_PORT=10000
READY_WITHIN_S=60
STOP_WITHIN_S=5
# shellcheck source=localstack/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"
AZURITE_HOME=${AZURITE_HOME:-$PROJECT/.azurite}
AZURITE_VERSION=3.37.0

install() {
  npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$AZURITE_HOME" "azurite@$AZURITE_VERSION"
}

missing() {
  command -v node >/dev/null || echo "azurite needs node and npm; install them first"
  [ -d "$AZURITE_HOME/node_modules/azurite" ] || echo "no azurite in $AZURITE_HOME; run localstack/azurite.sh install"
}

serve() {
  exec node "$AZURITE_HOME/node_modules/azurite/dist/src/blob/main.js" --blobHost 127.0.0.1 --blobPort "$PORT" \
    --location "$DIR" --skipApiVersionCheck --disableTelemetry --silent
}

answers() { # a request without credentials is refused, and so answered
  [ "$(http_status "http://127.0.0.1:$PORT/devstoreaccount1?comp=list")" != 000 ]
}

main "$@"
