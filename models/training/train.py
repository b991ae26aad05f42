#!/usr/bin/env python3
"""Trains a small LLaVA-OneVision from scratch on the demo world, on one GPU, for a given time.

One step: clips from `stream.py` -> pictures and patches (`render.py`) -> tower, projector, decoder
(`model.py`) -> language loss on the answers plus dense losses on what patches show
(`targets.py`) -> Muon and Adam (`optim.py`). Rates follow the clock, so the schedule ends when the
time does. Writes to --out: log.jsonl, export/ (a Hugging Face checkpoint, renewed every few
minutes and at the end), profile.txt with --profile. Ends early, but orderly, on SIGTERM.
"""

import argparse
import collections
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import export
import methods
import model
import optim
import render
import stream
import targets

KINDS = ["visible", "count", "total", "color", "size", "where", "side", "direction", "moving",
         "exists", "first", "last", "left", "happened", "camera", "caption"]
TAP = 4  # the decoder layer before which motion is asked of the picture's tokens
BOUNDARIES = (2, 4, 6)  # of PyramidDrop's stages
MOST_TURNS = 24  # of a dialogue, that rank
# (frames, clips, questions a clip): about as many frames as a step has, because a size far from
# those of training may make the compiler start anew.
QUICK_PLAN = [(8, 250, 6), (16, 150, 6), (32, 75, 8)]
FINAL_PLAN = [(4, 400, 8), (8, 300, 10), (12, 200, 12), (16, 150, 12), (24, 100, 12), (32, 75, 12),
              (48, 50, 12), (64, 36, 12)]


# ---- batches onto the device ---------------------------------------------------------------------


class Loader:
    """Copies batches to the device ahead of time, on a thread and a CUDA stream of its own."""

    def __init__(self, source, device, depth=3):
        self.source, self.device, self.ready = source, device, queue.Queue(maxsize=depth - 2)
        self.error, self.closed = None, False
        if device == "cpu":
            return
        self.copies = torch.cuda.Stream()
        self.slots = [{"host": torch.empty(stream.SLOT_BYTES, dtype=torch.uint8, pin_memory=True),
                       "device": torch.empty(stream.SLOT_BYTES, dtype=torch.uint8, device=device),
                       "copied": torch.cuda.Event(), "used": torch.cuda.Event()}
                      for _ in range(depth)]
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        free = 0
        while not self.closed:
            try:
                batch = self.source.get(timeout=20)
            except queue.Empty:
                print("[train] no batch for 20 s", file=sys.stderr, flush=True)
                continue
            # One slot is with the trainer, one waits, one is being filled: a slot that comes round
            # again has been handed back, and `used` says when the device is through with it.
            slot = self.slots[free]
            free = (free + 1) % len(self.slots)
            slot["copied"].synchronize()
            np.copyto(slot["host"].numpy()[:batch.bytes], batch.memory)
            info = (batch.frames, batch.clips, batch.layout, batch.bytes)
            batch.release()
            with torch.cuda.stream(self.copies):
                self.copies.wait_event(slot["used"])
                slot["device"][:info[3]].copy_(slot["host"][:info[3]], non_blocking=True)
                slot["copied"].record()
            self.ready.put((slot, info))

    def next(self):
        """(frames a clip, clips, {name: tensor}, what to call when the step is launched)."""
        if self.device == "cpu":
            batch = self.source.get()
            arrays = {k: torch.from_numpy(a.copy()) for k, a in batch.arrays().items()}
            out = batch.frames, batch.clips, arrays, lambda: None
            batch.release()
            return out
        slot, (frames, clips, layout, _) = self.ready.get(timeout=180)
        torch.cuda.current_stream().wait_event(slot["copied"])
        return frames, clips, on_device(slot["device"], layout), slot["used"].record


def on_device(memory, layout):
    """Views of the arrays of a batch that lies in `memory`."""
    out = {}
    for name, (kind, shape, at) in layout.items():
        kind = getattr(torch, np.dtype(kind).name)
        size = math.prod(shape) * kind.itemsize
        out[name] = memory[at:at + size].view(kind).view(shape)
    return out


# ---- one step ------------------------------------------------------------------------------------


class Trainer:
    def __init__(self, options, shape, renderer):
        self.options, self.shape, self.renderer = options, shape, renderer
        device, self.device = options.device, options.device
        self.dtype = torch.bfloat16 if device != "cpu" else torch.float32
        self.model = model.Model(shape, compiled=options.compile, device=device)
        weights = model.init_weights(shape, options.seed, device)
        if options.start:
            begun = export.from_hugging_face(options.start, shape)
            assert begun.keys() == weights.keys(), weights.keys() ^ begun.keys()
            weights = {name: begun[name].to(device) for name in weights}
        parts = optim.matrix_parts(weights, shape)
        self.model_names = list(weights)
        weights |= targets.head_weights(shape, options.seed + 1, device)
        self.optimiser = optim.Optimiser(weights, parts, self.dtype)
        self.words = stream.Words(options.tokenizer)
        self.prefix = torch.tensor(self.words.prefix, device=device)[None]
        self.patch_loss = model.dynamic(targets.patch_loss, options.compile, 1, extra=(3, 4, 5))
        self.motion_loss = model.dynamic(targets.motion_loss, options.compile, 1, extra=(3,))
        self.motion_weights = torch.tensor(targets.MOTION_WEIGHTS, device=device).float()
        self.random = np.random.default_rng(options.seed)
        self.kind_loss = torch.zeros(2, 256, device=device)
        self.marks = collections.OrderedDict()

    def mark(self, name):
        """Remembers when the device gets here in this step."""
        if self.device != "cpu":
            self.marks[name] = torch.cuda.Event(enable_timing=True)
            self.marks[name].record()

    def part_times(self):
        """Milliseconds between the marks of the last step. Waits for the device."""
        if self.device == "cpu":
            return {}
        torch.cuda.synchronize()
        names = list(self.marks)
        return {b: round(self.marks[a].elapsed_time(self.marks[b]), 1)
                for a, b in zip(names, names[1:])}

    def patches(self, batch, frames, spoiled):
        return self.renderer.patches(batch["textures"], batch["frames"], batch["draws"], frames,
                                     spoiled)

    def kept(self, clips, frames, shown, ratio):
        """[clips, K] indices, increasing, of the tokens that stay when a share `ratio` of them
        does: at random; or rather objects; or rather objects, with whole earlier frames gone.
        shown [N, G] tells which tokens show an object."""
        cells = shown.shape[1]
        score = torch.rand(clips, frames, cells, device=self.device)
        mode = int(self.random.integers(3))
        if mode:
            score += 0.5 * shown.view(clips, frames, cells)
        if mode == 2:
            score[:, -1] += 0.5
            score[:, :-1] -= (torch.rand(clips, frames - 1, 1, device=self.device) < 0.3).float()
        keep = max(cells // 2, int(ratio * frames * cells))
        return score.flatten(1).topk(keep, 1).indices.sort(1).values

    def reuse(self, frames):
        """What the tower takes over from reference frames in this step, if anything."""
        if self.random.random() >= 0.35:
            return None
        interval = int(self.random.choice([2, 4]))
        if frames % interval:
            interval = 2 if frames % 2 == 0 else 1
        if interval == 1:
            return None
        ratio = 0.25 if self.random.random() < 0.6 else self.random.uniform(0.15, 0.5)
        return methods.Reuse(interval, ratio, shared=self.random.random() < 0.5)

    def fewer(self, visual, clips, frames, shown, motion):
        """Visual rows [N, G, D] and their motion [N, G] -> [clips, K, D] and [clips, K]: all of
        them, or what is left when a method of selection, or chance, has passed."""
        cells, d = visual.shape[1:]
        fate = self.random.random()
        keep = cells // 3 if self.random.random() < 0.6 else int(
            self.random.integers(cells // 5, cells * 4 // 5))
        if fate < 0.2:  # STC-Pruner
            at = methods.pruner_keeps(visual.detach().view(clips, frames, cells, d), keep)
            visual = methods.take(visual, at.view(-1, keep))
            motion = motion.gather(1, at.view(-1, keep))
        elif fate < 0.35:  # merging
            visual, at = methods.merge(visual, keep)
            motion = motion.gather(1, at)
        rows, motion = visual.reshape(clips, -1, d), motion.reshape(clips, -1)
        if 0.35 <= fate < 0.5:
            at = self.kept(clips, frames, shown, self.random.uniform(0.25, 0.95))
            rows, motion = methods.take(rows, at), motion.gather(1, at)
        return rows, motion

    def ranking(self, batch, begin, end, ratio):
        """PyramidDrop for all questions of a dialogue together: the rows that are asked of answers'
        first tokens rank, each as much as the others."""
        row, turn = batch["answer_row"].long(), batch["answer_turn"].long().clamp(max=MOST_TURNS - 1)
        rows = batch["tokens"].shape[0]
        none = batch["tokens"].shape[1]
        first = torch.full((rows * MOST_TURNS,), none, device=self.device)
        first.scatter_reduce_(0, row * MOST_TURNS + turn, batch["answer_at"].long(), "amin")
        asking = first.view(rows, MOST_TURNS)
        # Text row 0 is the newline row's place + 1.
        return methods.Ranking(BOUNDARIES, ratio, begin, end, asking.clamp(max=none - 1) + 1,
                               (asking < none).float())

    def language_loss(self, w, hidden, base, batch):
        """Weighted mean cross entropy of the answers' tokens. hidden [R, S, D]."""
        rows, length, d = hidden.shape
        at = batch["answer_row"].long() * length + batch["answer_at"].long() + base
        picked = hidden.reshape(rows * length, d)[at]
        logits = F.linear(picked, w["embed"]).float()
        loss = F.cross_entropy(logits, batch["answer_token"].long(), reduction="none")
        weight = batch["answer_weight"]
        with torch.no_grad():
            kind = batch["answer_kind"].long()
            self.kind_loss[0].index_add_(0, kind, loss.detach() * weight)
            self.kind_loss[1].index_add_(0, kind, weight)
        return (loss * weight).sum() / weight.sum()

    def step(self, batch, frames, clips, rates, dense):
        """One update; returns a tensor of numbers for the log."""
        self.marks.clear()
        self.mark("begin")
        w, shape = self.optimiser.live, self.shape
        with torch.no_grad():
            patches = self.patches(batch, frames, spoiled=True)
            self.mark("render")
            draws, heads = batch["draws"], batch["frames"]
            wanted = targets.patch_targets(draws, heads[:, 5], shape.grid)
            pooled_wanted = targets.patch_targets(draws, heads[:, 5], shape.pooled)
            motion = targets.motion_targets(draws, heads, shape.pooled, frames)
        self.mark("targets")
        features, visual = self.model.tower(w, patches, self.reuse(frames))
        loss_patch, said_patch = self.patch_loss(features, w["head.patch.w"], w["head.patch.b"],
                                                 *wanted)
        loss_pooled, said_pooled = self.patch_loss(visual, w["head.pooled.w"], w["head.pooled.b"],
                                                   *pooled_wanted)
        self.mark("tower")
        d = visual.shape[-1]
        shown = (pooled_wanted[0] != targets.BACKGROUND).float()
        rows, motion = self.fewer(visual, clips, frames, shown, motion)
        x = self.model.splice(w, rows, self.prefix, batch["tokens"].long())
        begin, end = self.prefix.shape[1], self.prefix.shape[1] + rows.shape[1]
        ranking = None
        if self.random.random() < 0.15:
            ranking = self.ranking(batch, begin, end, self.random.uniform(0.5, 0.8))
        hidden, tapped = self.model.decode(w, x, TAP, ranking)
        loss_motion, said_motion = self.motion_loss(
            tapped[:, begin:end].reshape(-1, d), w["head.motion.w"], w["head.motion.b"],
            motion.reshape(-1), self.motion_weights)
        loss_text = self.language_loss(w, hidden, end + 1, batch)
        self.mark("decoder")
        loss = loss_text + dense * (loss_patch + loss_pooled + loss_motion)
        if self.device != "cpu":
            between = torch.cuda.Event(enable_timing=True)
            rows.register_hook(lambda g: between.record())
            loss.backward()
            self.marks["decoder_backward"] = between
        else:
            loss.backward()
        self.mark("tower_backward")
        self.optimiser.step(*rates)
        self.mark("optimiser")
        return torch.cat([torch.stack([loss_text, loss_patch, loss_pooled, loss_motion,
                                       self.optimiser.norm, self.optimiser.skipped]).detach(),
                          said_patch, said_pooled, said_motion])

    NUMBERS = ["text", "patch", "pooled", "motion", "grad_norm", "skipped", "patch_name",
               "patch_colour", "patch_off", "pooled_name", "pooled_colour", "pooled_off",
               "motion_right"]

    # ---- evaluation ----

    def evaluate(self, batches, keep=None, reuse=None, prune=None, merge=None, rank=None):
        """Exact match of greedy answers, each question asked first about the whole clip.

        Scored under teacher forcing: greedy decoding gives exactly the expected answer if and only
        if every token of it, <|im_end|> included, is the most likely one after those before it.
        Gradients stay enabled, so that the compiled training graphs serve here too.
        `keep`: only that share of the visual tokens, drawn at random. `reuse`: methods.Reuse.
        `prune`, `merge`: so many tokens of a frame, by STC-Pruner or merging. `rank`: PyramidDrop
        keeps that share at every boundary, ranked by the one question of a row.
        """
        right, asked = collections.Counter(), collections.Counter()
        lengths = {}
        answers = collections.defaultdict(collections.Counter)
        w = self.optimiser.live
        for frames, clips, arrays in batches:
            batch = {k: torch.from_numpy(a).to(self.device) for k, a in arrays.items()}
            with torch.no_grad():
                patches = self.patches(batch, frames, spoiled=False)
            _, visual = self.model.tower(w, patches, reuse)
            visual = visual.detach()
            if prune:
                at = methods.pruner_keeps(visual.view(clips, frames, *visual.shape[1:]), prune)
                visual = methods.take(visual, at.flatten(0, 1))
            if merge:
                visual, _ = methods.merge(visual, merge)
            visual = visual.reshape(clips, -1, visual.shape[-1])
            if keep:
                total = visual.shape[1]
                at = torch.rand(clips, total, device=self.device).topk(int(total * keep), 1)
                visual = methods.take(visual, at.indices.sort(1).values)
            base = self.prefix.shape[1] + visual.shape[1] + 1
            rows = arrays["tokens"].shape[0]
            good = torch.ones(rows, device=self.device)
            for row in range(0, rows, clips):
                mine = (arrays["answer_row"] >= row) & (arrays["answer_row"] < row + clips)
                mine = torch.from_numpy(np.nonzero(mine)[0]).to(self.device)
                x = self.model.splice(w, visual, self.prefix,
                                      batch["tokens"][row:row + clips].long())
                ranking = None
                if rank:
                    begin = self.prefix.shape[1]
                    part = {k: batch[k][mine] for k in ("answer_row", "answer_at", "answer_turn")}
                    part["answer_row"] = part["answer_row"] - row
                    part["tokens"] = batch["tokens"][row:row + clips]
                    ranking = self.ranking(part, begin, begin + visual.shape[1], rank)
                hidden, _ = self.model.decode(w, x, ranking=ranking)
                at = batch["answer_row"][mine].long()
                picked = hidden.detach()[at - row, base + batch["answer_at"][mine].long()]
                said = F.linear(picked, w["embed"].detach()).argmax(-1)
                wrong = said != batch["answer_token"][mine].long()
                good.index_put_((at[wrong],), torch.zeros((), device=self.device))
            good = good.cpu().numpy()
            first, last = first_and_last(arrays["answer_row"])
            hits = []
            for row in range(rows):
                kind = int(arrays["answer_kind"][first[row]])
                if kind == stream.NO_KIND:
                    continue
                asked[kind] += 1
                right[kind] += int(good[row])
                hits.append(good[row])
                answers[kind][arrays["answer_token"][first[row]:last[row]].tobytes()] += 1
            lengths[str(frames)] = round(float(np.mean(hits)), 4)
        kinds = {KINDS[k]: [round(right[k] / asked[k], 4),
                            round(max(answers[k].values()) / asked[k], 4), asked[k]]
                 for k in sorted(asked)}
        return {"mean_over_kinds": round(float(np.mean([v[0] for v in kinds.values()])), 4),
                "mean": round(sum(right.values()) / sum(asked.values()), 4),
                "kinds_right_majority_asked": kinds, "by_frames": lengths}

    def export(self, average):
        weights = self.optimiser.weights(average)
        assert all(bool(torch.isfinite(t).all()) for t in weights.values()), "[train] weights lost"
        export.export(os.path.join(self.options.out, "export"),
                      {k: weights[k] for k in self.model_names}, self.shape, self.options.tokenizer)


def first_and_last(rows):
    """[R] begin and end of each row's run in an increasing array of row numbers."""
    first = np.searchsorted(rows, np.arange(rows[-1] + 1))
    return first, np.append(first[1:], len(rows))


# ---- choices made on the device ------------------------------------------------------------------


def time_call(call, repeats=4):
    """Milliseconds, the least of `repeats` after one warm-up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        best = min(best, a.elapsed_time(b))
    return best


def choose_attention(trainer, log):
    """Times the attention kernels forwards and backwards on shapes of training, checks them
    against float32 arithmetic, keeps the fastest right ones."""
    s, device = trainer.shape, trainer.device
    g = torch.Generator(device).manual_seed(3)

    def qkv(batch, length, heads, kv):
        x = torch.randn(batch, length, heads + 2 * kv, s.head_dim, device=device, generator=g)
        x = x.bfloat16().requires_grad_()
        q, k, v = x.split([heads, kv, kv], 2)
        return x, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def choose(name, shape, candidates):
        x, q, k, v = qkv(*shape)
        small = [t[:2].detach().float() for t in (q, k, v)]
        many = [t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in small]
        times = {}
        for label, attention in candidates.items():
            try:
                many_out = F.scaled_dot_product_attention(*many, is_causal=attention.causal)
                want = many_out.transpose(1, 2).flatten(2)
                out = attention(q, k, v)
                error = ((out[:2].float() - want).norm() / want.norm()).item()
                assert error < 2e-2, f"relative error {error}"
                grad = torch.randn_like(out)

                def both():
                    torch.autograd.grad(attention(q, k, v), x, grad)

                times[label] = round(time_call(both), 2)
            except Exception as error:  # a kernel that this GPU or version lacks
                times[label] = None
                log(event="attention_failed", where=name, kernel=label, why=str(error)[:200])
        fastest = min((t, label) for label, t in times.items() if t is not None)[1]
        log(event="attention", where=name, milliseconds=times, chosen=fastest)
        return candidates[fastest]

    make = model.Attention
    head = s.vision_heads
    trainer.model.see = choose("tower", (trainer.options.frames_a_step, s.grid**2, head, head), {
        "flash": make(False, SDPBackend.FLASH_ATTENTION),
        "cudnn": make(False, SDPBackend.CUDNN_ATTENTION)})
    # cuDNN would plan anew for every length, so only flash here.
    trainer.model.think = choose("decoder", (200, 850, s.heads, s.kv_heads), {
        "flash_grouped": make(True, SDPBackend.FLASH_ATTENTION),
        "flash_expanded": make(True, SDPBackend.FLASH_ATTENTION, expand=True)})


def time_products(log):
    """How fast the matrix products of the tower run, weight gradients included."""
    tokens = stream.FRAMES_A_STEP * 196
    out = {}
    for a, b in ((256, 1024), (256, 768), (256, 256)):
        x = torch.randn(tokens, a, device="cuda").bfloat16()
        y = torch.randn(tokens, b, device="cuda").bfloat16()
        m = torch.randn(b, a, device="cuda").bfloat16()
        flops = 2 * tokens * a * b / 1e9
        out[f"{a}x{b}"] = {
            "forward_tflops": round(flops / time_call(lambda: x @ m.T)),
            "gradient_tflops": round(flops / time_call(lambda: y.T @ x)),
            "gradient_split_tflops": round(flops / time_call(
                lambda: torch.bmm(y.view(16, -1, b).mT, x.view(16, -1, a)).sum(0)))}
    log(event="products", **out)


# ---- the run -------------------------------------------------------------------------------------


def rate(progress, warm=0.015, hold=0.45):
    """Rises, stays, falls linearly to nothing."""
    if progress < warm:
        return max(0.02, progress / warm)
    if progress < hold:
        return 1.0
    return max(0.0, (1 - progress) / (1 - hold))


def dense_weight(progress, started):
    return 0.1 if started else max(0.1, 1 - progress / 0.65)


class Log:
    def __init__(self, path):
        self.file, self.began = open(path, "a"), time.monotonic()

    def __call__(self, **fields):
        line = json.dumps({"t": round(time.monotonic() - self.began, 1), **fields})
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)


def train(options, shape, renderer_of, log):
    began = time.monotonic()
    ends = began + options.minutes * 60
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    source = stream.Stream(options.feed, options.tokenizer, options.workers, options.base,
                           options.frames_a_step)
    trainer = Trainer(options, shape, renderer_of())
    cuda = options.device != "cpu"
    if cuda:
        choose_attention(trainer, log)
        if options.profile:
            time_products(log)
    loader = Loader(source, options.device)
    quick = stream.evaluation_batches(options.feed, options.tokenizer, options.quick_plan, 0)
    final = stream.evaluation_batches(options.feed, options.tokenizer, options.final_plan, 1)
    log(event="ready", seconds=round(time.monotonic() - began, 1), workers=options.workers,
        parameters=sum(trainer.optimiser.live[k].numel() for k in trainer.model_names))

    # The clock of the schedule starts when everything is compiled.
    reserve = options.reserve
    start, last_log, step, waited = None, time.monotonic(), 0, 0.0
    next_export = next_quick = None
    done = collections.deque()
    snapshot, skipped_before = trainer.optimiser.snapshot(), 0.0
    damp = 1.0
    steps_logged, frames_logged = 0, 0
    profiler = None
    try:
        while not stopping.is_set():
            now = time.monotonic()
            if step == options.warm_steps:
                if cuda:
                    torch.cuda.synchronize()
                now = start = last_log = time.monotonic()
                next_export, next_quick = now + options.export_every, now + options.quick_every
                log(event="compiled", seconds=round(start - began, 1), graphs=compiled_graphs())
            progress = 0.0 if start is None else (now - start) / max(1.0, ends - reserve - start)
            if progress >= 1 or (options.steps and step >= options.steps):
                break
            frames, clips, batch, hand_back = loader.next()
            waited += time.monotonic() - now
            r = rate(progress) * damp
            numbers = trainer.step(batch, frames, clips,
                                   (options.muon_rate * r, options.adam_rate * r),
                                   dense_weight(progress, bool(options.start)))
            hand_back()
            step += 1
            steps_logged += 1
            frames_logged += frames * clips
            if cuda:
                done.append(torch.cuda.Event())
                done[-1].record()
                if len(done) > 2:  # the host may be two steps ahead, no more
                    done.popleft().synchronize()

            if options.profile and start is not None:
                since = step - options.warm_steps
                if since == 10:
                    profiler = torch.profiler.profile(activities=[
                        torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU])
                    profiler.start()
                elif since == 14 and profiler:
                    torch.cuda.synchronize()
                    profiler.stop()
                    table = profiler.key_averages().table(
                        sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
                    with open(os.path.join(options.out, "profile.txt"), "w") as f:
                        f.write(table)
                    profiler = None

            if step % options.log_every == 0:
                values = dict(zip(trainer.NUMBERS, (round(v, 4) for v in numbers.tolist())))
                now = time.monotonic()
                sums = trainer.kind_loss.tolist()
                trainer.kind_loss.zero_()
                kinds = {KINDS[k]: round(sums[0][k] / sums[1][k], 3)
                         for k in range(len(KINDS)) if sums[1][k] > 0}
                log(event="step", step=step, progress=round(progress, 4), rate=round(r, 4),
                    seconds=round((now - last_log) / steps_logged, 4),
                    waited=round(waited / steps_logged, 4),
                    frames=frames_logged // steps_logged, parts=trainer.part_times(),
                    queued=source.ready.qsize(), **values, kinds=kinds)
                last_log, waited, steps_logged, frames_logged = now, 0.0, 0, 0
                bad = values["skipped"] - skipped_before
                skipped_before = values["skipped"]
                if bad > options.log_every // 2:
                    # Gradients that stay broken mean broken weights: go back, go slower.
                    damp *= 0.5
                    trainer.optimiser.restore(snapshot)
                    log(event="restored", step=step, damp=damp)
                elif bad == 0 and start is not None and step % (options.log_every * 20) == 0:
                    snapshot = trainer.optimiser.snapshot()

            if start is not None and now >= next_quick:
                next_quick = now + options.quick_every
                log(event="evaluation", step=step, which="quick", **trainer.evaluate(quick))
                last_log, steps_logged, frames_logged = time.monotonic(), 0, 0
            if start is not None and now >= next_export:
                next_export = now + options.export_every
                trainer.export(average=True)
                log(event="export", step=step)
                last_log, steps_logged, frames_logged = time.monotonic(), 0, 0
    except BaseException:
        log(event="broken", step=step, why=traceback.format_exc()[-3000:])
        trainer.optimiser.publish()
        trainer.export(average=True)
        log(event="export", step=step)
        raise
    finally:
        loader.closed = True
        source.close()
    log(event="trained", step=step, seconds=round(time.monotonic() - began, 1),
        memory_gb=round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else 0)
    trainer.export(average=True)  # first of all, something to keep
    results = {}
    for average in (False, True):
        trainer.optimiser.publish(average)
        results[average] = trainer.evaluate(final)
        log(event="evaluation", step=step, which="average" if average else "last",
            **results[average])
    best = max(results, key=lambda a: results[a]["mean_over_kinds"])
    trainer.optimiser.publish(best)
    trainer.export(average=best)
    log(event="export", step=step, which="average" if best else "last",
        seconds=round(time.monotonic() - began, 1))
    third = shape.pooled**2 // 3
    two, four = methods.Reuse(2, 0.25), methods.Reuse(4, 0.25)
    for which in ({}, {"keep": 0.33}, {"reuse": two}, {"reuse": four}, {"prune": third},
                  {"merge": third}, {"reuse": two, "prune": third}, {"reuse": four, "merge": third},
                  {"rank": 0.5}):
        result = trainer.evaluate([b for b in final if b[0] == final[2][0]], **which)
        log(event="evaluation", step=step, which=str(which), **result)
    log(event="finished", seconds=round(time.monotonic() - began, 1), graphs=compiled_graphs())


def compiled_graphs():
    from torch._dynamo.utils import counters
    return counters["stats"].get("unique_graphs", 0)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--feed", required=True, help="the world_feed program")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json")
    parser.add_argument("--atlas", required=True, help="the sprite sheet, demos/world/assets")
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, required=True, help="all in all, compiling too")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1, help="of the weights")
    parser.add_argument("--start", help="a checkpoint of an earlier run to go on from")
    parser.add_argument("--base", type=int, default=1, help="of the training clips")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.002)
    parser.add_argument("--reserve", type=float, default=25, help="seconds for the last evaluation")
    parser.add_argument("--export-every", type=float, default=240)
    parser.add_argument("--quick-every", type=float, default=150)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--warm-steps", type=int, default=6)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many; 0 for no limit")
    parser.add_argument("--frames-a-step", type=int, default=stream.FRAMES_A_STEP)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args(arguments)
    options.quick_plan, options.final_plan = QUICK_PLAN, FINAL_PLAN
    return options


def main():
    options = parse()
    os.makedirs(options.out, exist_ok=True)
    # Sizes that change are marked (model.dynamic); all others are compiled as they are.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64  # rather slow than broken
    torch._logging.set_logs(recompiles=True)
    # Sums of split products stay float32: weight gradients add up half a million rows.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    shape = model.Shape()
    log = Log(os.path.join(options.out, "log.jsonl"))
    if options.device == "cuda":
        log(event="device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    train(options, shape, lambda: render.Renderer(options.atlas, options.device), log)


if __name__ == "__main__":
    main()
