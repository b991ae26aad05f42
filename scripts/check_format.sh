#!/usr/bin/env bash
# Fails, naming the places, when a tracked C++ file is not as clang-format would lay it out.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v clang-format >/dev/null; then
  echo "[check_format] clang-format is not installed; run scripts/install-deps.sh" >&2
  exit 1
fi
mapfile -t files < <(git ls-files '*.cc' '*.h' '*.cu' '*.cuh')
clang-format --dry-run -Werror "${files[@]}"
echo "[check_format] ${#files[@]} files are well laid out"
