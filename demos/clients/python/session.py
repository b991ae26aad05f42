#!/usr/bin/env python3
"""Sends pictures to a Sluice server as a live session, asks a question and prints the answer.

    python3 session.py --server localhost:50051 --question "What is visible?" a.jpg b.jpg c.jpg

With --keep the stream is saved instead of closed, and its id printed; --resume ID goes on with it.
"""

import argparse
import pathlib
import queue

import grpc

from sluice.v1 import service_pb2 as sluice
from sluice.v1 import service_pb2_grpc

FIELDS = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}


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

    # What is put here is sent; the frames wait for the server's acknowledgements, so that none is
    # dropped because it came too fast.
    outgoing = queue.Queue()
    waiting = list(arguments.pictures)
    number = 0

    def push_next():
        nonlocal number
        if waiting:
            path = waiting.pop(0)
            frame = sluice.Frame(number=number, media_seconds=number / arguments.fps)
            number += 1
            setattr(frame, FIELDS[path.suffix.lower()], path.read_bytes())
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
                if arguments.keep:
                    outgoing.put(sluice.SessionRequest(save=sluice.Save()))
            elif kind == "saved":
                print(stream_id)
                outgoing.put(None)
            elif kind in ("warning", "refused"):
                print(message)
    outgoing.put(None)


if __name__ == "__main__":
    main()
