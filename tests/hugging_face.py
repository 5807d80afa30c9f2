"""The other side of tests/tests/weights/hugging_face.rs: models of Hugging Face transformers.

hugging_face.py make DIR     one folder a model, with random weights, and what the model gives for some images
hugging_face.py run DIR..    what the models in these folders give for their `pixels.safetensors`
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils import logging

logging.disable_progress_bar()
SMALL = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, intermediate_size=160, patch_size=8,
             num_register_tokens=4, image_size=32, layerscale_value=0.5)
GATED = dict(use_gated_mlp=True, hidden_act="silu")
NO_BIAS = dict(query_bias=False, value_bias=False)
# name: configuration, pixels, how the weights are written.
MODELS = {
    "mlp": (SMALL, (2, 3, 40, 24), {}),
    "gated": (SMALL | GATED | dict(rope_theta=50.0), (1, 3, 16, 72), {}),
    # As the 7B: no bias of queries and values; and a width of 5 heads, an odd hidden width, no registers.
    "odd": (SMALL | GATED | NO_BIAS | dict(hidden_size=60, num_attention_heads=5, intermediate_size=101,
                                           num_register_tokens=0, mlp_bias=False), (1, 3, 24, 24), {}),
    "key_bias": (SMALL | dict(key_bias=True, proj_bias=False), (1, 3, 24, 16), {}),
    "sharded": (SMALL, (1, 3, 32, 32), dict(max_shard_size="100KB")),
    "bf16": (SMALL | GATED, (1, 3, 32, 32), dict(dtype=torch.bfloat16)),
    "f16": (SMALL, (1, 3, 32, 32), dict(dtype=torch.float16)),
    "state_dict": (SMALL | GATED, (1, 3, 32, 32), dict(state_dict=True)),
    "original": (SMALL | NO_BIAS | dict(hidden_size=128, num_attention_heads=2), (1, 3, 24, 40), dict(original=True)),
    "original_bias": (SMALL | GATED, (1, 3, 24, 40), dict(original=True)),
    "pickled": (SMALL | GATED, (1, 3, 24, 32), dict(pickled=True, dtype=torch.bfloat16)),
    "vit_s16": (dict(num_register_tokens=4), (1, 3, 224, 160), {}),
    "vit_b16": (dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_register_tokens=4),
                (1, 3, 224, 160), {}),
}


def original(model):
    """The state dict under the names of the public reference, with its buffers."""
    c, new = model.config, {}
    heads = {"q": c.query_bias, "k": c.key_bias, "v": c.value_bias}
    for name, value in model.state_dict().items():
        name = name.replace("model.layer.", "blocks.").removeprefix("embeddings.")
        for ours, theirs in {
            "patch_embeddings": "patch_embed.proj", "register_tokens": "storage_tokens", "attention.o_proj": "attn.proj",
            "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
            **({"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if c.use_gated_mlp else
               {"up_proj": "fc1", "down_proj": "fc2"}),
        }.items():
            name = name.replace(ours, theirs)
        new[name] = value[0] if name == "mask_token" else value
    for i in range(c.num_hidden_layers):
        part = lambda p, kind: new.pop(f"blocks.{i}.attention.{p}_proj.{kind}", torch.zeros(c.hidden_size))
        new[f"blocks.{i}.attn.qkv.weight"] = torch.cat([part(p, "weight") for p in heads])
        bias = torch.cat([part(p, "bias") for p in heads])
        if c.query_bias:
            new[f"blocks.{i}.attn.qkv.bias"] = bias
            mask = torch.ones(3, c.hidden_size)
            mask[1] = 0
            new[f"blocks.{i}.attn.qkv.bias_mask"] = mask.flatten()
    d = c.hidden_size // c.num_attention_heads
    new["rope_embed.periods"] = (c.rope_theta ** (torch.arange(d // 4) / (d // 4))).bfloat16()
    return new


def outputs(model, pixels):
    """In f64, but for the rotary tables, which the library computes in f32."""
    with torch.no_grad():
        out = model.double().eval()(pixels.double(), output_hidden_states=True)
    return {"pixels": pixels, "last_hidden_state": out.last_hidden_state.float().contiguous(),
            "hidden_state_1": out.hidden_states[1].float().contiguous()}


def make(folder):
    for seed, (name, (config, shape, how)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = DINOv3ViTModel(DINOv3ViTConfig(**config))
        for parameter in model.parameters():
            scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.ndim == 2 else 0.3
            parameter.data = parameter.data + torch.randn_like(parameter) * scale
        out = folder / name
        # Weights alone: rotary tables stay what the library computes in f32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(how.get("dtype", torch.float32))
        if how.get("original"):
            out.mkdir()
            torch.save({"teacher": original(model), "iteration": 7}, out / "model.pth")
        elif how.get("pickled"):
            out.mkdir()
            torch.save(model.state_dict(), out / "pytorch_model.bin")
            model.config.save_pretrained(out)
        elif how.get("state_dict"):
            out.mkdir()
            save_file(model.state_dict(), out / "model.safetensors")
            model.config.save_pretrained(out)
        else:
            model.save_pretrained(out, **({"max_shard_size": how["max_shard_size"]} if "max_shard_size" in how else {}))
        save_file(outputs(model, torch.randn(shape)), folder / f"{name}.expected.safetensors")


def run(folder):
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {key: set(map(str, names)) for key, names in info.items() if names}
    if not getattr(model.config, "num_register_tokens", 0):
        # An empty tensor, which a file may leave out.
        problems = {key: names - {"embeddings.register_tokens"} for key, names in problems.items()}
    problems = {key: sorted(names) for key, names in problems.items() if names}
    assert not problems, f"{folder}: {json.dumps(problems)}"
    pixels = load_file(folder / "pixels.safetensors")["pixels"]
    save_file(outputs(model, pixels), folder / "expected.safetensors")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        for folder in sys.argv[2:]:
            run(Path(folder))
