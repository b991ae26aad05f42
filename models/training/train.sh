#!/usr/bin/env bash
# Trains the default model on this machine's GPU.
# Usage: models/training/train.sh OUT MINUTES [options of train.py]
# Builds world_feed and the tokenizer into OUT first; WORLD_FEED and TOKENIZER name ready ones.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:?usage: train.sh OUT MINUTES [options]}
minutes=${2:?usage: train.sh OUT MINUTES [options]}
shift 2
mkdir -p "$out"
feed=${WORLD_FEED:-$out/world_feed}
tokenizer=${TOKENIZER:-$out/tokenizer.json}
if [[ ! -x $feed ]]; then
  (cd "$root" && g++ -std=c++20 -O2 -ffp-contract=off -I. -o "$feed" \
    models/training/world_feed.cc demos/world/{names,questions,scene,texture}.cc)
fi
if [[ ! -f $tokenizer ]]; then
  python3 "$root/models/training/make_tokenizer.py" --feed "$feed" --out "$tokenizer"
fi
exec python3 "$root/models/training/train.py" --feed "$feed" --tokenizer "$tokenizer" \
  --atlas "$root/demos/world/assets/atlas.png" --out "$out" --minutes "$minutes" "$@"
