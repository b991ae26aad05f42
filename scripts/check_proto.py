#!/usr/bin/env python3
"""Checks the .proto files: their style, and that nothing breaks clients of the version committed as
proto/baseline.binpb.

    scripts/check_proto.py             check
    scripts/check_proto.py --update    accept what is there as the new baseline

Style: messages, enumerations and services in CamelCase, fields in lower_snake_case, values of an
enumeration UPPER_SNAKE_CASE, beginning with its name and with ..._UNSPECIFIED = 0, package
sluice.vN in the folder sluice/vN. Breaking: what was there and is gone, has another number, type,
label or meaning of streams. New things are welcome. Needs protoc and nothing else.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

CAMEL = re.compile(r"[A-Z][A-Za-z0-9]*$")
SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*$")
UPPER = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*$")
LABEL_REPEATED = 3


def fields_of(data):
    """The (number, value) pairs of one encoded message; nested ones are bytes."""

    def varint(at):
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
        elif kind == 2:
            size, at = varint(at)
            value, at = data[at:at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = data[at:at + size], at + size
        else:
            raise SystemExit("[check_proto] the descriptor set is damaged; make it again")
        yield key >> 3, value


def parsed(data, names):
    """Fields by name: {number: name} for single ones, {number: [name]} for repeated ones."""
    out = {n[0]: [] for n in names.values() if isinstance(n, list)}
    for number, value in fields_of(data):
        name = names.get(number)
        if isinstance(name, list):
            out[name[0]].append(value)
        elif name:
            out[name] = value
    return out


def text(value):
    return value.decode() if value else ""


class Surface:
    """Everything clients can depend on, by full name, and what is wrong with its style."""

    def __init__(self, descriptors):
        self.things = {}  # full name -> comparable description
        self.style = []
        for number, file in fields_of(descriptors):
            if number == 1:
                self.add_file(file)

    def check(self, ok, line):
        if not ok:
            self.style.append(line)

    def add_file(self, data):
        file = parsed(data, {1: "name", 2: "package", 4: ["messages"], 5: ["enums"],
                             6: ["services"]})
        name, package = text(file.get("name")), text(file.get("package"))
        folder = name.rpartition("/")[0]
        self.check(re.fullmatch(r"sluice\.v\d+", package) and package.replace(".", "/") == folder,
                   f"{name}: expected package sluice.vN in the folder sluice/vN, found '{package}'")
        for message in file["messages"]:
            self.add_message(package, message)
        for enum in file["enums"]:
            self.add_enum(package, enum)
        for service in file["services"]:
            self.add_service(package, service)

    def add_message(self, scope, data):
        message = parsed(data, {1: "name", 2: ["fields"], 3: ["messages"], 4: ["enums"],
                                8: ["oneofs"]})
        name = f"{scope}.{text(message['name'])}"
        self.check(CAMEL.match(text(message["name"])) or text(message["name"]).endswith("Entry"),
                   f"{name}: expected a name in CamelCase")
        self.things[name] = "message"
        oneofs = [text(parsed(o, {1: "name"})["name"]) for o in message["oneofs"]]
        for data_of_field in message["fields"]:
            field = parsed(data_of_field, {1: "name", 3: "number", 4: "label", 5: "type",
                                           6: "type_name", 9: "oneof", 17: "optional"})
            own = text(field["name"])
            self.check(SNAKE.match(own), f"{name}.{own}: expected a name in lower_snake_case")
            oneof = oneofs[field["oneof"]] if "oneof" in field and "optional" not in field else ""
            # The name counts as well: JSON and sources use it.
            self.things[f"{name}.{own}"] = (
                f"field {field['number']} of type {field['type']} {text(field.get('type_name'))}"
                f"{' repeated' if field.get('label') == LABEL_REPEATED else ''}"
                f"{' optional' if 'optional' in field else ''}"
                f"{' in oneof ' + oneof if oneof else ''}")
        for nested in message["messages"]:
            self.add_message(name, nested)
        for enum in message["enums"]:
            self.add_enum(name, enum)

    def add_enum(self, scope, data):
        enum = parsed(data, {1: "name", 2: ["values"]})
        own = text(enum["name"])
        name = f"{scope}.{own}"
        self.check(CAMEL.match(own), f"{name}: expected a name in CamelCase")
        self.things[name] = "enum"
        prefix = re.sub(r"(?<!^)([A-Z])", r"_\1", own).upper() + "_"
        for i, data_of_value in enumerate(enum["values"]):
            value = parsed(data_of_value, {1: "name", 2: "number"})
            label, number = text(value["name"]), value.get("number", 0)
            self.check(UPPER.match(label) and label.startswith(prefix),
                       f"{name}.{label}: expected UPPER_SNAKE_CASE beginning with {prefix}")
            self.check(i > 0 or (label == prefix + "UNSPECIFIED" and number == 0),
                       f"{name}: expected {prefix}UNSPECIFIED = 0 as its first value")
            self.things[f"{name}.{label}"] = f"value {number}"

    def add_service(self, scope, data):
        service = parsed(data, {1: "name", 2: ["methods"]})
        name = f"{scope}.{text(service['name'])}"
        self.check(CAMEL.match(text(service["name"])), f"{name}: expected a name in CamelCase")
        self.things[name] = "service"
        for data_of_method in service["methods"]:
            method = parsed(data_of_method, {1: "name", 2: "input", 3: "output", 5: "in", 6: "out"})
            own, request, response = (text(method[k]) for k in ("name", "input", "output"))
            self.check(CAMEL.match(own), f"{name}.{own}: expected a name in CamelCase")
            for kind, suffix in ((request, "Request"), (response, "Response")):
                self.check(kind.rpartition(".")[2] == own + suffix,
                           f"{name}.{own}: expected {own}{suffix}, found {kind}")
            self.things[f"{name}.{own}"] = (f"call from {request}{' stream' * method.get('in', 0)} "
                                            f"to {response}{' stream' * method.get('out', 0)}")


def compiled(root):
    protos = sorted(str(p.relative_to(root)) for p in root.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "set"
        subprocess.run(["protoc", "-I", str(root), f"--descriptor_set_out={out}", *protos],
                       check=True)
        return out.read_bytes()


def breaches(root, baseline):
    now, before = Surface(compiled(root)), Surface(baseline)
    lines = list(now.style)
    for name, what in before.things.items():
        if name not in now.things:
            lines.append(f"{name}: was {what}, is gone")
        elif now.things[name] != what:
            lines.append(f"{name}: was {what}, is {now.things[name]}")
    return lines, len(now.things)


def main():
    here = pathlib.Path(__file__).resolve().parent.parent / "proto"
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the baseline")
    parser.add_argument("--root", type=pathlib.Path, default=here)
    parser.add_argument("--baseline", type=pathlib.Path, default=here / "baseline.binpb")
    arguments = parser.parse_args()
    if arguments.update:
        arguments.baseline.write_bytes(compiled(arguments.root))
    lines, count = breaches(arguments.root, arguments.baseline.read_bytes())
    for line in lines:
        print(line)
    if lines:
        print(f"[check_proto] {len(lines)} breaches; clients of the baseline would break, or the "
              "style differs")
        return 1
    print(f"[check_proto] {count} names are in style and as clients know them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
