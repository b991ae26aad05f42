#!/usr/bin/env python3
"""Golden values of whole models, made with transformers (5.17, torch 2.11, fp32, eager attention, CPU).

    python3 tests/golden/make_model_golden.py tiny OUT_DIR          # random checkpoints with their goldens
    python3 tests/golden/make_model_golden.py llama3 OUT_DIR        # of them, those of tiny_next_llama3 and _qwen
    python3 tests/golden/make_model_golden.py model DIR OUT_FILE    # goldens of an existing checkpoint
    python3 tests/golden/make_model_golden.py rules DIR GOLDEN OUT  # what generation_config.json does, as JSON

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
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
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
# LLaVA-1.5 and the vicuna models of LLaVA-NeXT; LLaVA-NeXT-Video has videos behind the images.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}VIDEOS"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VICUNA_VIDEOS = (
    "{# Render all video next #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\n' }}{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] + '<|eot_id|>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
QUESTION = "What is the cat doing, and where?"
SAMPLED_ROWS = 12
GREEDY_TOKENS = 64


def make_tokenizer(directory, pattern=QWEN2_PATTERN, begin=None,
                   added=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")):
    """Pieces of bytes. begin: the token that begins every text, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=begin is not None))
    tokenizer.normalizer = None if begin else normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
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
    tokenizer.add_special_tokens(list(added))
    if begin:
        template = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    tokenizer.save(os.path.join(directory, "tokenizer.json"))
    return tokenizer


def make_llama_tokenizer(directory, added):
    """Pieces like SentencePiece's: every text begins with a space, unknown characters are bytes."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    text = ["What is the cat doing? Where is the dog?", "USER: ASSISTANT: [INST] [/INST]", "the cat is in the house"] * 4
    learnt.train_from_iterator(text, trainers.BpeTrainer(vocab_size=70, special_tokens=[], show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted(model["vocab"], key=model["vocab"].get)
    tokenizer = Tokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[tuple(m) for m in model["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True,
    ))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])
    tokenizer.add_special_tokens(pieces[:3] + added)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
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


def make_tiny_llava(directory, *, kind, vision, text, template, processor, seed):
    """kind: LLaVA-1.5 (llava), LLaVA-NeXT (llava_next) or LLaVA-NeXT-Video (llava_next_video)."""
    os.makedirs(directory, exist_ok=True)
    video = kind == "llava_next_video"
    decoder = text.pop("class", LlamaConfig)
    end_id, tokens = 2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if template == LLAMA3_TEMPLATE:
        added = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
        tokenizer = make_tokenizer(directory, LLAMA3_PATTERN, "<|begin_of_text|>", added)
        # What the published file says beside: transformers does not follow it for such a tokenizer.
        tokens = {"bos_token": added[0], "eos_token": added[4], "clean_up_tokenization_spaces": True}
        end_id = [tokenizer.token_to_id(added[1]), tokenizer.token_to_id(added[4])]
    elif template == CHATML_TEMPLATE:
        tokenizer = make_tokenizer(directory, added=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"))
        tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
        end_id = tokenizer.token_to_id("<|im_end|>")
    else:
        tokenizer = make_llama_tokenizer(directory, ["<video>", "<image>"] if video else ["<image>", "<pad>"])
    token_ids = {"image_token_index": tokenizer.token_to_id("<image>")}
    if video:
        token_ids["video_token_index"] = tokenizer.token_to_id("<video>")
    configs, model_class = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        "llava_next_video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
    }[kind]
    model = model_class(configs(
        vision_config=CLIPVisionConfig(**vision),
        text_config=decoder(vocab_size=tokenizer.get_vocab_size() + 5, rms_norm_eps=1e-5, eos_token_id=end_id, **text),
        **token_ids,
    )).eval()
    randomise(model, seed)
    model.generation_config.eos_token_id = end_id
    model.to(torch.bfloat16).save_pretrained(directory)
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    settings = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_center_crop": True,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": vision["image_size"]}, "crop_size": side, **processor,
    }
    name = "preprocessor_config.json"
    if video:  # as transformers 5.x writes it
        name, settings = "processor_config.json", {"video_processor": settings}
    with open(os.path.join(directory, name), "w") as file:
        json.dump(settings, file, indent=1)
    with open(os.path.join(directory, "chat_template.json"), "w") as file:
        json.dump({"chat_template": template}, file)
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as file:
        json.dump(tokens, file)


def make_frames(count, width, height, seed):
    """Random blobs that move: smooth enough to resize sensibly, never constant."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)
    frames = [np.asarray(Image.fromarray(s).resize((width, height), Image.BICUBIC)) for s in small]
    noise = rng.integers(-20, 21, (count, height, width, 3))
    return np.clip(np.stack(frames).astype(np.int32) + noise, 0, 255).astype(np.uint8)


def resize(image, width, height):
    # One axis a call: Pillow may begin with the vertical one, the reference's processors begin with the horizontal one.
    return image.resize((width, image.height), Image.BICUBIC).resize((width, height), Image.BICUBIC)


def fit(image, size, crop):
    if not crop:
        return resize(image, size, size)
    short = min(image.size)
    image = resize(image, int(size * image.width / short), int(size * image.height / short))
    left, top = int((image.width - size) / 2), int((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def pixel_values(frames, size, crop, mean, std):
    fitted = [np.asarray(fit(Image.fromarray(f), size, crop), dtype=np.float32) for f in frames]
    mean, std = (np.float32(x) * np.float32(255) for x in (mean, std))
    return torch.from_numpy((np.stack(fitted) - mean) / std).permute(0, 3, 1, 2).contiguous()


class Family:
    """How one model class takes a video of pixels [F, 3, S, S]."""

    def __init__(self, model):
        self.model, self.inner, self.config = model, model.model, model.config
        self.kind = model.config.model_type
        self.clip = self.kind != "llava_onevision"
        self.video = self.kind in ("llava_onevision", "llava_next_video")
        self.placeholder = "<video>" if self.video else "<image>"
        self.placeholder_id = self.config.video_token_id if self.video else self.config.image_token_id
        vision = self.config.vision_config
        grid = vision.image_size // vision.patch_size
        self.per_frame = {"llava_onevision": -(-grid // 2), "llava_next_video": grid // 2}.get(self.kind, grid) ** 2
        self.newlines = 1 if self.kind in ("llava_onevision", "llava_next") else 0

    def pixels(self, frames):
        size = self.config.vision_config.image_size
        if not self.clip:
            return pixel_values(frames, size, False, [0.5] * 3, [0.5] * 3)
        # A frame is LLaVA-NeXT's overview of a picture, which does not keep the aspect ratio.
        return pixel_values(frames, size, self.kind != "llava_next", CLIP_MEAN, CLIP_STD)

    def prompt(self, question):
        if not self.clip:
            return f"<|im_start|>user <video>\n{question}<|im_end|><|im_start|>assistant\n"
        if self.config.text_config.model_type == "mistral":
            return f"[INST] {self.placeholder}\n{question} [/INST]"
        if self.config.text_config.model_type == "qwen2":
            return f"<|im_start|>user\n{self.placeholder}\n{question}<|im_end|>\n<|im_start|>assistant\n"
        if isinstance(self.config.text_config.eos_token_id, list):  # Llama 3
            header = "<|start_header_id|>{}<|end_header_id|>\n\n"
            return header.format("user") + f"{self.placeholder}\n{question}<|eot_id|>" + header.format("assistant")
        return f"USER: {self.placeholder}\n{question} ASSISTANT:"

    def inputs(self, input_ids, pixels):
        pixels = pixels.to(self.model.dtype)
        if self.video:
            return dict(input_ids=input_ids, pixel_values_videos=pixels[None])
        if self.kind == "llava":
            return dict(input_ids=input_ids, pixel_values=pixels)
        # LLaVA-NeXT cuts every picture into crops. One without finer crops is the overview's rows and a newline; so is
        # a video, a row of overviews.
        hidden = self.inner.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = self.inner.multi_modal_projector(hidden[self.config.vision_feature_layer][:, 1:])
        rows = torch.cat([features.flatten(0, 1), self.inner.image_newline[None]])
        embeds = self.inner.get_input_embeddings()(input_ids)
        embeds[input_ids == self.placeholder_id] = rows
        return dict(inputs_embeds=embeds)


def run(family, input_ids, pixels):
    """One forward pass with every intermediate result, as fp32 [rows, columns]."""
    dumps, handles = {}, []

    def keep(name):
        def hook(_module, _inputs, output):
            value = output[0] if isinstance(output, tuple) else output
            dumps[name] = value.detach().float().reshape(-1, value.shape[-1])

        return hook

    inner = family.inner
    tower = inner.vision_tower
    start, layers = tower.embeddings, list(tower.encoder.layers)
    if family.clip:
        start, layers = tower.pre_layrnorm, layers[: family.config.vision_feature_layer + 1]
    handles.append(start.register_forward_hook(keep("vision/embeddings")))
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(keep(f"vision/layer.{i}")))
    if family.kind == "llava_next_video":
        handles.append(inner.vision_resampler.register_forward_hook(keep("vision/pooled")))
    handles.append(inner.multi_modal_projector.register_forward_hook(keep("vision/projector")))
    for i, layer in enumerate(inner.language_model.layers):
        handles.append(layer.register_forward_hook(keep(f"decoder/layer.{i}")))
    handles.append(inner.language_model.norm.register_forward_hook(keep("decoder/norm")))

    def keep_embeds(_module, args, kwargs):
        dumps["decoder/inputs"] = kwargs["inputs_embeds"].detach().float()[0]

    handles.append(inner.language_model.register_forward_pre_hook(keep_embeds, with_kwargs=True))
    with torch.no_grad():
        logits = family.model(**family.inputs(input_ids, pixels)).logits
    for handle in handles:
        handle.remove()
    dumps["decoder/logits"] = logits[0].float()
    if not family.clip:
        inputs = dumps["decoder/inputs"]
        video = (input_ids[0] == family.placeholder_id).nonzero()[:, 0]
        dumps["vision/pooled"] = inputs[video[:-1]]  # the last placeholder holds the newline row
    return dumps


def load(directory, **options):
    return Family(AutoModelForImageTextToText.from_pretrained(directory, **options).eval())


def make_golden(directory, out_file, frames, question):
    family = load(directory, dtype=torch.float32, attn_implementation="eager")
    # The file itself: transformers rebuilds some tokenizers by the name of their class.
    tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    count = len(frames) * family.per_frame + family.newlines
    text = family.prompt(question).replace(family.placeholder, family.placeholder * count)
    input_ids = torch.tensor([tokenizer.encode(text).ids])
    pixels = family.pixels(frames)
    reference = run(family, input_ids, pixels)
    with torch.no_grad():
        inputs = family.inputs(input_ids, pixels)
        out = family.model.generate(
            **inputs, max_new_tokens=GREEDY_TOKENS, do_sample=False,
            eos_token_id=family.model.generation_config.eos_token_id,
            # Rows of the embedding beyond the tokenizer's ids have no token; we never choose them.
            suppress_tokens=list(range(tokenizer.get_vocab_size(), family.config.text_config.vocab_size)) or None,
        )
    greedy = out[0, input_ids.shape[1] if "input_ids" in inputs else 0:]

    noise = {name: 0.0 for name in reference}
    for attention in ("eager", "sdpa"):
        low = load(directory, dtype=torch.bfloat16, attn_implementation=attention)
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
    print(out_file, os.path.getsize(out_file), "bytes;", "greedy:", tokenizer.decode(greedy.tolist())[:60].encode(),
          "noise:", {name: round(value, 4) for name, value in noise.items()})


def make_tiny_llavas(out):
    vision = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, patch_size=12,
                  projection_dim=16)
    # A remainder of two pixels; linear scaling of the rotation.
    make_tiny_llava(
        os.path.join(out, "tiny_next_video"), kind="llava_next_video", seed=3, vision=dict(image_size=74, **vision),
        template=VICUNA_TEMPLATE.replace("VIDEOS", VICUNA_VIDEOS), processor={},
        text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
                  max_position_embeddings=4096,
                  rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}),
    )
    # Heads that are wider than the hidden size; no window.
    make_tiny_llava(
        os.path.join(out, "tiny_next_mistral"), kind="llava_next", seed=4, vision=dict(image_size=60, **vision),
        template=MISTRAL_TEMPLATE, processor={"image_processor_type": "LlavaNextImageProcessor", "do_pad": True},
        text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, head_dim=24,
                  num_key_value_heads=1, max_position_embeddings=4096, sliding_window=None, **{"class": MistralConfig},
                  rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    )
    # Llama 3's scaling of the rotation with wavelengths of all three kinds.
    make_tiny_llava(
        os.path.join(out, "tiny_llava15"), kind="llava", seed=5, vision=dict(image_size=60, **vision),
        template=VICUNA_TEMPLATE.replace("VIDEOS", ""), processor={"image_processor_type": "CLIPImageProcessor"},
        text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=4096,
                  rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 128}),
    )
    for name, frames in [("tiny_next_video", make_frames(4, 97, 61, 6)), ("tiny_next_mistral", make_frames(3, 70, 48, 7)),
                         ("tiny_llava15", make_frames(3, 41, 80, 8))]:
        make_golden(os.path.join(out, name), os.path.join(out, name + ".golden.safetensors"), frames, QUESTION)


def make_tiny_next_others(out):
    """LLaVA-NeXT with the decoders of llama3-llava-next-8b-hf (no scaling) and llava-next-72b-hf (biases)."""
    vision = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, patch_size=12,
                  projection_dim=16, image_size=60)
    processor = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True, "aspect_ratio_setting": "anyres"}
    for name, template, seed, text in [
        ("tiny_next_llama3", LLAMA3_TEMPLATE, 9, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("tiny_next_qwen", CHATML_TEMPLATE, 10,
         {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "class": Qwen2Config}),
    ]:
        directory = os.path.join(out, name)
        make_tiny_llava(directory, kind="llava_next", seed=seed, vision=vision, template=template, processor=processor,
                        text=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, max_position_embeddings=4096, **text))
        make_golden(directory, directory + ".golden.safetensors", make_frames(3, 70, 48, seed), QUESTION)


def make_rules(directory, golden, out_file):
    """What fields of generation_config.json make of the answer in `golden`, and of logits that are drawn from."""
    family = load(directory, dtype=torch.float32, attn_implementation="eager")
    tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    tensors = load_file(golden)
    input_ids = tensors["input_ids"].long()[None]
    pixels = family.pixels(tensors["frames"].numpy())
    tokenless = list(range(tokenizer.get_vocab_size(), family.config.text_config.vocab_size))
    inputs = family.inputs(input_ids, pixels)
    stop = family.model.generation_config.eos_token_id

    def answer(fields):
        fields = {"max_new_tokens": 24, **fields, "suppress_tokens": fields.get("suppress_tokens", []) + tokenless}
        with torch.no_grad():
            out = family.model.generate(**inputs, do_sample=False, eos_token_id=stop, **fields)
        return out[0, input_ids.shape[1]:].tolist()

    plain = answer({})
    first, second, third = plain[:3]
    fields = [
        {}, {"suppress_tokens": [first, third]}, {"begin_suppress_tokens": [first]},
        {"bad_words_ids": [[second]]}, {"bad_words_ids": [[first, second], [stop]]}, {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[second, third]]},
        {"max_new_tokens": 5},
    ]
    # Answers that end early, and what keeps them from it: an id that comes is made the stop id.
    stop = plain[4]
    ends = [{}, {"min_new_tokens": 9}, {"min_length": input_ids.shape[1] + 7}, {"min_new_tokens": 2, "min_length": 10000}]
    early = [{"fields": f, "stop": stop, "ids": answer(f)} for f in ends]
    stop = family.model.generation_config.eos_token_id
    rows = [{"fields": f, "stop": stop, "ids": answer(f)} for f in fields] + early

    draws, generator = [], torch.Generator().manual_seed(11)
    for limits in [dict(min_p=0.1), dict(min_p=0.7), dict(typical_p=0.3), dict(typical_p=0.8), dict(epsilon_cutoff=0.05),
                   dict(eta_cutoff=0.1), dict(eta_cutoff=0.6), dict(top_k=9, min_p=0.2), dict(top_p=0.8, typical_p=0.6),
                   dict(top_k=12, top_p=0.9, min_p=0.05, typical_p=0.7, epsilon_cutoff=0.02, eta_cutoff=0.02)]:
        logits = (3 * torch.randn(24, generator=generator)).round(decimals=2)
        config = GenerationConfig(do_sample=True, temperature=1.7, **{"top_k": 0, **limits})
        config._eos_token_tensor = None
        processors = family.model._get_logits_processor(config, input_ids_seq_length=3)
        kept = processors(torch.tensor([[1, 2, 3]]), logits[None].clone())[0]
        draws.append({"limits": limits, "logits": [round(x, 2) for x in logits.tolist()],
                      "kept": kept.isfinite().nonzero()[:, 0].tolist()})
    with open(out_file, "w") as file:
        json.dump({"answers": rows, "temperature": 1.7, "draws": draws}, file, separators=(",", ":"))
    print(json.dumps(rows)[:1500], len(draws))


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
        make_tiny_llavas(out)
        make_tiny_next_others(out)
    elif sys.argv[1:2] == ["llama3"] and len(sys.argv) == 3:
        make_tiny_next_others(sys.argv[2])
    elif sys.argv[1:2] == ["rules"] and len(sys.argv) == 5:
        make_rules(*sys.argv[2:])
    elif sys.argv[1:2] == ["model"] and len(sys.argv) == 4:
        make_golden(sys.argv[2], sys.argv[3], make_frames(4, 120, 68, 5), "What is visible?")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
