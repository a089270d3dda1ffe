#!/usr/bin/env bash
# Installs onnxruntime-node and onnxruntime-web, in which a test opens a bundle, where npm is there and they are not.
# Elsewhere it says so and lets the tests go on: that test is then skipped.
set -eu
cd "$(dirname "$0")/javascript"

if [ -d node_modules/onnxruntime-web ] && [ -d node_modules/onnxruntime-node ]; then
  exit 0
fi
if ! command -v npm >/dev/null; then
  echo "npm is missing, so bundles are not opened in JavaScript; install the package npm" >&2
  exit 0
fi
log=$(mktemp)
echo "installing onnxruntime for JavaScript"
# without scripts: those of onnxruntime-node would fetch libraries for a GPU
if ! timeout 300 npm install --ignore-scripts --no-audit --no-fund --no-package-lock >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "onnxruntime for JavaScript could not be installed, so bundles are not opened there" >&2
  rm -rf node_modules
fi
rm -f "$log"
