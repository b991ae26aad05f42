#!/usr/bin/env python3
"""Batches of clips from world_feed, made by worker processes that know nothing of torch or CUDA.

A worker runs one world_feed after another, packs the records of a batch into flat arrays in
shared memory and tells the trainer, one JSON line a batch. `Stream` is the trainer's side; it
restarts workers that die. Everything in a batch has the same number of frames.

Arrays of a batch (B clips, F frames a clip, N = B*F, R rows of text of L tokens, A answer tokens):
  textures u8 [B, 144, 256, 3]; frames f32 [N, 8]; draws f32 [N, 8, 16]   columns: see render.py
  tokens i16 [R, L]   the text after the newline row, padded with <|endoftext|>
  answer_row, answer_at i32 [A]   row and position of the token *before* each answer token
  answer_token i16 [A]; answer_weight f32 [A]; answer_kind u8 [A]; answer_turn i16 [A]
In training a row is a clip's whole dialogue (R = B). In evaluation every question is a row of its
own, asked first: row r is a question about clip r % B; a clip with fewer questions repeats its
first with kind 255.

Seeds of world_feed: training uses numbers below 10^15 that end in 1 (training_seed), evaluation
8*10^17 and above, the tokenizer's sentences 7*10^11.
"""

import argparse
import collections
import fcntl
import json
import math
import mmap
import os
import queue
import random
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np

MAGIC = 0x444C5257
TEX_SHAPE = (144, 256, 3)
TEX_BYTES = 144 * 256 * 3
MAX_DRAWS, DRAW_COLUMNS, FRAME_COLUMNS = 8, 16, 8
EVAL_SEED = 800_000_000_000_000_000
NO_KIND = 255
SLOT_BYTES = 72 << 20
NEWEST = 30.0  # pixels: an object that changed colour is still about there

# What a token of the picture is about, seen from the frame before (draws' column MOTION for
# objects; targets.py adds the background's).
STILL, LEFT, RIGHT, UP, DOWN, NEW, RECOLOURED = range(7)
UNKNOWN = -1

# Frames a clip and how often a step has them. Long clips are rarer, but each brings more questions.
LENGTHS = {4: 3, 5: 4, 6: 6, 8: 13, 10: 12, 12: 13, 15: 5, 16: 11, 20: 7, 24: 6, 25: 2, 30: 4,
           32: 3, 40: 4, 48: 3, 50: 1, 60: 2, 64: 3}
FRAMES_A_STEP = 2400
MOST_CLIPS = 400  # of a step: their textures must fit a slot


def clips_of(frames, frames_a_step=FRAMES_A_STEP):
    return min(MOST_CLIPS, max(1, frames_a_step // frames))


def questions_of(frames):
    return 6 if frames <= 5 else 8 if frames <= 6 else 12 if frames <= 16 else 16


def training_seed(base, worker, batch):
    """Different for all workers < 1000 and batches < 10^6; below 10^15 for a base < 10^5."""
    return (base * 1_000_000_000 + worker * 1_000_000 + batch) * 10 + 1


# ---- the worker's side: no torch here ------------------------------------------------------------


class Words:
    """Token ids of the pieces of a dialogue, each distinct string tokenised once."""

    def __init__(self, tokenizer_file):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_file(tokenizer_file)
        self.cache = {}
        self.start, self.end, self.pad = (self.tokenizer.token_to_id(t) for t in (
            "<|im_start|>", "<|im_end|>", "<|endoftext|>"))
        self.first = self("\n")  # before the first question; the user's role stands in the prefix
        self.user = [self.start] + self("user \n")
        self.assistant = [self.end, self.start] + self("assistant\n")
        # How the chat template renders earlier answers when a dialogue is sent again as a whole.
        self.assistant_again = [self.end, self.start] + self("assistant \n")
        self.prefix = [self.start] + self("user ")

    def __call__(self, text):
        ids = self.cache.get(text)
        if ids is None:
            if len(self.cache) > 200_000:
                self.cache.clear()
            ids = self.cache[text] = self.tokenizer.encode(text).ids
        return ids

    def dialogue(self, turns, again=False):
        """turns: (kind, stale, question, answer) -> ids, [(position, token, kind, turn, weight)].
        Everything up to the tokens of an answer and its <|im_end|>; stale turns have no targets.
        With `again`, all answers but the last stand as the template renders history."""
        ids, targets = [], []
        for i, (kind, stale, question, answer) in enumerate(turns):
            ids += self.first if i == 0 else self.user
            ids += self(question)
            ids += self.assistant_again if again and i + 1 < len(turns) else self.assistant
            said = self(answer) + [self.end]
            if not stale:
                # An answer of n tokens counts sqrt(n): captions must not drown single words.
                weight = 1 / math.sqrt(len(said))
                targets += [(len(ids) - 1 + j, t, kind, i, weight) for j, t in enumerate(said)]
            ids += said
        return ids, targets


def read_exactly(pipe, size):
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError(f"[stream] world_feed stopped inside a record: {len(data)} of {size} bytes")
    return data


def read_clips(feed, seed, frames, questions, clips):
    """Yields (texture bytes, frame and draw words, turns) of each clip."""
    command = [feed, "--seed", str(seed), "--frames-list", str(frames), "--questions",
               str(questions), "--clips", str(clips)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=1 << 20) as process:
        try:
            try:
                fcntl.fcntl(process.stdout, 1031, 1 << 20)  # F_SETPIPE_SZ
            except OSError:
                pass  # a smaller pipe is only slower
            for _ in range(clips):
                magic, size = struct.unpack("<II", read_exactly(process.stdout, 8))
                if magic != MAGIC:
                    raise ValueError(f"[stream] expected magic {MAGIC:#x}, found {magic:#x}")
                body = read_exactly(process.stdout, size)
                f, q = struct.unpack_from("<II", body)
                if f != frames:
                    raise ValueError(f"[stream] asked for {frames} frames, got {f}")
                words = np.frombuffer(body, np.uint32, offset=8 + TEX_BYTES,
                                      count=(size - 8 - TEX_BYTES) // 4)
                at, heads = 0, []
                for _ in range(f):
                    heads.append(at)
                    at += 6 + 6 * int(words[at + 5])
                turns, byte = [], 8 + TEX_BYTES + 4 * at
                for _ in range(q):
                    kind, stale, nq, na = struct.unpack_from("<BBHH", body, byte)
                    text = body[byte + 6:byte + 6 + nq + na].decode()
                    turns.append((kind, stale, text[:nq], text[nq:]))
                    byte += 6 + nq + na
                if byte != size:
                    raise ValueError(f"[stream] record of {size} bytes ends at {byte}")
                yield body[8:8 + TEX_BYTES], words, heads, turns
        finally:
            process.kill()


def build_batch(feed, words, seed, frames, clips, questions, evaluation, rng):
    """A batch as {name: array}."""
    n = clips * frames
    textures = np.empty((clips, TEX_BYTES), np.uint8)
    head = np.zeros((n, FRAME_COLUMNS), np.float32)
    raw = np.zeros((n, MAX_DRAWS, 6), np.uint32)
    dialogues = []
    for b, (texture, record, heads, turns) in enumerate(
            read_clips(feed, seed, frames, questions, clips)):
        textures[b] = np.frombuffer(texture, np.uint8)
        as_float = record.view(np.float32)
        for f, at in enumerate(heads):
            count = int(record[at + 5])
            if count > MAX_DRAWS:
                raise ValueError(f"[stream] a frame has {count} draws, room is for {MAX_DRAWS}")
            row = b * frames + f
            head[row, :5] = as_float[at:at + 5]
            head[row, 5] = count
            raw[row, :count] = record[at + 6:at + 6 + 6 * count].reshape(count, 6)
        fresh = [t for t in turns if not t[1]]
        rng.shuffle(fresh)
        dialogues.append(([] if evaluation else [t for t in turns if t[1]]) + fresh)
    draws = unpack_draws(raw, head)
    head[:, 6] = add_motion(draws.reshape(clips, frames, MAX_DRAWS, DRAW_COLUMNS),
                            head.reshape(clips, frames, FRAME_COLUMNS)).reshape(-1)
    if evaluation:
        rows = []
        for j in range(questions):
            for turns in dialogues:
                kind, stale, q, a = turns[j] if j < len(turns) else turns[0]
                rows.append(([(kind if j < len(turns) else NO_KIND, 0, q, a)], False))
    else:
        rows = [(turns, rng.random() < 0.15) for turns in dialogues]
    return {"textures": textures.reshape(clips, *TEX_SHAPE), "frames": head, "draws": draws,
            **pack_text(words, rows)}


def unpack_draws(raw, head):
    draws = np.zeros((*raw.shape[:2], DRAW_COLUMNS), np.float32)
    draws[..., 0:4] = raw[..., 0:4].view(np.float32)
    colour, ids = raw[..., 4], raw[..., 5]
    for k in range(4):  # r, g, b, mip
        draws[..., 4 + k] = (colour >> (8 * k)) & 255
    draws[..., 8] = ids & 0xFFFF
    draws[..., 9] = (ids >> 16) & 255
    tint = (ids >> 24).astype(np.float32)
    draws[..., 10] = np.where(tint == 255, -1, tint)
    empty = np.arange(raw.shape[1])[None, :] >= head[:, 5:6]
    draws[empty] = 0
    draws[empty, 9:12] = -1
    return draws


def direction(dx, dy, least=1.0):
    """LEFT, RIGHT, UP, DOWN or STILL of a displacement in pixels a frame."""
    horizontal = np.abs(dx) >= np.abs(dy)
    way = np.where(horizontal, np.where(dx < 0, LEFT, RIGHT), np.where(dy < 0, UP, DOWN))
    return np.where(np.maximum(np.abs(dx), np.abs(dy)) < least, STILL, way)


def add_motion(draws, head):
    """Fills columns MOTION (11) and GONE (12: absent from the next frame) of draws [B, F, D, 16];
    returns which way the camera looks from the frame before to this, [B, F], UNKNOWN in the
    first."""
    clips, frames, room, _ = draws.shape
    there = np.arange(room)[None, None, :] < head[:, :, 5:6]
    now, before = draws[:, 1:], draws[:, :-1]
    pair = there[:, 1:, :, None] & there[:, :-1, None, :]
    same_name = pair & (now[..., :, None, 9] == before[..., None, :, 9])
    same = same_name & (now[..., :, None, 10] == before[..., None, :, 10])
    dx = now[..., :, None, 0] - before[..., None, :, 0]
    dy = now[..., :, None, 1] - before[..., None, :, 1]
    found = same.any(-1)
    lost = ~same.any(-2)
    near = same_name & ~found[..., None] & lost[..., None, :] & (
        np.maximum(np.abs(dx), np.abs(dy)) < NEWEST)
    which = same.argmax(-1)[..., None]
    way = direction(np.take_along_axis(dx, which, -1)[..., 0],
                    np.take_along_axis(dy, which, -1)[..., 0])
    motion = np.where(found, way, np.where(near.any(-1), RECOLOURED, NEW))
    draws[:, 1:, :, 11] = np.where(there[:, 1:], motion, UNKNOWN)
    draws[:, 0, :, 11] = UNKNOWN
    draws[:, :-1, :, 12] = there[:, :-1] & lost & ~near.any(-2)
    # 640 canvas pixels show tex_x1 - tex_x0 texels.
    scale = 640 / np.maximum(head[:, 1:, 2] - head[:, 1:, 0], 1e-3)
    camera = np.full((clips, frames), UNKNOWN, np.float32)
    camera[:, 1:] = direction((head[:, 1:, 0] - head[:, :-1, 0]) * scale,
                              (head[:, 1:, 1] - head[:, :-1, 1]) * scale)
    return camera


def pack_text(words, rows):
    lines, row_of, targets = [], [], []
    for r, (turns, again) in enumerate(rows):
        ids, wanted = words.dialogue(turns, again)
        lines.append(ids)
        targets += wanted
        row_of += [r] * len(wanted)
    length = -(-max(len(ids) for ids in lines) // 8) * 8
    tokens = np.full((len(lines), length), words.pad, np.int16)
    for r, ids in enumerate(lines):
        tokens[r, :len(ids)] = ids
    at, token, kind, turn, weight = zip(*targets)
    return {"tokens": tokens, "answer_row": np.array(row_of, np.int32),
            "answer_at": np.array(at, np.int32), "answer_token": np.array(token, np.int16),
            "answer_kind": np.array(kind, np.uint8), "answer_turn": np.array(turn, np.int16),
            "answer_weight": np.array(weight, np.float32)}


def describe(arrays):
    """Where each array lies in a slot: {name: [dtype, shape, offset]}, and the bytes of all."""
    layout, at = {}, 0
    for name, a in arrays.items():
        layout[name] = [a.dtype.str, list(a.shape), at]
        at = -(-(at + a.nbytes) // 256) * 256
    return layout, at


def work(args):
    """A worker: fills slots for ever. A line "N" on standard input hands slot N back; its end
    ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    words = Words(args.tokenizer)
    memory = mmap.mmap(args.memory, args.slots * SLOT_BYTES)
    rng = random.Random(args.base * 1000 + args.worker)
    lengths, weights = list(LENGTHS), list(LENGTHS.values())
    plan = json.loads(args.plan) if args.plan else None
    free = collections.deque(range(args.slots))
    batch = args.first_batch
    failures = 0
    while plan is None or plan:
        if plan:
            frames, clips, questions = plan.pop(0)
            seed = EVAL_SEED + args.base * 1_000_000 + batch
        else:
            frames = rng.choices(lengths, weights)[0]
            clips, questions = clips_of(frames, args.frames_a_step), questions_of(frames)
            seed = training_seed(args.base, args.worker, batch)
        batch += 1
        began = time.monotonic()
        try:
            arrays = build_batch(args.feed, words, seed, frames, clips, questions,
                                 args.plan is not None, rng)
        except (EOFError, ValueError, OSError) as error:
            print(f"[stream] seed {seed}, {frames} frames: {error}", file=sys.stderr, flush=True)
            failures += 1
            if failures > 20:
                return 1
            time.sleep(0.2)
            continue
        layout, size = describe(arrays)
        if size > SLOT_BYTES:
            raise ValueError(f"[stream] a batch of {size} bytes does not fit {SLOT_BYTES}")
        while not free:
            line = sys.stdin.readline()
            if not line:
                return 0
            free.append(int(line))
        slot = free.popleft()
        for name, a in arrays.items():
            at = slot * SLOT_BYTES + layout[name][2]
            np.frombuffer(memory, a.dtype, a.size, at)[:] = a.reshape(-1)
        print(json.dumps({"slot": slot, "frames": frames, "clips": clips, "bytes": size,
                          "layout": layout, "batch": batch, "questions": questions,
                          "seconds": round(time.monotonic() - began, 3)}), flush=True)
    return 0


# ---- the trainer's side --------------------------------------------------------------------------


class Batch:
    """A filled slot. `release` hands it back; its arrays must not be used after that."""

    def __init__(self, worker, message):
        self.worker, self.message = worker, message
        self.frames, self.clips = message["frames"], message["clips"]
        self.layout, self.bytes = message["layout"], message["bytes"]
        self.memory = np.frombuffer(worker.memory, np.uint8, self.bytes,
                                    message["slot"] * SLOT_BYTES)

    def arrays(self):
        return {name: self.memory[at:at + math.prod(shape) * np.dtype(kind).itemsize]
                .view(kind).reshape(shape) for name, (kind, shape, at) in self.layout.items()}

    def release(self):
        memory, self.memory = self.memory, None
        del memory
        self.worker.hand_back(self.message["slot"], self.message["process"])


class Worker:
    """A worker process, restarted when it dies; a thread puts its batches into `ready`."""

    def __init__(self, number, feed, tokenizer, base, slots, ready, plan=None,
                 frames_a_step=FRAMES_A_STEP):
        self.frames_a_step = frames_a_step
        self.number, self.ready, self.slots, self.plan = number, ready, slots, plan
        self.base, self.restarts, self.next_batch, self.closed = base, 0, 0, False
        self.renew_memory()
        self.feed, self.tokenizer = feed, tokenizer
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.closed:
            # Nice: the trainer's own thread must never wait for a core.
            command = ["nice", "-n", "5", sys.executable, os.path.abspath(__file__), "--feed", self.feed,
                       "--tokenizer", self.tokenizer, "--worker", str(self.number), "--base",
                       str(self.base), "--slots", str(self.slots), "--memory",
                       str(self.descriptor), "--first-batch", str(self.next_batch),
                       "--frames-a-step", str(self.frames_a_step)]
            if self.plan:
                command += ["--plan", json.dumps(self.plan)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                           "TOKENIZERS_PARALLELISM": "false"}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                pass_fds=[self.descriptor], env=environment)
            for line in self.process.stdout:
                message = json.loads(line)
                self.next_batch = message["batch"]
                message["process"] = self.process
                self.ready.put(Batch(self, message))
            code = self.process.wait()
            if self.closed or self.plan:
                break
            print(f"[stream] worker {self.number} ended with {code}; restarting", file=sys.stderr,
                  flush=True)
            self.restarts += 1
            self.next_batch += 10
            os.close(self.descriptor)
            self.renew_memory()
            time.sleep(min(5, self.restarts))

    def renew_memory(self):
        """Each process gets memory of its own; batches still out there keep the old mapping."""
        self.descriptor = os.memfd_create("sluice-stream")
        os.ftruncate(self.descriptor, self.slots * SLOT_BYTES)
        self.memory = mmap.mmap(self.descriptor, self.slots * SLOT_BYTES)

    @staticmethod
    def hand_back(slot, process):
        try:
            process.stdin.write(f"{slot}\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError, OSError):
            pass  # that process is gone, and its memory with it

    def close(self):
        self.closed = True
        self.process.kill()


class Stream:
    """Batches of `workers` processes in the order they come."""

    def __init__(self, feed, tokenizer, workers, base, frames_a_step=FRAMES_A_STEP, slots=2):
        self.ready = queue.Queue()
        self.workers = [Worker(i, feed, tokenizer, base, slots, self.ready, None, frames_a_step)
                        for i in range(workers)]

    def get(self, timeout=120):
        return self.ready.get(timeout=timeout)

    def close(self):
        for worker in self.workers:
            worker.close()


def evaluation_batches(feed, tokenizer, plan, base=0):
    """Copies of the batches of `plan` [(frames, clips, questions)], held-out seeds."""
    ready = queue.Queue()
    worker = Worker(0, feed, tokenizer, base, 1, ready, plan)
    batches = []
    for _ in plan:
        batch = ready.get(timeout=120)
        batches.append((batch.frames, batch.clips,
                        {k: a.copy() for k, a in batch.arrays().items()}))
        batch.release()
    worker.close()
    return batches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feed", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--base", type=int, default=1)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--frames-a-step", type=int, default=FRAMES_A_STEP)
    parser.add_argument("--first-batch", type=int, default=0)
    parser.add_argument("--plan")
    parser.add_argument("--measure", type=float, help="seconds: print clips/s of one worker")
    args = parser.parse_args()
    if args.measure:
        words, rng = Words(args.tokenizer), random.Random(0)
        began, clips, batch = time.monotonic(), 0, 0
        while time.monotonic() - began < args.measure:
            frames = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
            build_batch(args.feed, words, training_seed(99, 0, batch), frames, clips_of(frames),
                        questions_of(frames), False, rng)
            clips += clips_of(frames)
            batch += 1
        seconds = time.monotonic() - began
        print(f"{clips / seconds:.0f} clips/s, {batch / seconds:.2f} steps/s")
        return 0
    return work(args)


if __name__ == "__main__":
    sys.exit(main())
