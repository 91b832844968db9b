#!/usr/bin/env bash
# A local S3 with a bucket, until Ctrl-C: starts a server, installs it before if need be, and prints how to reach it.
#
#   up.sh [SERVER [BUCKET]]     seaweedfs, localstack or rgw; by default seaweedfs, and a bucket named checkpoints
#
# The next time what was saved is there again, except with localstack. Environment: S3_DIR (the data), S3_PORT (the first port),
# and what the server's own script reads.
set -euo pipefail

ROOM=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
SERVER=${1:-seaweedfs}
BUCKET=${2:-checkpoints}
SCRIPT=$ROOM/$SERVER.sh
DIR=${S3_DIR:-$(dirname "$ROOM")/.servers/up-$SERVER}

case $SERVER in
  seaweedfs | rgw) AK=${AK:-testing} SK=${SK:-testingsecret} ;;
  localstack) AK=test SK=test ;;
  *)
    echo "usage: up.sh [seaweedfs | localstack | rgw [BUCKET]]" >&2
    exit 2
    ;;
esac
export AK SK

die() {
  echo "up: $*" >&2
  exit 1
}

make_bucket() { # 409: one's own, from the last time
  local status
  status=$(curl --noproxy '*' --silent --output /dev/null --write-out '%{http_code}' --request PUT \
    --aws-sigv4 aws:amz:us-east-1:s3 --user "$AK:$SK" --header 'x-amz-content-sha256: UNSIGNED-PAYLOAD' "$URL/$BUCKET") || true
  [[ $status = 200 || $status = 409 ]] || die "no bucket $BUCKET: status $status"
}

"$SCRIPT" check 2>/dev/null || "$SCRIPT" install >&2
"$SCRIPT" start "$DIR" ${S3_PORT:+"$S3_PORT"}
trap '"$SCRIPT" stop "$DIR"' EXIT
trap 'exit 0' INT TERM
URL=http://127.0.0.1:$(cat "$DIR/server.port")
make_bucket
cat <<LINES
export AWS_ENDPOINT_URL=$URL
export AWS_ACCESS_KEY_ID=$AK
export AWS_SECRET_ACCESS_KEY=$SK
export AWS_REGION=us-east-1
LINES
echo "up: s3://$BUCKET is there; run these lines where you want to use it; Ctrl-C ends the server" >&2
tail --pid="$(cat "$DIR/server.pid")" -f /dev/null & # for as long as the server lives; waited for, so that signals are heard
wait $!
