#!/usr/bin/env bash
# Gathers the programs of a build, the libraries they need, the bundled model and the tests' files
# in one folder that runs on a machine with a GPU, its driver and the CUDA runtime, without any
# development package:
#   scripts/bundle.sh OUT [BUILD]      BUILD: build/cuda by default
# There, OUT/run sluice info tells what it found; OUT/run runtime_test and so on are the tests.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:?usage: scripts/bundle.sh OUT [BUILD]}
build=${2:-build/cuda}
if [[ ! -x $build/bin/sluice ]]; then
  echo "[bundle] $build/bin/sluice is missing: build it first" >&2
  exit 2
fi
mkdir -p "$out/bin" "$out/lib"

for program in "$build"/bin/*; do
  [[ -f $program && -x $program ]] || continue
  cp "$program" "$out/bin/"
  strip "$out/bin/$(basename "$program")"
done
# CUDA's own libraries stay with the machine that has the GPU; all others come along, the loader too.
for program in "$out"/bin/*; do ldd "$program"; done |
  awk '/=> \// {print $3} /^\t\/.*ld-linux/ {print $1}' | sort -u |
  grep -vE '/lib(cublas|cublasLt|cudart|cuda|nvrtc)\.so' |
  while read -r library; do cp -L "$library" "$out/lib/"; done
mkdir -p "$out/share/sluice/models" "$out/share/sluice/demos"
cp -rT models/sluice-mini "$out/share/sluice/models/sluice-mini"
cp -rT demos/clips "$out/share/sluice/demos/clips"

cat > "$out/run" <<'RUN'
#!/bin/sh
# Runs a program of this folder with the libraries of this folder, and CUDA's of the machine.
here=$(cd "$(dirname "$0")" && pwd)
program=$1
shift
cuda=
for place in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda-*; do
  for lib in lib64 targets/x86_64-linux/lib; do
    [ -d "$place/$lib" ] && cuda=$cuda:$place/$lib
  done
done
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"  # else sluice sets it and begins again
exec "$here"/lib/ld-linux-x86-64.so.2 \
  --library-path "$here/lib$cuda:/usr/lib/x86_64-linux-gnu" "$here/bin/$program" "$@"
RUN
chmod +x "$out/run"
echo "[bundle] $(du -sh "$out" | cut -f1) in $out" >&2
