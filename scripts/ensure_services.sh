#!/bin/sh
# Install, by apt, the services that the tests start for themselves: redis-server, postgresql, chromium.
# `ensure_services.sh nginx wrk` asks for others. Does nothing for what is there already.
set -eu

missing=""
for want in ${*:-redis-server postgresql chromium}; do
  case "$want" in
    postgresql) ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing="$missing postgresql" ;;
    nginx) command -v nginx >/dev/null || missing="$missing nginx-light" ;;
    *) command -v "$want" >/dev/null || missing="$missing $want" ;;
  esac
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "missing:$missing. There is no apt-get here: install these with your system's package manager," >&2
  echo "so that they are on PATH, and run this again." >&2
  exit 1
fi
sudo=""
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "missing:$missing. Run as root: apt-get install$missing" >&2; exit 1; }
  sudo="sudo"
fi
echo "installing:$missing"
$sudo apt-get update -q >/dev/null
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends $missing >/dev/null
