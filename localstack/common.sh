# shellcheck shell=bash
# What the three server scripts share: verbs, and the life of a server as one group of processes.
# Sourced, never run. The process in DIR/server.pid leads the group; whatever it starts stays in it and ends with it.
#
# The script that sources this sets NAME, DEFAULT_PORT, READY_WITHIN_S and STOP_WITHIN_S, and defines
#   install   put the server on this machine
#   missing   print what keeps it from starting, or nothing
#   serve     run it in the foreground: in DIR, which is the working directory, on PORT
#   answers   succeed once PORT serves requests
#   sweep     remove what an ended server leaves outside DIR
set -euo pipefail

ROOM=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
PROJECT=$(dirname "$ROOM")

die() {
  echo "$NAME: $*" >&2
  exit 1
}

http_status() { # URL: the status code of a GET, 000 when nobody answers
  curl --noproxy '*' --silent --output /dev/null --max-time 5 --write-out '%{http_code}' "$1" || true
}

is_listening() { # PORT
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

sweep() {
  :
}

has_processes() { # LEADER: has its group any that are not zombies?
  ps -o stat= -s "$1" | grep '^[^Z]' >/dev/null # not grep -q: it would break the pipe, and the pipe's status
}

is_running() {
  local pid
  pid=$(cat "$DIR/server.pid" 2>/dev/null) || return 1
  # A process id outlives its server in the file. A stranger who got the same id works in another directory.
  [ ! -e "/proc/$pid" ] || [ "$(readlink "/proc/$pid/cwd")" = "$DIR" ] || return 1
  has_processes "$pid"
}

end() { # SIGNAL: TERM lets the server finish, KILL is a crash; returns when every process is gone
  local pid deadline=$SECONDS
  if is_running; then
    pid=$(cat "$DIR/server.pid")
    if [ "$1" = TERM ]; then
      kill -TERM "$pid" || true
      deadline=$((SECONDS + STOP_WITHIN_S))
    fi
    while has_processes "$pid"; do
      [ "$SECONDS" -lt "$deadline" ] || kill -KILL -- "-$pid" || true
      sleep 0.05
    done
  fi
  sweep
  rm -f "$DIR/server.pid"
}

start() {
  local reason deadline
  reason=$(missing)
  [ -z "$reason" ] || die "$reason"
  mkdir -p "$DIR"
  cd "$DIR"
  ! is_running || die "already running in $DIR, process $(cat server.pid)"
  ! is_listening "$PORT" || die "port $PORT is taken"

  trap 'end KILL' EXIT # a start that fails or is interrupted leaves nothing behind
  setsid "$ROOM/$NAME.sh" serve "$DIR" "$PORT" </dev/null >server.log 2>&1 &
  echo $! >server.pid
  disown
  echo "$PORT" >server.port
  deadline=$((SECONDS + READY_WITHIN_S))
  until answers; do
    if ! is_running || [ "$SECONDS" -ge "$deadline" ]; then
      tail -n 20 server.log >&2
      die "not ready; the log is $DIR/server.log"
    fi
    sleep 0.05
  done
  trap - EXIT
  echo "$NAME: http://127.0.0.1:$PORT, process $(cat server.pid), data in $DIR" >&2
}

main() { # VERB [DIR [PORT]]
  DIR=$(realpath -m "${2:-$PROJECT/.servers/$NAME}")
  PORT=${3:-$DEFAULT_PORT}
  case ${1:-} in
    install) install ;;
    check)
      local reason
      reason=$(missing)
      [ -z "$reason" ] || die "$reason"
      ;;
    start) start ;;
    serve) serve ;;
    stop) end TERM ;;
    kill9) end KILL ;;
    *)
      echo "usage: $NAME.sh install | check | start [DIR [PORT]] | stop [DIR] | kill9 [DIR]" >&2
      exit 2
      ;;
  esac
}
