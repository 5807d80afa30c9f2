"""The reference's training step stated in PyTorch, and the golden case of distillation that it makes.

distillation.py GOLDEN_FOLDER    holds the statement to `ssl_step.safetensors`, which the reference itself computed, then
                                 writes `distillation_step.safetensors`: the same student, crops and masks, taught by a
                                 larger frozen model

Distillation follows `ssl_meta_arch.py` of the reference: the teacher is a model and heads of another configuration, which
never move (`_setup_distillation`); the student sees whole crops (`get_student_output` passes no masks), the patches of the
iBOT loss are those of the masks all the same; `model_ema` follows the student. All numbers are computed in float64.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)


def read(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}, metadata


def scoped(weights, prefix):
    return {name[len(prefix):]: t for name, t in weights.items() if name.startswith(prefix)}


def rope(height, width, head_dim, base):
    """Sine and cosine `[HW, head_dim]` with coordinates normalised per axis ("separate")."""
    y, x = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (height, width))
    coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
    periods = base ** (2 * torch.arange(head_dim // 4) / (head_dim // 2))
    angles = (2 * torch.pi * coords[:, :, None] / periods).flatten(1).tile(2)
    return angles.sin(), angles.cos()


def rotate(x, tables):
    """Rotates all but the first tokens of `[B, heads, N, head_dim]`."""
    sin, cos = tables
    prefix = x.shape[2] - len(sin)
    first, x = x[:, :, :prefix], x[:, :, prefix:]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([first, x * cos + torch.cat([-b, a], -1) * sin], dim=2)


def backbone(w, images, masks, heads, cfg, local):
    """CLS `[B, D]` and patches `[B, P, D]` after the last norm."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)  # noqa: E731
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=cfg["patch_size"])
    height, width = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    batch, _, dim = x.shape
    if masks is not None:
        x = torch.where(masks[..., None], w["mask_token"], x)
    else:
        x = x + 0 * w["mask_token"]
    prefix = torch.cat([w["cls_token"], w["storage_tokens"]], 1).expand(batch, -1, -1)
    x = torch.cat([prefix, x], 1)
    tables = rope(height, width, dim // heads, cfg["pos_embed_rope_base"])
    # `mask_k_bias`: keys have no bias.
    keep = torch.ones(3, dim)
    keep[1] = 0
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        block = f"blocks.{i}"
        qkv = F.linear(norm(x, f"{block}.norm1"), w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"] * keep.flatten())
        q, k, v = qkv.reshape(batch, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, tables), rotate(k, tables), v)
        attended = linear(attended.transpose(1, 2).reshape(batch, -1, dim), f"{block}.attn.proj")
        x = x + w[f"{block}.ls1.gamma"] * attended
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    tokens = prefix.shape[1]
    return norm(x[:, :tokens], "local_cls_norm" if local else "norm")[:, 0], norm(x[:, tokens:], "norm")


def head(w, x):
    layers = sorted({int(name.split(".")[1]) for name in w if name.startswith("mlp.")})
    for layer in layers:
        x = F.linear(x, w[f"mlp.{layer}.weight"], w[f"mlp.{layer}.bias"])
        if layer != layers[-1]:
            x = F.gelu(x)
    return F.linear(F.normalize(x, dim=-1), w["last_layer.weight"])


@torch.no_grad()
def sinkhorn(logits, temperature):
    q = (logits / temperature).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def cross_entropy(student, teacher, temperature, ignore_diagonal=False):
    """Student logits `[S, B, K]` and targets `[T, B, K]`: the mean over pairs of crops and images."""
    log_p = F.log_softmax(student / temperature, dim=-1)
    pairs = -torch.einsum("sbk,tbk->st", log_p, teacher)
    count = pairs.numel()
    if ignore_diagonal:
        pairs = pairs - torch.diag_embed(pairs.diagonal())
        count -= min(pairs.shape)
    return pairs.sum() / (student.shape[1] * count)


def koleo(x):
    """Per crop; 1e-8 in the difference and in the logarithm."""
    x = F.normalize(x, dim=-1, eps=1e-8)
    with torch.no_grad():
        dots = x @ x.T
        dots.fill_diagonal_(-1)
        nearest = dots.argmax(1)
    return -(F.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).log().mean()


def step(weights, given, options, teacher_arch=None):
    """Losses, gradients, updated student and its average, by the names of the golden files."""
    cfg, arch, rates = options["cfg"], options["arch"], options["schedule"]
    student_cfg, batch = cfg["student"], options["batch"]
    distils = teacher_arch is not None
    params = {n: t.clone().requires_grad_() for n, t in scoped(weights, "s.").items()
              if not n.endswith(("bias_mask", "periods"))}
    teacher = scoped(weights, "t.")
    crops, locals_ = given["collated_global_crops"], given["collated_local_crops"]
    masks, masked = given["collated_masks"].bool(), given["mask_indices_list"]
    out = {}

    with torch.no_grad():
        heads = (teacher_arch or arch)["num_heads"]
        cls, patches = backbone(scoped(teacher, "backbone."), crops, None, heads, student_cfg, False)
        dino_logits = head(scoped(teacher, "dino_head."), cls)
        ibot_logits = head(scoped(teacher, "ibot_head."), patches.flatten(0, 1)[masked])
        dino_targets = sinkhorn(dino_logits, rates["teacher_temp"])
        ibot_targets = sinkhorn(ibot_logits, rates["teacher_temp"])
    out["teacher.cls_after_head"], out["teacher.cls_centered"] = dino_logits, dino_targets
    out["teacher.masked_patch_centered"] = ibot_targets

    own = scoped(params, "backbone.")
    cls, patches = backbone(own, crops, None if distils else masks, arch["num_heads"], student_cfg, False)
    local_cls, _ = backbone(own, locals_, None, arch["num_heads"], student_cfg, True)
    logits = head(scoped(params, "dino_head."), cls)
    local_logits = head(scoped(params, "dino_head."), local_cls)
    patch_logits = head(scoped(params, "ibot_head."), patches.flatten(0, 1)[masked])
    out |= {"student.global.cls_pre_head": cls, "student.global.cls_after_head": logits,
            "student.global.patch_pre_head": patches, "student.global.masked_patch_after_head": patch_logits,
            "student.local.cls_pre_head": local_cls, "student.local.cls_after_head": local_logits}

    by_crop = lambda x: x.unflatten(0, (-1, batch))  # noqa: E731
    globals_, temp = len(crops) // batch, cfg["student_temp"]
    ignore = cfg["dino"]["global_ignore_diagonal"]
    global_terms = globals_ * (globals_ - 1) if ignore else globals_ ** 2
    local_terms = globals_ * (len(locals_) // batch)
    terms = global_terms + local_terms
    out["dino_global_crops_loss"] = cross_entropy(by_crop(logits), by_crop(dino_targets), temp, ignore)
    out["dino_local_crops_loss"] = cross_entropy(by_crop(local_logits), by_crop(dino_targets), temp)
    log_p = F.log_softmax(patch_logits / temp, dim=-1)
    out["ibot_loss"] = -((ibot_targets * log_p).sum(-1) * given["masks_weight"]).sum() / len(masks)
    out["koleo_loss"] = sum(koleo(x) for x in by_crop(cls)) / globals_
    out["total_loss"] = (
        cfg["dino"]["loss_weight"] * (global_terms / terms * out["dino_global_crops_loss"]
                                      + local_terms / terms * out["dino_local_crops_loss"])
        + cfg["ibot"]["loss_weight"] * out["ibot_loss"]
        + cfg["dino"]["koleo_loss_weight"] * globals_ * out["koleo_loss"])
    out["dino_local_loss_weight"] = torch.ones(())
    out["total_loss"].backward()

    # Clipping by module, AdamW's first step, and the average of what comes out.
    depth, optim, adam = arch["depth"], cfg["optim"], options["adamw"]
    ema = scoped(weights, "s.") if distils else teacher
    for module in ("backbone", "dino_head", "ibot_head"):
        members = {n: p for n, p in params.items() if n.startswith(module + ".")}
        norm = torch.stack([p.grad.norm() for p in members.values()]).norm()
        out[f"grad_norm.{module}"] = norm
        scale = (optim["clip_grad"] / (norm + 1e-6)).clamp(max=1)
        for name, p in members.items():
            out[f"g.{name}"] = p.grad
            lr = rates["last_layer_lr"] if "last_layer" in name else rates["lr"]
            if module == "backbone":
                inner = name.removeprefix("backbone.")
                embedding = inner.startswith("patch_embed") or inner.endswith("_token") or inner == "storage_tokens"
                layer = 0 if embedding else int(inner.split(".")[1]) + 1 if inner.startswith("blocks.") else depth + 1
                lr *= optim["layerwise_decay"] ** (depth + 1 - layer)
                lr *= optim["patch_embed_lr_mult"] if inner.startswith("patch_embed") else 1
            decays = not (name.endswith("bias") or "norm" in name or "gamma" in name)
            with torch.no_grad():
                grad = p.grad * scale
                decayed = p * (1 - lr * rates["weight_decay"]) if decays else p
                beta_1, beta_2 = adam["betas"]
                first, second = (1 - beta_1) * grad, (1 - beta_2) * grad ** 2
                denominator = (second / (1 - beta_2)).sqrt() + adam["eps"]
                updated = decayed - lr * (first / (1 - beta_1)) / denominator
            out[f"u.{name}"] = updated
            out[f"e.{name}"] = rates["momentum"] * ema[name] + (1 - rates["momentum"]) * updated
    return {name: t.detach() for name, t in out.items()}


def far(a, b):
    a, b = a.flatten(), b.flatten()
    return ((a - b).norm() / b.norm()).item() if b.norm() > 0 else a.norm().item()


def larger(generator, cfg, arch, sizes, weights):
    """A teacher of the given sizes; what no size changes is drawn like the rest."""
    def draw(shape, std=0.02, mean=0.0):
        return (mean + std * torch.randn(shape, generator=generator)).float().double()

    dim, hidden = arch["embed_dim"], int(arch["embed_dim"] * arch["ffn_ratio"])
    linear = lambda name, i, o: {f"{name}.weight": draw((o, i), 0.1), f"{name}.bias": draw((o,), 0.1)}  # noqa: E731
    norm = lambda name: {f"{name}.weight": draw((dim,), 0.1, 1.0), f"{name}.bias": draw((dim,), 0.1)}  # noqa: E731
    patch = cfg["patch_size"]
    own = {"cls_token": draw((1, 1, dim)), "storage_tokens": draw((1, cfg["n_storage_tokens"], dim)),
           "mask_token": draw((1, dim)), "patch_embed.proj.weight": draw((dim, 3, patch, patch), 0.05),
           "patch_embed.proj.bias": draw((dim,))}
    for i in range(arch["depth"]):
        block = f"blocks.{i}"
        own |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", dim, 3 * dim) | linear(f"{block}.attn.proj", dim, dim)
        own |= norm(f"{block}.norm2") | linear(f"{block}.mlp.fc1", dim, hidden) | linear(f"{block}.mlp.fc2", hidden, dim)
        own |= {f"{block}.ls1.gamma": draw((dim,), 0.1, 0.5), f"{block}.ls2.gamma": draw((dim,), 0.1, 0.5)}
    own |= norm("norm") | norm("local_cls_norm")
    found = {f"t.backbone.{name}": t for name, t in own.items()}
    for loss, (width, bottleneck) in sizes.items():
        prototypes = len(weights[f"s.{loss}_head.last_layer.weight"])
        layers = (linear("mlp.0", dim, width) | linear("mlp.2", width, width) | linear("mlp.4", width, bottleneck)
                  | {"last_layer.weight": draw((prototypes, bottleneck), 0.5)})
        found |= {f"t.{loss}_head.{name}": t for name, t in layers.items()}
    return found


def main():
    folder = Path(sys.argv[1])
    tensors, metadata = read(folder / "ssl_step.safetensors")
    options, kinds = json.loads(metadata["options"]), json.loads(metadata["kinds"])
    stated = step(tensors, tensors, options)
    compared = [name for name, kind in kinds.items() if kind in ("output", "grad")]
    worst = max((far(stated[name], tensors[name]), name) for name in compared if name in stated)
    print(f"{sum(name in stated for name in compared)} of {len(compared)} tensors of ssl_step, at most {worst[0]:.1e} away ({worst[1]})")
    print("not stated:", [name for name in compared if name not in stated])
    assert worst[0] < 1e-6, worst

    arch = {"depth": 4, "embed_dim": 48, "ffn_ratio": 3.0, "num_heads": 3}
    sizes = {"dino": (52, 20), "ibot": (44, 14)}
    given = {name: tensors[name] for name, kind in kinds.items() if kind in ("input", "weight") and not name.startswith("t.")}
    teacher = larger(torch.Generator().manual_seed(5), options["cfg"]["student"], arch, sizes, tensors)
    made = step(given | teacher, given, options, arch)
    options["cfg"]["distillation"] = {"enabled": True}
    options["teacher_arch"] = arch
    options["teacher_heads"] = {loss: {"hidden": w, "bottleneck": b} for loss, (w, b) in sizes.items()}
    made = {name: t for name, t in made.items() if name not in ("dino_local_loss_weight",)}
    new_kinds = {n: kinds[n] for n in given} | {n: "weight" for n in teacher}
    new_kinds |= {n: "grad" if n.startswith("g.") else "output" for n in made}
    tolerances = json.loads(metadata["tolerances"])
    tolerances = {n: tolerances.get(n, tolerances.get(n.replace("e.", "u.", 1), 1e-5)) for n in made}
    # Eight-byte integers and bytes as they came; numbers rounded to float32.
    stored = {n: (t.float() if t.is_floating_point() else t).contiguous() for n, t in (given | teacher | made).items()}
    text = {"case": "distillation_step", "set": "own", "source": "tests/distillation.py", "precision": metadata["precision"],
            "options": json.dumps(options), "kinds": json.dumps(new_kinds), "tolerances": json.dumps(tolerances),
            "f32_error": "{}", "param_groups": metadata["param_groups"]}
    save_file(stored, folder / "distillation_step.safetensors", text)


main()
