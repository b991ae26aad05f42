#!/usr/bin/env python3
"""Checks of the recipe that need no GPU. Usage: TRITON_INTERPRET=1 python3 recipe_test.py
Needs g++ (for world_feed) and transformers (the reference the model is compared with)."""

import os
import random
import subprocess
import sys
import tempfile
import unittest

os.environ["TRITON_INTERPRET"] = "1"
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)

import numpy as np
import torch
from PIL import Image

import export
import make_tokenizer
import methods
import model
import optim
import render
import stream
import targets

ATLAS = os.path.join(ROOT, "demos/world/assets/atlas.png")


def numpy_picture(texture, head, draws, cells):
    """[360, 640, 3]: render.h's definition, one line after another."""
    x, y = np.meshgrid(np.arange(640) + 0.5, np.arange(360) + 0.5)

    def bilinear(image, u, v, clamp):
        h, w = image.shape[:2]
        out = 0
        fu, fv = np.floor(u - 0.5), np.floor(v - 0.5)
        for dy in (0, 1):
            for dx in (0, 1):
                i, j = (fu + dx).astype(int), (fv + dy).astype(int)
                inside = ((i >= 0) & (i < w) & (j >= 0) & (j < h)) | clamp
                weight = np.abs(1 - dx - (u - 0.5 - fu)) * np.abs(1 - dy - (v - 0.5 - fv))
                texel = image[np.clip(j, 0, h - 1), np.clip(i, 0, w - 1)].astype(np.float64)
                out = out + texel * (weight * inside)[..., None]
        return out

    tx0, ty0, tx1, ty1, gain, count = head[:6]
    picture = bilinear(texture, tx0 + (tx1 - tx0) * x / 640, ty0 + (ty1 - ty0) * y / 360, True)
    for d in draws[:int(count)]:
        cx, cy, size, opacity = d[:4]
        level = cells[int(d[render.SPRITE])]
        for _ in range(int(d[render.MIP])):
            level = (level[0::2, 0::2] + level[0::2, 1::2] + level[1::2, 0::2] + level[1::2, 1::2]
                     + 2) >> 2
        side = level.shape[0]
        p = bilinear(level, ((x - cx) / size + 0.5) * side, ((y - cy) / size + 0.5) * side, False)
        picture = picture * (1 - p[..., 3:] / 255 * opacity) + p[..., :3] * d[4:7] / 255 * opacity
    return np.clip(np.floor(picture * gain + 0.5), 0, 255)


class RecipeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.feed = os.path.join(cls.folder.name, "world_feed")
        parts = [f"demos/world/{n}.cc" for n in ("names", "questions", "scene", "texture")]
        subprocess.run(["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-I.", "-o", cls.feed,
                        "models/training/world_feed.cc", *parts], cwd=ROOT, check=True)
        cls.tokenizer = os.path.join(cls.folder.name, "tokenizer.json")
        make_tokenizer.train(cls.feed, clips=300).save(cls.tokenizer)
        cls.words = stream.Words(cls.tokenizer)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def batch(self, frames, clips, questions, evaluation=False):
        return stream.build_batch(self.feed, self.words, stream.training_seed(1, 0, 7), frames,
                                  clips, questions, evaluation, random.Random(0))

    def test_pieces_of_a_dialogue_are_the_tokens_of_the_whole_text(self):
        batch = self.batch(8, 6, 12)
        for row in batch["tokens"].tolist():
            while row[-1] == self.words.pad:
                row.pop()
            text = self.words.tokenizer.decode(row, skip_special_tokens=False)
            self.assertEqual(self.words.tokenizer.encode(text).ids, row)

    def test_any_text_survives_a_round_trip(self):
        for text in ("Hello, wörld! ½ 你好 😀\n\n  x\ty", "a red star", "\0\x7f"):
            ids = self.words.tokenizer.encode(text).ids
            self.assertEqual(self.words.tokenizer.decode(ids), text)

    def test_answers_are_asked_of_the_token_before_them(self):
        for evaluation in (False, True):
            b = self.batch(8, 6, 10, evaluation)
            said = b["tokens"][b["answer_row"], b["answer_at"] + 1]
            np.testing.assert_array_equal(said, b["answer_token"])
            self.assertTrue((np.diff(b["answer_row"]) >= 0).all())

    def test_stale_turns_have_no_targets(self):
        turns = [(0, 1, "What is visible?", "a cat"), (1, 0, "How many are visible?", "two")]
        _, wanted = self.words.dialogue(turns)
        self.assertEqual({turn for _, _, _, turn, _ in wanted}, {1})

    def test_kernel_draws_what_the_definition_says(self):
        b = self.batch(4, 2, 4)
        frame = int(b["frames"][:, 5].argmax())
        renderer = render.Renderer(ATLAS, "cpu", chunk=1, dtype=torch.float32)
        words = torch.nn.functional.pad(torch.from_numpy(b["textures"]), (0, 1))
        got = renderer.draw(words.view(torch.int32).squeeze(-1), torch.from_numpy(b["frames"]),
                            torch.from_numpy(b["draws"]), 4, frame, 1)
        sheet = np.asarray(Image.open(ATLAS).convert("RGBA"), dtype=np.int64)
        cells = sheet.reshape(-1, 128, 8, 128, 4).swapaxes(1, 2).reshape(-1, 128, 128, 4)
        cells = np.concatenate([(cells[..., :3] * cells[..., 3:] + 127) // 255, cells[..., 3:]], -1)
        want = numpy_picture(b["textures"][frame // 4], b["frames"][frame].astype(np.float64),
                             b["draws"][frame].astype(np.float64), cells)
        error = np.abs(got[0].permute(1, 2, 0).numpy() - want)
        self.assertLessEqual(error.max(), 1)
        self.assertLess((error > 0).mean(), 1e-3)  # float32 beside float64, at halves only

    def test_resize_is_pillow_s(self):
        picture = np.random.default_rng(0).integers(0, 256, (360, 640, 3), dtype=np.uint8)
        want = np.asarray(Image.fromarray(picture).resize((224, 224), Image.BICUBIC), np.float32)
        renderer = render.Renderer(ATLAS, "cpu", chunk=1, dtype=torch.float32)
        renderer.picture[0] = torch.from_numpy(picture).permute(2, 0, 1).float()
        got = renderer.resize(renderer.picture)
        got = torch.floor(got + 0.5).clamp(0, 255)[0].permute(1, 2, 0).numpy()
        self.assertLessEqual(np.abs(got - want).max(), 1)
        self.assertLess((got != want).mean(), 0.01)  # halves, and Pillow's 22-bit weights

    def test_targets_name_what_a_cell_shows(self):
        draws = torch.zeros(2, 8, 16)
        draws[:, :, 9:12] = -1
        for f, x in ((0, 100.0), (1, 120.0)):
            draws[f, 0, :4] = torch.tensor([x, 90, 80, 1])
            draws[f, 0, 9:12] = torch.tensor([6.0, 5.0, -1.0 if f == 0 else stream.RIGHT])
        frames = torch.zeros(2, 8)
        frames[:, 5] = 1
        frames[0, 6] = -1
        name, colour, measures = targets.patch_targets(draws, frames[:, 5], 14)
        cell = 3 * 14 + 2  # holds (114, 90)
        self.assertEqual((name[0, cell].item(), colour[0, cell].item()), (6, 5))
        self.assertEqual(name[0, 0].item(), targets.BACKGROUND)
        self.assertAlmostEqual(measures[0, cell, 2].item(), (100 - 320) / 160, places=5)
        motion = targets.motion_targets(draws, frames, 7, 2)
        self.assertTrue((motion[0] == targets.IGNORE).all())
        self.assertEqual(motion[1, 7 + 1].item(), stream.RIGHT)
        self.assertEqual(motion[1, 48].item(), targets.GROUND_STILL)

    def test_muon_steps_are_nearly_orthogonal(self):
        g = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(optim.orthogonalise(g).float())
        self.assertGreater(values.min().item(), 0.5)  # what five steps promise
        self.assertLess(values.max().item(), 1.3)

    def test_a_step_with_broken_gradients_changes_nothing(self):
        shape = model.Shape(image=64, vision_width=64, vision_layers=1, vision_heads=1,
                            vision_mlp=64, width=64, layers=2, heads=1, mlp=64)
        weights = model.init_weights(shape, 0)
        optimiser = optim.Optimiser(weights, optim.matrix_parts(weights, shape), torch.float32)
        for name, t in optimiser.live.items():
            t.grad = torch.full_like(t, float("nan") if name == "embed" else 1.0)
        optimiser.step(0.1, 0.1)
        for name, t in optimiser.weights().items():
            torch.testing.assert_close(t, weights[name], rtol=0, atol=0)
        self.assertEqual(optimiser.skipped.item(), 1)

    SMALL = model.Shape(image=64, vision_width=64, vision_layers=3, vision_heads=2, vision_mlp=96,
                        width=64, layers=4, heads=2, head_dim=32, mlp=96)

    def random_weights(self, shape):
        g = torch.Generator().manual_seed(5)
        return {k: t + 0.1 * torch.randn(t.shape, generator=g)
                for k, t in model.init_weights(shape, 0).items()}

    def test_a_tower_that_computes_all_afresh_is_the_plain_one(self):
        weights, net = self.random_weights(self.SMALL), model.Model(self.SMALL)
        patches = torch.randn(8, 16, 768)
        for got, want in zip(net.tower(weights, patches, methods.Reuse(4, 1.0)),
                             net.tower(weights, patches)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_a_cached_tower_takes_over_what_a_layer_adds(self):
        """One frame after another, one layer after another, as the runtime does it."""
        shape, g = self.SMALL, torch.Generator().manual_seed(2)
        w, net = self.random_weights(shape), model.Model(shape)
        patches = torch.randn(2, 16, 768, generator=g)
        patches[1, 3:] = patches[0, 3:] + 0.1 * torch.randn(13, 768, generator=g)
        got = net.tower(w, patches, methods.Reuse(2, 0.25))[0]
        x = patches @ w["tower.patch.w"].T + w["tower.patch.b"] + w["tower.pos"]
        reference, out = [], []
        for frame in range(2):
            h = x[frame]
            for i in range(shape.vision_layers):
                p = {k: w[f"tower.{i}.{k}"] for k in (
                    "ln1.w", "ln1.b", "qkv.w", "qkv.b", "out.w", "out.b", "ln2.w", "ln2.b",
                    "fc1.w", "fc1.b", "fc2.w", "fc2.b")}
                q, k, v = (model._ln(h, p["ln1.w"], p["ln1.b"], 1e-6) @ p["qkv.w"].T
                           + p["qkv.b"]).chunk(3, -1)
                fresh = torch.ones(16, dtype=torch.bool)
                if frame:
                    cosine = torch.cosine_similarity(k, reference[i][0], dim=-1)
                    fresh = torch.zeros(16, dtype=torch.bool)
                    fresh[cosine.argsort()[:4]] = True
                    v = torch.where(fresh[:, None], v, reference[i][1])
                heads = [t.view(16, 2, 32).transpose(0, 1) for t in (q, k, v)]
                a = torch.softmax(heads[0] @ heads[1].mT / 32**0.5, -1) @ heads[2]
                mlp = [p[n] for n in ("out.w", "out.b", "ln2.w", "ln2.b", "fc1.w", "fc1.b",
                                      "fc2.w", "fc2.b")]
                added = model._tower_mlp(h, a.transpose(0, 1).flatten(1), *mlp) - h
                if frame:
                    added = torch.where(fresh[:, None], added, reference[i][2])
                else:
                    reference.append((k, v, added))
                h = h + added
            out.append(h)
        torch.testing.assert_close(got, torch.stack(out), rtol=1e-4, atol=1e-4)

    def test_text_sees_only_the_rows_that_rank_high(self):
        shape, g = self.SMALL, torch.Generator().manual_seed(3)
        net = model.Model(shape)
        q, k, v = (torch.randn(3, h, 30, 32, generator=g) for h in (2, 1, 1))
        ranking = methods.Ranking((1,), 0.5, 2, 22, torch.tensor([[3], [4], [7]]),
                                  torch.ones(3, 1))
        seen = ranking.keep(q, k, torch.arange(20).expand(3, -1))
        self.assertEqual(seen.shape, (3, 10))
        got = net.think_through(q, k, v, ranking, seen)
        for b in range(3):
            at = 22 + int(ranking.asking[b])
            share = torch.softmax(q[b, :, at] @ k[b, 0, 2:22].T / 32**0.5, -1).sum(0)
            self.assertEqual(seen[b].tolist(), sorted(share.argsort(descending=True)[:10].tolist()))
            allowed = torch.ones(30, 30).tril().bool()
            hidden = torch.ones(20).scatter(0, seen[b], 0).bool()
            allowed[22:, 2:22] &= ~hidden
            want = torch.nn.functional.scaled_dot_product_attention(
                q[b], k[b].expand(2, -1, -1), v[b].expand(2, -1, -1), attn_mask=allowed)
            torch.testing.assert_close(got[b], want.transpose(0, 1).flatten(1), rtol=1e-4,
                                       atol=1e-5)

    def test_merging_keeps_the_sum_and_puts_equals_together(self):
        rows = torch.randn(4, 49, 24, generator=torch.Generator().manual_seed(4))
        rows[:, 9] = rows[:, 2]
        merged, places = methods.merge(rows, 48)
        self.assertEqual(sorted(set(range(49)) - set(places[0].tolist())), [2])
        torch.testing.assert_close(merged[0, places[0].tolist().index(9)], rows[0, 9])
        merged, places = methods.merge(rows, 16)
        self.assertEqual(merged.shape, (4, 16, 24))
        self.assertTrue((places.diff(dim=-1) > 0).all())

    def test_the_pruner_keeps_what_its_definition_says(self):
        rows = torch.randn(2, 5, 12, 32, generator=torch.Generator().manual_seed(6)).double()
        got = methods.pruner_keeps(rows, 4)
        for clip in range(2):
            total = torch.zeros(32).double()
            for frame in range(5):
                x = rows[clip, frame]
                total += x.mean(0)
                calm = x.var(0, correction=0).argsort()[:16]
                y = x[:, calm] / x[:, calm].norm(dim=1, keepdim=True)
                redundancy = torch.zeros(12).double()
                for anchor in (total[calm] / total[calm].norm(), y.mean(0)):
                    for token in range(12):
                        distance = ((y[token] - anchor)**2).sum()
                        redundancy[token] += sum(torch.exp(-distance / (2 * 2.0**j))
                                                 for j in (-3, -2, -1, 0, 1))
                self.assertEqual(got[clip, frame].tolist(),
                                 sorted(redundancy.argsort()[:4].tolist()))

    def test_a_run_goes_on_from_what_was_exported(self):
        weights = self.random_weights(self.SMALL)
        where = os.path.join(self.folder.name, "begun")
        export.export(where, weights, self.SMALL, self.tokenizer, torch.float32)
        again = export.from_hugging_face(where, self.SMALL)
        self.assertEqual(again.keys(), weights.keys())
        for name, t in weights.items():
            torch.testing.assert_close(again[name], t, rtol=0, atol=0)

    def test_exported_checkpoint_gives_the_reference_s_logits(self):
        from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
        shape = model.Shape(image=64, vision_width=128, vision_layers=2, vision_heads=2,
                            vision_mlp=192, width=128, layers=3, heads=2, mlp=160)
        torch.manual_seed(0)
        weights = {k: t + 0.1 * torch.randn_like(t)  # biases of 0 and norms of 1 hide mistakes
                   for k, t in model.init_weights(shape, 0).items()}
        where = os.path.join(self.folder.name, "checkpoint")
        export.export(where, weights, shape, self.tokenizer, torch.float32)
        reference = LlavaOnevisionForConditionalGeneration.from_pretrained(
            where, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(where)
        video = np.random.default_rng(0).integers(0, 256, (3, 72, 128, 3), dtype=np.uint8)
        said = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Q?"}]}]
        text = processor.apply_chat_template(said, add_generation_prompt=True)
        self.assertEqual(text, "<|im_start|>user <video>\nQ?<|im_end|><|im_start|>assistant\n")
        inputs = processor(text=[text], videos=[video], return_tensors="pt")
        ids, picture = inputs["input_ids"][0], inputs["pixel_values_videos"][0]
        patches = picture.view(3, 3, 4, 16, 4, 16).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 768)
        of_video = torch.nonzero(ids == processor.tokenizer.convert_tokens_to_ids("<video>"))
        first, last = of_video[0, 0], of_video[-1, 0] + 1
        self.assertEqual(ids[:first].tolist(), self.words.prefix)
        self.assertEqual(last - first, 3 * shape.pooled**2 + 1)
        with torch.no_grad():
            net = model.Model(shape)
            _, visual = net.tower(weights, patches)
            x = net.splice(weights, visual.reshape(1, -1, shape.width), ids[None, :first],
                           ids[None, last:])
            got = net.decode(weights, x)[0] @ weights["embed"].T
            want = reference(**inputs).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    unittest.main()
