#!/usr/bin/env python3
"""Writes a checkpoint with random weights and the exact dimensions of a published one (tensor names
as on the hub, float16), for measuring speed and memory without a download. Needs numpy.

    scripts/make_random_checkpoint.py --out build/random-0.5b
    scripts/make_random_checkpoint.py --like llava-next-mistral-7b --shrink 16 --out build/random-next

--shrink makes all layers so many times narrower, with as many layers and visual tokens as before.
Tokenizer, chat template and the ids of its tokens come from another checkpoint, since they are
text, not dimensions; the embedding keeps its rows.
"""

import argparse
import json
import math
import pathlib
import shutil
import struct
import sys

import numpy as np

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json",
                   "chat_template.jinja", "processor_config.json", "generation_config.json"]

SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
          "num_attention_heads": 16, "num_hidden_layers": 26, "image_size": 384, "patch_size": 14,
          "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
          "vision_use_head": False}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14,
        "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "projection_dim": 768}
QWEN2 = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
         "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24,
         "vocab_size": 152000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
         "rope_theta": 1000000.0, "hidden_act": "silu", "use_sliding_window": False,
         "tie_word_embeddings": True}
QWEN2_7B = {**QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064,
            "tie_word_embeddings": False}
VICUNA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
          "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
          "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
MISTRAL = {**VICUNA, "model_type": "mistral", "intermediate_size": 14336,
           "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
           "sliding_window": None}
# Tower and decoder.
MODELS = {"llava-onevision-0.5b": (SIGLIP, QWEN2), "llava-onevision-7b": (SIGLIP, QWEN2_7B),
          "llava-next-vicuna-7b": (CLIP, VICUNA),
          "llava-next-mistral-7b": (CLIP, MISTRAL)}
RESIZE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
          "rescale_factor": 1 / 255, "resample": 3}


def shrunk(part, by):
    """The same layers, `by` times narrower; heads keep their size if their number divides."""
    part = dict(part)
    for key in ["hidden_size", "intermediate_size"]:
        if part[key] % by:
            sys.exit(f"[make_random_checkpoint] --shrink must divide {key} {part[key]}, got {by}")
        part[key] //= by
    for key in ["num_attention_heads", "num_key_value_heads"]:
        if key in part:
            part[key] = max(1, part[key] // by)
    return part


def tensor_shapes(vision, text):
    """Names and shapes of all tensors, in the layout of the published files."""
    clip, biases = vision["model_type"] == "clip_vision_model", text["model_type"] == "qwen2"
    shapes = {"image_newline": [text["hidden_size"]]}

    def linear(name, n, k, bias):
        shapes[name + ".weight"] = [n, k]
        if bias:
            shapes[name + ".bias"] = [n]

    def layer_norm(name, size):
        shapes[name + ".weight"] = [size]
        shapes[name + ".bias"] = [size]

    e, tower = vision["hidden_size"], "vision_tower.vision_model."
    patch, side = vision["patch_size"], vision["image_size"] // vision["patch_size"]
    shapes[tower + "embeddings.patch_embedding.weight"] = [e, vision["num_channels"], patch, patch]
    if clip:
        shapes[tower + "embeddings.class_embedding"] = [e]
        layer_norm(tower + "pre_layrnorm", e)
    else:
        shapes[tower + "embeddings.patch_embedding.bias"] = [e]
    shapes[tower + "embeddings.position_embedding.weight"] = [side * side + clip, e]
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        layer_norm(layer + "layer_norm1", e)
        layer_norm(layer + "layer_norm2", e)
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"]:
            linear(layer + "self_attn." + name, e, e, True)
        linear(layer + "mlp.fc1", vision["intermediate_size"], e, True)
        linear(layer + "mlp.fc2", e, vision["intermediate_size"], True)
    layer_norm(tower + "post_layernorm", e)

    d, mlp = text["hidden_size"], text["intermediate_size"]
    kv = d // text["num_attention_heads"] * text["num_key_value_heads"]
    linear("multi_modal_projector.linear_1", d, e, True)
    linear("multi_modal_projector.linear_2", d, d, True)
    shapes["language_model.model.embed_tokens.weight"] = [text["vocab_size"], d]
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = [d]
        shapes[layer + "post_attention_layernorm.weight"] = [d]
        linear(layer + "self_attn.q_proj", d, d, biases)
        linear(layer + "self_attn.k_proj", kv, d, biases)
        linear(layer + "self_attn.v_proj", kv, d, biases)
        linear(layer + "self_attn.o_proj", d, d, False)
        linear(layer + "mlp.gate_proj", mlp, d, False)
        linear(layer + "mlp.up_proj", mlp, d, False)
        linear(layer + "mlp.down_proj", d, mlp, False)
    shapes["language_model.model.norm.weight"] = [d]
    if not text["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = [text["vocab_size"], d]
    return shapes


def random_values(rng, name, shape):
    """Values that keep activations near one through all layers: no term is zero, none explodes."""
    values = rng.standard_normal(math.prod(shape), dtype=np.float32)
    if name.endswith("norm.weight") or ("layer_norm" in name or "layrnorm" in name) and name.endswith(".weight"):
        return 1 + 0.2 * values
    if name.endswith(".bias"):
        return 0.2 * values
    if "embed" in name and "patch" not in name or name == "image_newline":
        return 0.5 * values
    return values / math.sqrt(math.prod(shape[1:]))


def to_bytes(values, dtype):
    if dtype == "f32":
        return values.astype("<f4").tobytes()
    if dtype == "f16":
        return values.astype("<f2").tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    size = {"f32": 4, "f16": 2, "bf16": 2}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * size
        header[name] = {"dtype": dtype.upper(), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(to_bytes(random_values(rng, name, shape), dtype))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument("--like", choices=MODELS, default="llava-onevision-0.5b",
                        help="whose dimensions (default: %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, metavar="N",
                        help="make all layers N times narrower")
    parser.add_argument("--tokenizer-from", type=pathlib.Path,
                        default=root / "models" / "sluice-mini",
                        help="checkpoint directory to take the tokenizer from")
    parser.add_argument("--dtype", choices=["f16", "bf16", "f32"], default="f16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    vision, text = (shrunk(part, args.shrink) for part in MODELS[args.like])
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2

    source_config = args.tokenizer_from / "config.json"
    if not source_config.is_file():
        sys.exit(f"[make_random_checkpoint] {source_config} is missing; "
                 "name a checkpoint with --tokenizer-from")
    source = json.loads(source_config.read_text("utf-8"))
    image_id = source.get("image_token_index", source.get("image_token_id"))
    video_id = source.get("video_token_index", source.get("video_token_id"))
    if image_id is None or video_id is None:
        sys.exit(f"[make_random_checkpoint] {source_config} names no image and video token")

    args.out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (args.tokenizer_from / name).is_file():
            shutil.copy(args.tokenizer_from / name, args.out / name)
    processor = args.out / "processor_config.json"
    if processor.is_file():
        # What this file says about pictures belongs to the other checkpoint.
        kept = json.loads(processor.read_text("utf-8"))
        kept.pop("image_processor", None)
        kept.pop("video_processor", None)
        kept["num_image_tokens"] = tokens
        write_json(processor, kept)

    dtype_name = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[args.dtype]
    for key in ["bos_token_id", "eos_token_id"]:
        if key in source.get("text_config", {}):
            text[key] = source["text_config"][key]
    config = {"torch_dtype": dtype_name, "image_token_index": image_id,
              "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
              "tie_word_embeddings": False, "text_config": text, "vision_config": vision}
    if text["model_type"] == "qwen2":
        sides = [384, 768, 1152, 1536, 1920, 2304]
        pinpoints = [[h, w] for h in sides for w in sides]
        config.update({"architectures": ["LlavaOnevisionForConditionalGeneration"],
                       "model_type": "llava_onevision", "video_token_index": video_id,
                       "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
                       "vision_aspect_ratio": "anyres_max_9"})
        size = {"height": vision["image_size"], "width": vision["image_size"]}
        settings = {**RESIZE, "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                    "processor_class": "LlavaOnevisionProcessor"}
        write_json(args.out / "video_preprocessor_config.json", {
            **settings, "video_processor_type": "LlavaOnevisionVideoProcessor"})
        settings["image_processor_type"] = "LlavaOnevisionImageProcessor"
    else:
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        config.update({"architectures": ["LlavaNextForConditionalGeneration"],
                       "model_type": "llava_next", "vision_feature_layer": -2,
                       "vision_feature_select_strategy": "default"})
        side = vision["image_size"]
        settings = {**RESIZE, "size": {"shortest_edge": side},
                    "do_center_crop": True, "crop_size": {"height": side, "width": side},
                    "image_mean": [0.48145466, 0.4578275, 0.40821073],
                    "image_std": [0.26862954, 0.26130258, 0.27577711],
                    "image_processor_type": "LlavaNextImageProcessor"}
    config["image_grid_pinpoints"] = settings["image_grid_pinpoints"] = pinpoints
    write_json(args.out / "config.json", config)
    write_json(args.out / "preprocessor_config.json", settings)

    shapes = tensor_shapes(vision, text)
    write_safetensors(args.out / "model.safetensors", shapes, args.dtype, args.seed)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    print(f"{args.out}: {len(shapes)} tensors, {parameters:,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
