#!/usr/bin/env bash
# Switches the demo's pump over REST, as a person would; every listener on every protocol is told.
# Usage: examples/api-trigger-notification.sh [on|off]     Needs: make run, curl, python3
set -euo pipefail

value="${1:-on}"
case "$value" in
  on | off) ;;
  -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
  *) echo "The pump is on or off, not $value. Usage: $0 [on|off]" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
web="http://127.0.0.1:${PORT:-3000}/api/v1"
demo="${VAR_DIR:-var}/demo.json"
[ -r "$demo" ] || { echo "$demo is not there. Start 'make run' first." >&2; exit 1; }

# Prints what a Python expression finds in the JSON document on standard input, here called "it".
pick() { python3 -c "import json, sys; it = json.load(sys.stdin); print($1)"; }

login=$(pick 'json.dumps(it["admin"])' < "$demo")
device=$(pick 'it["devices"][0]["uuid"]' < "$demo")
token=$(curl --fail --silent --show-error --json "$login" "$web/auth/login" | pick 'it["access"]')

# The token goes through a file descriptor, not the command line, which every user of the machine can read.
curl --fail-with-body --silent --show-error \
  --header @<(printf 'Authorization: Bearer %s' "$token") \
  --json "{\"deviceUuid\": \"$device\", \"stateName\": \"power\", \"value\": \"$value\"}" \
  "$web/device-state-instances"
echo
