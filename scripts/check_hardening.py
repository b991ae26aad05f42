#!/usr/bin/env python3
"""Checks that a program was built with what SLUICE_HARDENING asks for, as its ELF file tells.

    scripts/check_hardening.py [--without-marks] build/release/bin/sluice

Prints a line for everything that is missing and exits with 1 if there is any. --without-marks: for
other processors than x86 and for programs with CUDA, whose jump targets are not all marked.
"""

import argparse
import os
import re
import subprocess
import sys


def readelf(*arguments):
    """What binutils' readelf prints, in English."""
    return subprocess.run(["readelf", "-W", *arguments], check=True, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C"}).stdout


def missing(headers, dynamic, symbols, notes, marks=True):
    """The protections that are not there, as sentences."""
    stack = re.search(r"^\s*GNU_STACK\s.*?\s([RWE ]{3})\s", headers, re.M)
    called = set(re.findall(r"\bUND (\w+)", symbols))
    checks = {
        "its address is fixed: link with -pie":
            re.search(r"^Elf file type is DYN", headers, re.M) and re.search(r"^\s*PHDR", headers, re.M),
        "its relocations stay writable: link with -z relro":
            re.search(r"^\s*GNU_RELRO", headers, re.M),
        "its functions are bound when first called: link with -z now":
            re.search(r"\(BIND_NOW\)|\(FLAGS\).*\bBIND_NOW\b|\(FLAGS_1\).*\bNOW\b", dynamic),
        "its stack can be executed: link with -z noexecstack": stack and "E" not in stack[1],
        "nothing guards its stack: compile with -fstack-protector-strong":
            "__stack_chk_fail" in called,
        "no copy is bounded: compile with -D_FORTIFY_SOURCE=3":
            any(re.fullmatch(r"__\w+_chk", name) for name in called),
    }
    if marks:
        checks["its jump targets are not marked: compile with -fcf-protection"] = \
            re.search(r"x86 feature: IBT, SHSTK", notes)
    return [sentence for sentence, holds in checks.items() if not holds]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-marks", action="store_true")
    parser.add_argument("program")
    given = parser.parse_args()
    lacks = missing(readelf("-l", given.program), readelf("-d", given.program),
                    readelf("--dyn-syms", given.program), readelf("-n", given.program),
                    not given.without_marks)
    for sentence in lacks:
        print(f"[check_hardening] {given.program}: {sentence}", file=sys.stderr)
    return 1 if lacks else 0


if __name__ == "__main__":
    sys.exit(main())
