"""The other side of tests/tests/weights/timm.rs: models of timm.

timm_models.py make DIR        one folder a model of timm, with random weights, pixels and what the model gives
timm_models.py run DIR..       what the models in these folders give for their `pixels.safetensors`
"""

import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file


def features(model, pixels):
    with torch.no_grad():
        return model.eval().forward_features(pixels)


def make(folder):
    small = dict(embed_dim=64, depth=3, num_heads=2, patch_size=8, img_size=32, num_reg_tokens=2)
    models = {
        "mlp": ("vit_small_patch16_dinov3", small),
        "bias": ("vit_small_patch16_dinov3_qkvb", small | dict(rope_temperature=50.0)),
        "gated": ("vit_small_plus_patch16_dinov3_qkvb", small | dict(mlp_ratio=2.5, num_reg_tokens=0)),
    }
    for name, (architecture, args) in models.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=0, **args)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        place = folder / name
        place.mkdir()
        pixels = torch.randn(2, 3, 40, 24)
        save_file(model.state_dict(), place / "model.safetensors")
        save_file({"pixels": pixels}, place / "pixels.safetensors")
        save_file({"features": features(model, pixels).contiguous()}, place / "expected.safetensors")
        cfg = dict(input_size=[3, 32, 32], mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], num_classes=0)
        config = dict(architecture=architecture, num_classes=0, model_args=args, pretrained_cfg=cfg)
        (place / "config.json").write_text(json.dumps(config))


def run(folders):
    for folder in folders:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        pixels = load_file(folder / "pixels.safetensors")["pixels"]
        save_file({"features": features(model, pixels).contiguous()}, folder / "expected.safetensors")


if sys.argv[1] == "make":
    make(Path(sys.argv[2]))
else:
    run([Path(name) for name in sys.argv[2:]])
