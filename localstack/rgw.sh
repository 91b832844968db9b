#!/usr/bin/env bash
# Ceph RGW 20: a production-grade S3 gateway over one monitor and one OSD, in a Debian chroot. Needs root, no docker, no systemd.
# `start` on a new DIR makes a cluster there; on the DIR of a stopped or killed one it resumes.
#
#   rgw.sh install | check | start [DIR [PORT]] | stop [DIR] | kill9 [DIR]
#
# Takes the ports PORT to PORT+10. Environment: TLS_PORT (https there as well; DIR/ca.pem is what clients must trust),
# AK and SK (the owner's keys; the first start on a DIR decides), GUEST_AK and GUEST_SK (those of a second user, who may
# do what policies of buckets say), SIZE (the most it can hold, 20G; a sparse file),
# CEPH_ROOT (the chroot), DEBIAN_MIRROR (where `install` gets Debian from).
NAME=rgw
DEFAULT_PORT=7480
READY_WITHIN_S=60
STOP_WITHIN_S=30
# shellcheck source=localstack/common.sh
. "$(dirname "$(realpath "$0")")/common.sh"
CEPH_ROOT=$(realpath -m "${CEPH_ROOT:-/opt/ceph-root}")
C=/srv/cluster # DIR as the daemons see it

install() {
  [ "$(id -u)" = 0 ] || die "install needs root"
  command -v debootstrap >/dev/null || apt-get install -y -q --no-install-recommends debootstrap
  if [ ! -x "$CEPH_ROOT/usr/bin/apt-get" ]; then
    # Ceph 20 is in Debian from forky on. An older debootstrap does not know that name; the script for sid fits every suite.
    # shellcheck disable=SC2016
    local mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' | grep -v security | head -n 1)}
    [ -n "$mirror" ] || die "this machine has no Debian mirror to take over; set DEBIAN_MIRROR"
    debootstrap --variant=minbase forky "$CEPH_ROOT" "$mirror" /usr/share/debootstrap/scripts/sid
  fi
  printf '#!/bin/sh\nexit 101\n' >"$CEPH_ROOT/usr/sbin/policy-rc.d" # packages must not start their daemons
  chmod +x "$CEPH_ROOT/usr/sbin/policy-rc.d"
  cp /etc/resolv.conf "$CEPH_ROOT/etc/"
  "$ROOM/rgw.sh" install_packages
  chroot "$CEPH_ROOT" radosgw --version
}

install_packages() {
  enter_namespace install_packages
  DEBIAN_FRONTEND=noninteractive chroot "$CEPH_ROOT" apt-get install -y -q --no-install-recommends \
    radosgw ceph-mon ceph-osd ceph-common
  chroot "$CEPH_ROOT" apt-get clean
}

enter_namespace() { # VERB [DIR PORT]: begin it again where the chroot has /proc and /dev and nobody outside sees the mounts
  [ -n "${IN_NAMESPACE:-}" ] || IN_NAMESPACE=1 exec unshare --mount --propagation private "$ROOM/rgw.sh" "$@"
  mount --bind /proc "$CEPH_ROOT/proc"
  mount --bind /dev "$CEPH_ROOT/dev"
}

missing() {
  if [ "$(id -u)" != 0 ]; then
    echo "needs root"
  elif [ ! -x "$CEPH_ROOT/usr/bin/radosgw" ]; then
    echo "no Ceph in $CEPH_ROOT; run localstack/rgw.sh install"
  elif ! unshare --mount true 2>/dev/null; then
    echo "needs the right to mount (CAP_SYS_ADMIN)"
  fi
}

serve() {
  enter_namespace serve "$DIR" "$PORT"
  mkdir -p "$CEPH_ROOT$C"
  mount --bind "$DIR" "$CEPH_ROOT$C"
  export CEPH_CONF=$C/ceph.conf
  trap 'shut_down; exit 0' TERM

  local is_new=
  [ -e cluster-is-complete ] || is_new=yes
  [ -z "$is_new" ] || make_identity
  write_config
  [ -z "$is_new" ] || make_monitor
  launch mon ceph-mon -f -i a --public-addr "127.0.0.1:$(cat mon.port)"
  [ -z "$is_new" ] || make_osd
  launch osd ceph-osd -f -i 0
  [ -z "$is_new" ] || make_users
  launch rgw radosgw -f -n client.rgw -k "$C/keyring"
  touch cluster-is-complete
  wait -n # none of the three ends by itself while all is well
  shut_down
  exit 1
}

in_root() {
  chroot "$CEPH_ROOT" "$@"
}

launch() { # NAME COMMAND...: a daemon in the background; `chroot` becomes it, so the id is the daemon's
  local name=$1
  shift
  chroot "$CEPH_ROOT" "$@" &
  declare -g "${name}_pid=$!"
}

shut_down() { # each daemon before the one it needs
  end_daemon KILL "${rgw_pid:-}" # it keeps nothing, and takes most of a minute to end when asked
  end_daemon TERM "${osd_pid:-}"
  end_daemon TERM "${mon_pid:-}"
}

end_daemon() { # SIGNAL PID
  [ -n "$2" ] || return 0
  kill "-$1" "$2" 2>/dev/null || true
  wait "$2" || true
}

make_identity() {
  rm -rf mon osd log run keyring
  mkdir -p mon/a osd/0 log run
  cat /proc/sys/kernel/random/uuid >fsid
  echo $((PORT + 1)) >mon.port # the monitor's address is part of its data, so a resume on another PORT keeps it
}

make_monitor() {
  local user
  in_root ceph-authtool --create-keyring "$C/keyring" --gen-key -n mon. --cap mon 'allow *'
  for user in client.admin client.rgw; do
    in_root ceph-authtool "$C/keyring" --gen-key -n "$user" --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
  done
  in_root monmaptool --create --clobber --fsid "$(cat fsid)" --addv a "[v1:127.0.0.1:$(cat mon.port)]" "$C/monmap"
  in_root ceph-mon --mkfs -i a --monmap "$C/monmap" --keyring "$C/keyring"
}

make_osd() {
  local uuid
  uuid=$(cat /proc/sys/kernel/random/uuid)
  in_root ceph-osd -i 0 --mkfs --osd-uuid "$uuid"
  ask_monitor osd new "$uuid"
  ask_monitor osd crush add osd.0 1 root=default host=localhost
}

ask_monitor() { # the first question after a connect can be refused with "wrong fsid" (see write_config), so ask again
  local attempt
  for attempt in 1 2 3; do
    timeout 30 chroot "$CEPH_ROOT" ceph "$@" && return 0
    echo "attempt $attempt: ceph $* failed"
  done
  return 1
}

make_users() {
  make_user owner "${AK:-testing}" "${SK:-testingsecret}"
  make_user guest "${GUEST_AK:-guest}" "${GUEST_SK:-guestsecret}"
}

make_user() { # NAME ACCESS_KEY SECRET_KEY
  timeout 60 chroot "$CEPH_ROOT" radosgw-admin -n client.rgw user create --uid="$1" --display-name="$1" \
    --access-key="$2" --secret-key="$3" >/dev/null
}

write_config() {
  local mon_port frontend="beast tcp_nodelay=1 endpoint=127.0.0.1:$PORT"
  mon_port=$(cat mon.port)
  if [ -n "${TLS_PORT:-}" ]; then
    [ -e ca.pem ] || make_certificate
    frontend+=" ssl_endpoint=127.0.0.1:$TLS_PORT ssl_certificate=$C/ca.pem ssl_private_key=$C/key.pem"
  fi
  cat >ceph.conf <<CONF
[global]
fsid = $(cat fsid)
mon host = [v1:127.0.0.1:$mon_port]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
ms bind port min = $((mon_port + 1))
ms bind port max = $((mon_port + 9))
auth cluster required = none
auth service required = none
auth client required = none
keyring = $C/keyring
run dir = $C/run
admin socket = $C/run/\$name.\$pid.asok
log file = $C/log/\$name.log
mon cluster log file = $C/log/cluster.log
crash dir = $C/log
# One disk, one copy, no more placement groups than a test needs.
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
rgw rados pool pg num min = 4
# Work on a nearly full disk.
mon data avail warn = 2
mon data avail crit = 1
[mon.a]
mon data = $C/mon/a
# Nobody to agree with, so agree at once.
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = $C/osd/0
osd objectstore = bluestore
bluestore block size = $(numfmt --from=iec "${SIZE:-20G}")
osd memory target = 1073741824
# An OSD that tells its place to the monitor at every start may do so before it has read the cluster's fsid. The monitor
# then answers "wrong fsid" and the OSD never comes up. Its place never changes: make_osd says it once.
osd class update on start = false
osd crush update on start = false
# A gateway that was killed is forgotten soon, so the next one does not wait for it.
osd client watch timeout = 3
[client.rgw]
rgw frontends = $frontend
rgw dns name = localhost
rgw thread pool size = 128
rgw enable usage log = false
rgw enable ops log = false
rgw gc obj min wait = 60
rgw gc processor period = 60
# Encryption with customers' keys over plain http, and one made-up key for SSE-KMS.
rgw crypt require ssl = false
rgw crypt s3 kms backend = testing
rgw crypt s3 kms encryption keys = testkey-1=YmluCmJvb3N0CmJvb3N0LWJ1aWxkCmNlcGguY29uZgo=
CONF
}

make_certificate() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=localhost \
    -addext subjectAltName=IP:127.0.0.1,DNS:localhost -keyout key.pem -out ca.pem
}

answers() {
  [[ $(http_status "http://127.0.0.1:$PORT/") == [234]?? ]]
}

case ${1:-} in
  install_packages) install_packages ;;
  *) main "$@" ;;
esac
