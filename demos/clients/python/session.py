#!/usr/bin/env python3
"""Sends pictures to a Sluice server as a live session, asks a question and prints the answer.

    python3 session.py --server localhost:50051 --question "What is visible?" a.jpg b.jpg c.jpg

With --keep the stream is saved instead of closed, and its id printed; --resume ID goes on with it.
Exit codes: 0 ok, 1 the server could not be reached or refused something, 2 wrong usage or input.
"""

import argparse
import pathlib
import queue
import sys

import grpc

from sluice.v1 import service_pb2 as sluice
from sluice.v1 import service_pb2_grpc

FIELDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}


class Refusal(Exception):
    """What the server said no to."""


def read_pictures(paths):
    """[(field of a frame, bytes)]; exits with one line about the first that is none."""
    pictures = []
    for path in paths:
        if path.suffix.lower() not in FIELDS:
            print(f"session.py: {path} must end in one of {', '.join(FIELDS)}", file=sys.stderr)
            sys.exit(2)
        try:
            pictures.append((FIELDS[path.suffix.lower()], path.read_bytes()))
        except OSError as error:
            print(f"session.py: cannot read {path}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
    return pictures


def run(arguments, waiting):
    # What is put here is sent; the frames wait for the server's acknowledgements, so that none is
    # dropped because it came too fast.
    outgoing = queue.Queue()
    number = 0
    saved = False

    def push_next():
        nonlocal number
        if waiting:
            field, data = waiting.pop(0)
            frame = sluice.Frame(number=number, media_seconds=number / arguments.fps)
            number += 1
            setattr(frame, field, data)
            outgoing.put(sluice.SessionRequest(frame=frame))
        else:
            ask = sluice.Ask(question_id=1, text=arguments.question)
            outgoing.put(sluice.SessionRequest(ask=ask))
            if not arguments.keep:
                outgoing.put(sluice.SessionRequest(close=sluice.Close()))

    outgoing.put(sluice.SessionRequest(open=sluice.Open(resume_stream_id=arguments.resume)))
    metadata = [("authorization", f"Bearer {arguments.token}")] if arguments.token else None
    with grpc.insecure_channel(arguments.server) as channel:
        stub = service_pb2_grpc.SluiceStub(channel)
        try:
            for message in stub.Session(iter(outgoing.get, None), metadata=metadata):
                kind = message.WhichOneof("message")
                if kind in ("opened", "frame_ack", "frame_dropped"):
                    if kind == "opened":
                        stream_id = message.opened.stream_id
                        if message.opened.HasField("last_frame"):
                            number = message.opened.last_frame + 1
                    if kind == "frame_dropped":
                        reason = sluice.DropReason.Name(message.frame_dropped.reason)
                        print(f"dropped: {reason} {message.frame_dropped.detail}")
                    push_next()
                elif kind == "text":
                    print(message.text.text, end="", flush=True)
                elif kind == "answer":
                    print(f"\n({message.answer.usage.total_seconds:.2f} s, "
                          f"{message.answer.frames_seen} frames seen)")
                    if message.answer.error:
                        raise Refusal(message.answer.error)
                    if arguments.keep:
                        outgoing.put(sluice.SessionRequest(save=sluice.Save()))
                elif kind == "saved":
                    print(stream_id)
                    saved = True
                    outgoing.put(None)
                elif kind == "warning":
                    print(message.warning.line, file=sys.stderr)
                elif kind == "refused":
                    raise Refusal(message.refused.error)
        finally:
            outgoing.put(None)  # else the thread that sends waits for more, and the program for it
    if arguments.keep and not saved:
        raise Refusal("the session ended before it was saved")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--server", default="localhost:50051")
    parser.add_argument("--token")
    parser.add_argument("--question", required=True)
    parser.add_argument("--fps", type=float, default=2.0, help="of the pictures as a video")
    parser.add_argument("--keep", action="store_true", help="save the stream, print its id")
    parser.add_argument("--resume", metavar="ID", help="go on with a stream that was kept")
    parser.add_argument("pictures", nargs="+", type=pathlib.Path)
    arguments = parser.parse_args()
    if not arguments.fps > 0:
        parser.error(f"--fps must be above 0, is {arguments.fps}")
    pictures = read_pictures(arguments.pictures)
    try:
        run(arguments, pictures)
    except grpc.RpcError as error:
        sys.exit(f"session.py: {arguments.server}: {error.code().name}: {error.details()}")
    except Refusal as refusal:
        sys.exit(f"session.py: {arguments.server} refused: {refusal}")


if __name__ == "__main__":
    main()
