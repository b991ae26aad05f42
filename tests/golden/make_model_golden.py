#!/usr/bin/env python3
"""Golden values of whole models, made with transformers (5.17, torch 2.11, fp32, eager attention, CPU).

    python3 tests/golden/make_model_golden.py tiny OUT_DIR          # two random checkpoints with their goldens
    python3 tests/golden/make_model_golden.py model DIR OUT_FILE    # goldens of an existing checkpoint

A golden file is a safetensors file that holds the input frames (u8), the prompt ids, a sample of the rows of every
intermediate result, the logits, and 64 greedy ids. Metadata holds, for every intermediate result `x`, `rows.x` (which rows were
kept) and `bf16.x`: E = max over {eager, sdpa} of relL2(reference in bf16, reference in fp32), the noise
that a correct bf16 implementation may show.
"""

import json
import os
import sys

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The template on the hub today: role and text parted by one space, no newline after a turn.
SPACED_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = "What is the cat doing, and where?"
SAMPLED_ROWS = 12
GREEDY_TOKENS = 64


def make_tokenizer(directory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    text = ["What is the cat doing? Where is the dog?", "user assistant system", "the cat is in the house"] * 4
    tokenizer.train_from_iterator(text, trainer)
    assert tokenizer.get_vocab_size() <= 295
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    return tokenizer


def randomise(model, seed):
    """Library initialisation hides mistakes (norm weights 1, biases 0), so every tensor is random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value = 1 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.2 * noise
            elif "embed" in name or "newline" in name:
                # Small beside what the layers add, or tied embeddings would only repeat the last token.
                value = 0.1 * noise
            else:
                value = noise / parameter[0].numel() ** 0.5
            parameter.copy_(value.to(torch.bfloat16).float())  # exact in the file's bf16


def make_tiny(directory, *, vision, text, tied, seed):
    os.makedirs(directory, exist_ok=True)
    tokenizer = make_tokenizer(directory)
    ids = {token: tokenizer.token_to_id(token) for token in ("<image>", "<video>", "<|im_end|>", "<|endoftext|>")}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, hidden_act="gelu_pytorch_tanh", **vision),
        text_config=Qwen2Config(
            vocab_size=320, max_position_embeddings=4096, rope_theta=1e6, tie_word_embeddings=tied,
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], **text,
        ),
        image_token_index=ids["<image>"], video_token_index=ids["<video>"],
        image_grid_pinpoints=[[vision["image_size"]] * 2, [2 * vision["image_size"]] * 2],
        tie_word_embeddings=tied,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    randomise(model, seed)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.to(torch.bfloat16).save_pretrained(directory)
    processor = {
        "processor_class": "LlavaOnevisionProcessor", "vision_feature_select_strategy": "full",
        "num_image_tokens": (vision["image_size"] // vision["patch_size"]) ** 2,
        "video_processor": {
            "video_processor_type": "LlavaOnevisionVideoProcessor", "do_convert_rgb": True, "do_normalize": True,
            "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
            "rescale_factor": 1 / 255, "size": {"height": vision["image_size"], "width": vision["image_size"]},
        },
    }
    with open(os.path.join(directory, "processor_config.json"), "w") as file:
        json.dump(processor, file, indent=1)
    with open(os.path.join(directory, "chat_template.json"), "w") as file:
        json.dump({"chat_template": SPACED_TEMPLATE}, file)
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, file)


def make_frames(count, width, height, seed):
    """Random blobs that move: smooth enough to resize sensibly, never constant."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    frames = [np.asarray(Image.fromarray(s).resize((width, height), Image.BICUBIC)) for s in small]
    noise = rng.integers(-20, 21, (count, height, width, 3))
    return np.clip(np.stack(frames).astype(np.int32) + noise, 0, 255).astype(np.uint8)


def pixel_values(frames, size):
    resized = [np.asarray(Image.fromarray(f).resize((size, size), Image.BICUBIC), dtype=np.float32) for f in frames]
    return torch.from_numpy((np.stack(resized) - 127.5) / 127.5).permute(0, 3, 1, 2)[None].contiguous()


def run(model, input_ids, pixels):
    """One forward pass with every intermediate result, as fp32 [rows, columns]."""
    dumps, handles = {}, []

    def keep(name):
        def hook(_module, _inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            dumps[name] = value.detach().float().reshape(-1, value.shape[-1])

        return hook

    inner = model.model
    handles.append(inner.vision_tower.embeddings.register_forward_hook(keep("vision/embeddings")))
    for i, layer in enumerate(inner.vision_tower.encoder.layers):
        handles.append(layer.register_forward_hook(keep(f"vision/layer.{i}")))
    handles.append(inner.multi_modal_projector.register_forward_hook(keep("vision/projector")))
    for i, layer in enumerate(inner.language_model.layers):
        handles.append(layer.register_forward_hook(keep(f"decoder/layer.{i}")))
    handles.append(inner.language_model.norm.register_forward_hook(keep("decoder/norm")))
    def keep_embeds(_module, args, kwargs):
        dumps["decoder/inputs"] = kwargs["inputs_embeds"].detach().float()[0]

    handles.append(inner.language_model.register_forward_pre_hook(keep_embeds, with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=input_ids, pixel_values_videos=pixels.to(model.dtype)).logits
    for handle in handles:
        handle.remove()
    dumps["decoder/logits"] = logits[0].float()
    inputs = dumps["decoder/inputs"]
    video = (input_ids[0] == model.config.video_token_id).nonzero()[:, 0]
    dumps["vision/pooled"] = inputs[video[:-1]]  # the last placeholder holds the newline row
    return dumps


def make_golden(directory, out_file, frames, question):
    load = dict(dtype=torch.float32, attn_implementation="eager")
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(directory, **load).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    vision = model.config.vision_config
    grid = vision.image_size // vision.patch_size
    per_frame = (-(-grid // 2)) ** 2
    text = f"<|im_start|>user <video>\n{question}<|im_end|><|im_start|>assistant\n"
    text = text.replace("<video>", "<video>" * (len(frames) * per_frame + 1))
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    pixels = pixel_values(frames, vision.image_size)
    reference = run(model, input_ids, pixels)
    with torch.no_grad():
        out = model.generate(
            input_ids=input_ids, pixel_values_videos=pixels, max_new_tokens=GREEDY_TOKENS, do_sample=False,
            eos_token_id=model.generation_config.eos_token_id,
            # Rows of the embedding beyond the tokenizer's ids have no token; we never choose them.
            suppress_tokens=list(range(len(tokenizer), model.config.text_config.vocab_size)) or None,
        )
    greedy = out[0, input_ids.shape[1]:]

    noise = {name: 0.0 for name in reference}
    for attention in ("eager", "sdpa"):
        low = LlavaOnevisionForConditionalGeneration.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        for name, value in run(low, input_ids, pixels).items():
            noise[name] = max(noise[name], ((value - reference[name]).norm() / reference[name].norm()).item())

    tensors = {
        "frames": torch.from_numpy(frames), "input_ids": input_ids[0].int(), "greedy_ids": greedy.int(),
        "pixels.sample": pixels.flatten()[:: max(1, pixels.numel() // 4096)].contiguous(),
    }
    metadata = {"question": question, "transformers": __import__("transformers").__version__, "torch": torch.__version__}
    for name, value in reference.items():
        rows = np.unique(np.linspace(0, value.shape[0] - 1, SAMPLED_ROWS).astype(int))
        tensors[name] = value[rows].contiguous()
        metadata["rows." + name] = json.dumps(rows.tolist())
        metadata["bf16." + name] = f"{noise[name]:.6g}"
    save_file(tensors, out_file, metadata=metadata)
    print(out_file, os.path.getsize(out_file), "bytes;", "greedy:", tokenizer.decode(greedy)[:60].encode())


def main():
    if sys.argv[1:2] == ["tiny"] and len(sys.argv) == 3:
        out = sys.argv[2]
        make_tiny(
            os.path.join(out, "tiny_tied"), tied=True, seed=1,
            vision=dict(hidden_size=72, intermediate_size=112, num_hidden_layers=3, num_attention_heads=3,
                        image_size=74, patch_size=14),
            text=dict(hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
                      num_key_value_heads=2),
        )
        make_tiny(
            os.path.join(out, "tiny_untied"), tied=False, seed=2,
            vision=dict(hidden_size=144, intermediate_size=208, num_hidden_layers=2, num_attention_heads=2,
                        image_size=140, patch_size=14),
            text=dict(hidden_size=128, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1),
        )
        make_golden(os.path.join(out, "tiny_tied"), os.path.join(out, "tiny_tied.golden.safetensors"),
                    make_frames(4, 97, 61, 3), QUESTION)
        make_golden(os.path.join(out, "tiny_untied"), os.path.join(out, "tiny_untied.golden.safetensors"),
                    make_frames(3, 64, 120, 4), QUESTION)
    elif sys.argv[1:2] == ["model"] and len(sys.argv) == 4:
        make_golden(sys.argv[2], sys.argv[3], make_frames(4, 120, 68, 5), "What is visible?")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
