#!/usr/bin/env bash
# Installs what building, testing and formatting Sluice needs, from the packages of Debian 12,
# Ubuntu 24.04 or later. Says what it will install first; does nothing when all is there.
#   scripts/install-deps.sh           everything
#   scripts/install-deps.sh --core    without what SLUICE_SERVICE needs
#   scripts/install-deps.sh --print   only prints the names of the packages
set -euo pipefail

tools=(cmake ninja-build pkg-config ccache clang-format python3)
command -v c++ >/dev/null || tools+=(g++)
command -v make >/dev/null || tools+=(make)
# oneDNN's CMake configuration asks for OpenCL's headers and loader.
core=(libeigen3-dev libdnnl-dev ocl-icd-opencl-dev opencl-c-headers libhwy-dev nlohmann-json3-dev
      libgtest-dev libgmock-dev zlib1g-dev)
# Of GStreamer's plugins: base (playback, test pattern), good (mp4, matroska, avi, rtsp, http,
# cameras), bad (the parsers of H.264 and H.265), ugly (x264, to write clips), libav (decoders).
service=(libgstreamer1.0-dev libgstreamer-plugins-base1.0-dev gstreamer1.0-plugins-base
         gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly
         gstreamer1.0-libav libcli11-dev libspdlog-dev libprotobuf-dev protobuf-compiler
         libgrpc++-dev protobuf-compiler-grpc libssl-dev libboost-dev libjpeg-dev
         libwebp-dev libpng-dev libseccomp-dev)

packages=("${tools[@]}" "${core[@]}" "${service[@]}")
print=false
for argument in "$@"; do
  case $argument in
    --core) packages=("${tools[@]}" "${core[@]}") ;;
    --print) print=true ;;
    *) echo "[install-deps] unknown argument '$argument': use --core or --print" >&2; exit 2 ;;
  esac
done
if $print; then printf '%s\n' "${packages[@]}"; exit 0; fi

if ! command -v apt-get >/dev/null; then
  echo "[install-deps] no apt-get here: install the equivalents of these yourself if the build" \
       "misses something: ${packages[*]}" >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

echo "[install-deps] will install with apt-get: ${missing[*]}" >&2
as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "[install-deps] not root and no sudo; as root run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
  [[ -t 0 ]] || as_root+=(-n)  # nobody there to type a password
fi

apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q "$@" </dev/null; }
install_missing() {
  apt -o Dpkg::Use-Pty=0 install -y --no-install-recommends "${missing[@]}"
}

# The package lists are fetched when they lack a package, or when what they name is gone.
known=true
for package in "${missing[@]}"; do
  candidate=$(apt-cache policy "$package" 2>/dev/null | awk '/Candidate:/ {print $2}')
  [[ -n $candidate && $candidate != "(none)" ]] || known=false
done
if ! $known; then
  apt update
  install_missing
else
  install_missing || { apt update && install_missing; }
fi
