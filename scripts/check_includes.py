#!/usr/bin/env python3
"""Checks the street: a file includes only from its own folder or from folders to its left.

    runtime -> vision -> llm -> compression -> streaming -> proto -> demos, tests

Beyond that, the demo world (demos/world and what feeds the trainer with it) takes nothing but
itself and the standard library, and third-party headers stay in the folders they belong to.
Prints file:line for every breach and exits with 1 if there is one.
"""

import pathlib
import re
import subprocess
import sys

STREET = ["runtime", "vision", "llm", "compression", "streaming", "proto", "demos", "tests"]
# Only the street's ends may not see each other: both stand right of everything.
LAST = ["demos", "tests"]
WORLD = ("demos/world/", "models/training/")
# Where a third-party header may first appear on the street.
FIRST_FOLDER = {"gst/": "streaming", "glib": "streaming", "google/protobuf/": "proto",
                "sluice/": "proto", "grpc": "proto", "jpeglib.h": "proto", "webp/": "streaming",
                "openssl/": "proto", "boost/": "proto", "CLI/": "demos"}
QUOTED_THIRD_PARTY = ("hwy/",)  # Highway's own documentation quotes its headers
GENERATED = re.compile(r"sluice/v\d+/[\w.]+\.pb\.h$")
# Who may see protobuf's types: the service, and clients, which speak to it over the wire.
WIRE = ("proto/", "tests/proto/", "demos/clients/", "demos/cli/remote")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')
SOURCES = (".cc", ".h", ".cu", ".cuh")


def breach(root, path, kind, target):
    """Why `path` may not include `target`, or None."""
    folder = path.split("/", 1)[0]
    if path.startswith(WORLD):
        own = target.startswith("demos/world/")
        standard = kind == "<" and "/" not in target and not target.endswith(".h")
        return None if own or standard else "the world takes only itself and the standard library"
    if folder not in STREET:
        return None

    for prefix, first in FIRST_FOLDER.items():
        if target.startswith(prefix) and STREET.index(folder) < STREET.index(first):
            return f"'{prefix}' begins in {first}/"
    if GENERATED.match(target):
        return None if path.startswith(WIRE) else "protobuf types never leave proto/"
    if kind == "<" or target.startswith(QUOTED_THIRD_PARTY):
        return None

    other = target.split("/", 1)[0]
    if other not in STREET or not (root / target).is_file():
        return "an include in quotes is a path from the root of the repository"
    if other in LAST and folder in LAST:
        seen = other == folder or folder == "tests"
    else:
        seen = STREET.index(other) <= STREET.index(folder)
    return None if seen else f"{other}/ lies right of {folder}/"


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    paths = [p for p in listed if p.endswith(SOURCES) and (root / p).is_file()]
    breaches = 0
    for path in sorted(paths):
        for number, line in enumerate((root / path).read_text("utf-8").splitlines(), 1):
            match = INCLUDE.match(line)
            why = breach(root, path, *match.groups()) if match else None
            if why:
                print(f"{path}:{number}: {line.strip()}: {why}")
                breaches += 1
    if breaches:
        print(f"[check_includes] {breaches} includes leave the street")
        return 1
    print(f"[check_includes] {len(paths)} files keep to the street")
    return 0


if __name__ == "__main__":
    sys.exit(main())
