#!/usr/bin/env python3
"""Writes a LLaVA-OneVision checkpoint with random weights and the exact dimensions of the published
0.5B one (893,675,552 parameters, 716 tensors, float16, names as on the hub), for measuring speed
and memory without a download. Needs numpy.

    scripts/make_random_checkpoint.py --out build/random-0.5b

Tokenizer, chat template and the ids of its tokens come from another checkpoint, since they are
text, not dimensions; the embedding keeps its 152000 rows.
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

VISION = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
          "num_attention_heads": 16, "num_hidden_layers": 26, "image_size": 384, "patch_size": 14,
          "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
          "vision_use_head": False}
TEXT = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24,
        "vocab_size": 152000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "hidden_act": "silu", "use_sliding_window": False,
        "tie_word_embeddings": True}
PREPROCESS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
              "rescale_factor": 1 / 255, "resample": 3, "image_mean": [0.5] * 3,
              "image_std": [0.5] * 3}


def tensor_shapes():
    """Names and shapes of all tensors, in the layout of the published files."""
    shapes = {"image_newline": [TEXT["hidden_size"]]}

    def linear(name, n, k, bias):
        shapes[name + ".weight"] = [n, k]
        if bias:
            shapes[name + ".bias"] = [n]

    def layer_norm(name, size):
        shapes[name + ".weight"] = [size]
        shapes[name + ".bias"] = [size]

    e, tower = VISION["hidden_size"], "vision_tower.vision_model."
    patch, side = VISION["patch_size"], VISION["image_size"] // VISION["patch_size"]
    shapes[tower + "embeddings.patch_embedding.weight"] = [e, VISION["num_channels"], patch, patch]
    shapes[tower + "embeddings.patch_embedding.bias"] = [e]
    shapes[tower + "embeddings.position_embedding.weight"] = [side * side, e]
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        layer_norm(layer + "layer_norm1", e)
        layer_norm(layer + "layer_norm2", e)
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"]:
            linear(layer + "self_attn." + name, e, e, True)
        linear(layer + "mlp.fc1", VISION["intermediate_size"], e, True)
        linear(layer + "mlp.fc2", e, VISION["intermediate_size"], True)
    layer_norm(tower + "post_layernorm", e)

    d, mlp = TEXT["hidden_size"], TEXT["intermediate_size"]
    kv = d // TEXT["num_attention_heads"] * TEXT["num_key_value_heads"]
    linear("multi_modal_projector.linear_1", d, e, True)
    linear("multi_modal_projector.linear_2", d, d, True)
    shapes["language_model.model.embed_tokens.weight"] = [TEXT["vocab_size"], d]
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = [d]
        shapes[layer + "post_attention_layernorm.weight"] = [d]
        linear(layer + "self_attn.q_proj", d, d, True)
        linear(layer + "self_attn.k_proj", kv, d, True)
        linear(layer + "self_attn.v_proj", kv, d, True)
        linear(layer + "self_attn.o_proj", d, d, False)
        linear(layer + "mlp.gate_proj", mlp, d, False)
        linear(layer + "mlp.up_proj", mlp, d, False)
        linear(layer + "mlp.down_proj", d, mlp, False)
    shapes["language_model.model.norm.weight"] = [d]
    return shapes


def random_values(rng, name, shape):
    """Values that keep activations near one through all layers: no term is zero, none explodes."""
    values = rng.standard_normal(math.prod(shape), dtype=np.float32)
    if name.endswith("norm.weight") or "layer_norm" in name and name.endswith(".weight"):
        return 1 + 0.2 * values
    if name.endswith(".bias"):
        return 0.2 * values
    if "embed_tokens" in name or "position_embedding" in name or name == "image_newline":
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
    parser.add_argument("--tokenizer-from", type=pathlib.Path,
                        default=root / "models" / "sluice-mini",
                        help="checkpoint directory to take the tokenizer from")
    parser.add_argument("--dtype", choices=["f16", "bf16", "f32"], default="f16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

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
        kept["num_image_tokens"] = (VISION["image_size"] // VISION["patch_size"]) ** 2
        write_json(processor, kept)

    sides = [384, 768, 1152, 1536, 1920, 2304]
    pinpoints = [[h, w] for h in sides for w in sides]
    dtype_name = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[args.dtype]
    text = dict(TEXT)
    for key in ["bos_token_id", "eos_token_id"]:
        if key in source.get("text_config", {}):
            text[key] = source["text_config"][key]
    write_json(args.out / "config.json", {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision", "torch_dtype": dtype_name,
        "image_token_index": image_id, "video_token_index": video_id,
        "image_grid_pinpoints": pinpoints, "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        "tie_word_embeddings": False, "text_config": text, "vision_config": VISION})
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    write_json(args.out / "preprocessor_config.json", {
        **PREPROCESS, "size": size, "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor", "image_grid_pinpoints": pinpoints})
    write_json(args.out / "video_preprocessor_config.json", {
        **PREPROCESS, "size": size, "video_processor_type": "LlavaOnevisionVideoProcessor",
        "processor_class": "LlavaOnevisionProcessor"})

    shapes = tensor_shapes()
    write_safetensors(args.out / "model.safetensors", shapes, args.dtype, args.seed)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    print(f"{args.out}: {len(shapes)} tensors, {parameters:,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
