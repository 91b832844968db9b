#!/usr/bin/env bash
# LocalStack's S3 without docker and without a token, in a virtual environment of its own. It keeps everything in memory.
#
#   localstack.sh install | check | start [DIR [PORT]] | stop [DIR] | kill9 [DIR]
#
# Takes one port. The keys are test and test. Environment: LOCALSTACK_VENV, PYTHON (what `install` makes the environment with).
NAME=localstack
DEFAULT_PORT=4566
READY_WITHIN_S=60
STOP_WITHIN_S=10
# shellcheck source=localstack/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"
LOCALSTACK_VENV=${LOCALSTACK_VENV:-$PROJECT/.venv-localstack}

install() {
  "${PYTHON:-python3}" -m venv "$LOCALSTACK_VENV"
  # The file pins everything, so there is nothing to resolve: the resolver could go back and forth over boto for minutes.
  "$LOCALSTACK_VENV/bin/pip" install --no-deps --no-compile -r "$ROOM/localstack-requirements.txt"
}

missing() {
  [ -x "$LOCALSTACK_VENV/bin/localstack" ] || echo "no LocalStack in $LOCALSTACK_VENV; run localstack/localstack.sh install"
}

serve() {
  mkdir -p tmp
  export GATEWAY_LISTEN=127.0.0.1:$PORT FILESYSTEM_ROOT=$DIR TMPDIR=$DIR/tmp LS_LOG=warn
  export SERVICES=s3 STRICT_SERVICE_LOADING=1 EAGER_SERVICE_LOADING=1 ALLOW_NONSTANDARD_REGIONS=1
  export S3_SKIP_SIGNATURE_VALIDATION=0            # check presigned URLs
  export DISABLE_EVENTS=1 SKIP_SSL_CERT_DOWNLOAD=1 # reach for nothing outside this machine
  export PERSISTENCE=0 OVERRIDE_IN_DOCKER=0        # the same inside a container and out of it
  exec "$LOCALSTACK_VENV/bin/python" -m localstack.runtime.main
}

answers() {
  curl --noproxy '*' --silent --max-time 5 "http://127.0.0.1:$PORT/_localstack/health" | grep '"s3": "running"' >/dev/null
}

main "$@"
