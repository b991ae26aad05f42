#!/usr/bin/env python3
"""Writes llm/unicode_tables.inc: the character properties the tokenizer needs, for Unicode 16.0.

The properties are frozen at the version the reference tokenizers use, whatever Unicode the machine
knows. Python's own unicodedata often is another version; then install the package unicodedata2 of
the version below:

    pip install unicodedata2==16.0.0
    python3 scripts/make_unicode_tables.py > llm/unicode_tables.inc
"""
import sys

VERSION = "16.0.0"
# Letters and numbers of Unicode 16.0, as counted from the reference tokenizers themselves.
EXPECTED_LETTERS, EXPECTED_NUMBERS = 141028, 1911

try:
    import unicodedata2 as ucd
except ImportError:
    import unicodedata as ucd

# White_Space is not in unicodedata; the property is closed by now (25 code points).
WHITE_SPACE = [
    *range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F,
    0x205F, 0x3000,
]
# Other_Alphabetic outside of the categories L, M, Nl: circled and squared Latin letters.
ALPHABETIC_SYMBOLS = [
    *range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A),
    *range(0x1F170, 0x1F18A),
]
JOIN_CONTROL = [0x200C, 0x200D]


def scalars():
    for c in range(0x110000):
        if not 0xD800 <= c < 0xE000:
            yield c


def ranges(values):
    """[(first, last)] of a sorted sequence of integers."""
    out = []
    for c in values:
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def emit(comment, declaration, rows):
    print(f"// {comment}")
    print(f"{declaration} = {{")
    line = "   "
    for row in rows:
        text = " {" + ", ".join(row) + "},"
        if len(line) + len(text) > 100:
            print(line)
            line = "   "
        line += text
    print(line)
    print("};\n")


def main():
    if ucd.unidata_version != VERSION:
        sys.exit(f"need Unicode {VERSION}, this python has {ucd.unidata_version}: "
                 f"pip install unicodedata2=={VERSION}")
    category = {c: ucd.category(chr(c)) for c in scalars()}
    letters = [c for c in category if category[c][0] == "L"]
    numbers = [c for c in category if category[c][0] == "N"]
    words = sorted({c for c in category if category[c][0] in "LM" or category[c] in
                    ("Nd", "Nl", "Pc")} | set(ALPHABETIC_SYMBOLS) | set(JOIN_CONTROL))
    if (len(letters), len(numbers)) != (EXPECTED_LETTERS, EXPECTED_NUMBERS):
        sys.exit(f"expected {EXPECTED_LETTERS} letters and {EXPECTED_NUMBERS} numbers, "
                 f"got {len(letters)} and {len(numbers)}")

    classes = []
    for c in category:
        ccc = ucd.combining(chr(c))
        if ccc and classes and classes[-1][1] == c - 1 and classes[-1][2] == ccc:
            classes[-1][1] = c
        elif ccc:
            classes.append([c, c, ccc])

    decompositions, compositions = [], []
    for c in category:
        mapping = ucd.decomposition(chr(c))
        if not mapping or mapping.startswith("<"):
            continue
        parts = [int(x, 16) for x in mapping.split()]
        assert 1 <= len(parts) <= 2
        decompositions.append([c, parts[0], parts[1] if len(parts) == 2 else 0])
        if len(parts) == 2 and ucd.normalize("NFC", chr(c)) == chr(c):
            compositions.append([parts[0], parts[1], c])
    compositions.sort()

    def hexes(rows):
        return [[f"0x{v:X}" for v in row] for row in rows]

    print(f"// Unicode {VERSION}. Made by scripts/make_unicode_tables.py; do not edit.")
    print("// clang-format off\n")
    emit(f"General category L: {len(letters)} code points.",
         "constexpr CodePointRange kLetters[]", hexes(ranges(letters)))
    emit(f"General category N: {len(numbers)} code points.",
         "constexpr CodePointRange kNumbers[]", hexes(ranges(numbers)))
    emit(f"White_Space: {len(WHITE_SPACE)} code points.",
         "constexpr CodePointRange kWhiteSpace[]", hexes(ranges(WHITE_SPACE)))
    emit(f"Word characters (Alphabetic, M, Nd, Pc, Join_Control): {len(words)} code points.",
         "constexpr CodePointRange kWordCharacters[]", hexes(ranges(words)))
    emit("Canonical_Combining_Class where it is not 0: first, last, class.",
         "constexpr CombiningRange kCombiningClasses[]",
         [[f"0x{a:X}", f"0x{b:X}", str(ccc)] for a, b, ccc in classes])
    emit("Canonical decompositions, one step, Hangul left out: composed, first, second (0: none).",
         "constexpr Decomposition kDecompositions[]", hexes(decompositions))
    emit("Primary composites, Hangul left out: first, second, composed. Sorted.",
         "constexpr Composition kCompositions[]", hexes(compositions))
    print("// clang-format on")


if __name__ == "__main__":
    main()
