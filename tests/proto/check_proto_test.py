#!/usr/bin/env python3
"""The check of the .proto files finds each kind of bad change, and passes a good one."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

CHECK = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "check_proto.py"
GOOD = """syntax = "proto3";
package sluice.v1;
service Watch { rpc See(SeeRequest) returns (stream SeeResponse); }
message SeeRequest { string name = 1; repeated int32 sizes = 2; oneof one { string a = 3; } }
message SeeResponse { Kind kind = 1; optional double weight = 2; }
enum Kind { KIND_UNSPECIFIED = 0; KIND_LARGE = 1; }
"""


class CheckProtoTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.root = pathlib.Path(self.directory.name)
        (self.root / "sluice/v1").mkdir(parents=True)
        self.run_on(GOOD, "--update")

    def tearDown(self):
        self.directory.cleanup()

    def run_on(self, source, *arguments):
        (self.root / "sluice/v1/a.proto").write_text(source)
        return subprocess.run([sys.executable, CHECK, "--root", self.root, "--baseline",
                               self.root / "baseline", *arguments], capture_output=True, text=True)

    def test_what_is_unchanged_or_only_new_passes(self):
        for old, new in (("", ""), ("string name = 1;", "string name = 1; bytes more = 9;"),
                         ("KIND_LARGE = 1;", "KIND_LARGE = 1; KIND_SMALL = 2;")):
            done = self.run_on(GOOD.replace(old, new) if old else GOOD)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    def test_every_bad_change_is_found_and_named(self):
        for old, new, name in (
                ("string name = 1;", "", "SeeRequest.name"),
                ("string name = 1;", "string name = 7;", "SeeRequest.name"),
                ("string name = 1;", "bytes name = 1;", "SeeRequest.name"),
                ("string name = 1;", "string title = 1;", "SeeRequest.name"),
                ("repeated int32 sizes", "int32 sizes", "SeeRequest.sizes"),
                ("oneof one { string a = 3; }", "string a = 3;", "SeeRequest.a"),
                ("optional double", "double", "SeeResponse.weight"),
                ("KIND_LARGE = 1", "KIND_LARGE = 2", "Kind.KIND_LARGE"),
                ("returns (stream SeeResponse)", "returns (SeeResponse)", "Watch.See"),
                ("service Watch { rpc See(SeeRequest) returns (stream SeeResponse); }", "",
                 "Watch")):
            with self.subTest(new=new):
                done = self.run_on(GOOD.replace(old, new))
                self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
                self.assertIn(name, done.stdout)

    def test_names_out_of_style_are_found(self):
        for addition in ("message small_name {}", "message Ok { string badName = 1; }",
                         "enum Two { TWO_A = 0; }", "enum Two { TWO_UNSPECIFIED = 0; A = 1; }",
                         "service S { rpc Go(SeeRequest) returns (SeeResponse); }"):
            with self.subTest(addition=addition):
                self.assertEqual(self.run_on(GOOD + addition).returncode, 1)
        self.assertEqual(self.run_on(GOOD.replace("sluice.v1", "sluice.v2")).returncode, 1)


if __name__ == "__main__":
    unittest.main()
