#!/usr/bin/env bash
# Installs Debian's Chromium, in which a test renders report.html, where it is missing and may be installed.
# Elsewhere it says what to do and lets the tests go on: that one test is then skipped, or fails when CI=true.
set -eu

if command -v chromium >/dev/null; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "chromium is missing, so the test that renders report.html will not run; install the package chromium" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
echo "installing chromium"
if ! { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "chromium could not be installed, so the test that renders report.html will not run" >&2
fi
rm -f "$log"
