"""Writes weights as a Hugging Face LLaVA-OneVision checkpoint (the layout transformers 5.17
saves: `vision_tower.*`, `language_model.model.*`), bf16 in shards below 15 MB, with everything a
processor needs beside it. Nothing here needs transformers."""

import glob
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

SHARD_BYTES = 14_900_000

# The template the published OneVision checkpoints carry: a role is followed by one space, images
# and videos come first, then each text after a line feed; there is no default system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def to_hugging_face(w, shape):
    """Weights of model.py by name -> tensors by checkpoint name, in the type they come in."""
    out = {"image_newline": w["newline"],
           "language_model.model.embed_tokens.weight": w["embed"],
           "language_model.model.norm.weight": w["text.norm"]}

    def linear(name, weight, bias=None):
        out[name + ".weight"] = weight
        if bias is not None:
            out[name + ".bias"] = bias

    v, patch = shape.vision_width, shape.patch
    tower = "vision_tower."
    linear(tower + "embeddings.patch_embedding", w["tower.patch.w"].view(v, 3, patch, patch),
           w["tower.patch.b"])
    out[tower + "embeddings.position_embedding.weight"] = w["tower.pos"]
    for i in range(shape.vision_layers):
        a, b = f"tower.{i}.", f"{tower}encoder.layers.{i}."
        for k, part in enumerate("qkv"):
            rows = slice(k * v, (k + 1) * v)
            linear(f"{b}self_attn.{part}_proj", w[a + "qkv.w"][rows], w[a + "qkv.b"][rows])
        linear(b + "self_attn.out_proj", w[a + "out.w"], w[a + "out.b"])
        linear(b + "layer_norm1", w[a + "ln1.w"], w[a + "ln1.b"])
        linear(b + "layer_norm2", w[a + "ln2.w"], w[a + "ln2.b"])
        linear(b + "mlp.fc1", w[a + "fc1.w"], w[a + "fc1.b"])
        linear(b + "mlp.fc2", w[a + "fc2.w"], w[a + "fc2.b"])
    # Part of the format, never read: the features are taken before this norm.
    out[tower + "post_layernorm.weight"] = torch.ones_like(w["tower.0.ln1.w"])
    out[tower + "post_layernorm.bias"] = torch.zeros_like(w["tower.0.ln1.b"])
    for k in "12":
        linear("multi_modal_projector.linear_" + k, w[f"proj.{k}.w"], w[f"proj.{k}.b"])

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        a, b = f"text.{i}.", f"language_model.model.layers.{i}."
        for part, rows in (("q", slice(0, q)), ("k", slice(q, q + kv)), ("v", slice(q + kv, None))):
            linear(f"{b}self_attn.{part}_proj", w[a + "qkv.w"][rows], w[a + "qkv.b"][rows])
        linear(b + "self_attn.o_proj", w[a + "o.w"])
        linear(b + "mlp.gate_proj", w[a + "gu.w"][: shape.mlp])
        linear(b + "mlp.up_proj", w[a + "gu.w"][shape.mlp:])
        linear(b + "mlp.down_proj", w[a + "down.w"])
        out[b + "input_layernorm.weight"] = w[a + "norm1"]
        out[b + "post_attention_layernorm.weight"] = w[a + "norm2"]
    return out


def from_hugging_face(directory, shape):
    """Float32 weights of model.py by name, read from a checkpoint that `export` wrote."""
    tensors = {}
    for file in sorted(glob.glob(os.path.join(directory, "*.safetensors"))):
        tensors |= load_file(file)
    if not tensors:
        raise FileNotFoundError(f"[export] {directory}: no *.safetensors there")
    tensors = {name: t.float() for name, t in tensors.items()}

    def fused(name, parts, kind="weight"):
        return torch.cat([tensors[f"{name}{part}_proj.{kind}"] for part in parts])

    tower, text = "vision_tower.", "language_model.model."
    w = {"newline": tensors["image_newline"], "embed": tensors[text + "embed_tokens.weight"],
         "text.norm": tensors[text + "norm.weight"],
         "tower.patch.w": tensors[tower + "embeddings.patch_embedding.weight"].flatten(1),
         "tower.patch.b": tensors[tower + "embeddings.patch_embedding.bias"],
         "tower.pos": tensors[tower + "embeddings.position_embedding.weight"]}
    for i in range(shape.vision_layers):
        a, b = f"tower.{i}.", f"{tower}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            w[a + "qkv." + kind[0]] = fused(b + "self_attn.", "qkv", kind)
            for ours, theirs in (("out", "self_attn.out_proj"), ("ln1", "layer_norm1"),
                                 ("ln2", "layer_norm2"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
                w[f"{a}{ours}.{kind[0]}"] = tensors[f"{b}{theirs}.{kind}"]
    for k in "12":
        for kind in ("weight", "bias"):
            w[f"proj.{k}.{kind[0]}"] = tensors[f"multi_modal_projector.linear_{k}.{kind}"]
    for i in range(shape.layers):
        a, b = f"text.{i}.", f"{text}layers.{i}."
        w |= {a + "qkv.w": fused(b + "self_attn.", "qkv"),
              a + "qkv.b": fused(b + "self_attn.", "qkv", "bias"),
              a + "o.w": tensors[b + "self_attn.o_proj.weight"],
              a + "gu.w": fused(b + "mlp.", ("gate", "up")),
              a + "down.w": tensors[b + "mlp.down_proj.weight"],
              a + "norm1": tensors[b + "input_layernorm.weight"],
              a + "norm2": tensors[b + "post_attention_layernorm.weight"]}
    return w


def config(shape, ids):
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_grid_pinpoints": [[shape.image, shape.image]],
        "image_token_index": ids["<image>"],
        "model_type": "llava_onevision",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "hidden_act": "silu",
            "hidden_size": shape.width,
            "initializer_range": 0.02,
            "intermediate_size": shape.mlp,
            "layer_types": ["full_attention"] * shape.layers,
            "max_position_embeddings": 32768,
            "max_window_layers": shape.layers,
            "model_type": "qwen2",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "pad_token_id": ids["<|endoftext|>"],
            "rms_norm_eps": shape.eps,
            "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": shape.vocabulary,
        },
        "tie_word_embeddings": True,
        "transformers_version": "5.17.0",
        "video_token_index": ids["<video>"],
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": shape.vision_width,
            "image_size": shape.image,
            "intermediate_size": shape.vision_mlp,
            "layer_norm_eps": shape.eps,
            "model_type": "siglip_vision_model",
            "num_attention_heads": shape.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": shape.vision_layers,
            "patch_size": shape.patch,
            "vision_use_head": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def processors(shape):
    """Every settings file that some version of transformers reads, by file name."""
    common = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
              "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3,
              "rescale_factor": 0.00392156862745098,
              "size": {"height": shape.image, "width": shape.image}}
    image = common | {"do_pad": True, "image_grid_pinpoints": [[shape.image, shape.image]],
                      "image_processor_type": "LlavaOnevisionImageProcessor"}
    video = common | {"do_sample_frames": False, "return_metadata": False,
                      "video_processor_type": "LlavaOnevisionVideoProcessor"}
    processor = {"image_processor": image, "image_token": "<image>",
                 "num_image_tokens": shape.grid**2, "processor_class": "LlavaOnevisionProcessor",
                 "video_processor": video, "video_token": "<video>",
                 "vision_aspect_ratio": "anyres_max_9", "vision_feature_select_strategy": "full"}
    named = {"processor_class": "LlavaOnevisionProcessor"}
    return {"processor_config.json": processor, "preprocessor_config.json": image | named,
            "video_preprocessor_config.json": video | named}


def export(directory, weights, shape, tokenizer_file, dtype=torch.bfloat16):
    """Replaces `directory` by a checkpoint of `weights` (any device and type). It appears whole
    or not at all."""
    ids = Tokenizer.from_file(tokenizer_file).get_vocab(with_added_tokens=True)
    work = directory.rstrip("/") + ".part"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)

    def write(name, value):
        with open(os.path.join(work, name), "w") as f:
            json.dump(value, f, indent=2, sort_keys=True)
            f.write("\n")

    tensors = {k: t.detach().to("cpu", dtype).contiguous().clone()
               for k, t in sorted(to_hugging_face(weights, shape).items())}
    shards = [{}]
    for name, tensor in tensors.items():
        held = sum(t.nbytes for t in shards[-1].values())
        if held and held + tensor.nbytes + 200 * len(tensors) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    files = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, os.path.join(work, file), metadata={"format": "pt"})
        os.chmod(os.path.join(work, file), 0o644)  # save_file makes it private
        files.update({name: file for name in shard})
    write("model.safetensors.index.json", {
        "metadata": {"total_parameters": sum(t.numel() for t in tensors.values()),
                     "total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": files})
    settings = config(shape, ids)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    write("config.json", settings)
    write("generation_config.json", {
        "_from_model_config": False, "bos_token_id": ids["<|endoftext|>"], "do_sample": False,
        "eos_token_id": ids["<|im_end|>"], "max_new_tokens": 64,
        "pad_token_id": ids["<|endoftext|>"], "transformers_version": "5.17.0"})
    for name, value in processors(shape).items():
        write(name, value)
    write("tokenizer_config.json", {
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<image>", "<video>"],
        "model_max_length": 32768, "processor_class": "LlavaOnevisionProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast"})
    write("chat_template.json", {"chat_template": CHAT_TEMPLATE})
    with open(os.path.join(work, "chat_template.jinja"), "w") as f:
        f.write(CHAT_TEMPLATE)
    shutil.copy(tokenizer_file, os.path.join(work, "tokenizer.json"))
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(work, directory)
