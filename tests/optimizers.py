"""The other side of tests/tests/ops/optimizers.rs: optimizers stated in PyTorch.

optimizers.py CASES    for every case in the JSON file: the weights of every parameter after the last update
"""

import json
import sys

import torch

torch.set_default_dtype(torch.float64)


def orthogonal(matrix, steps):
    """Newton-Schulz as on kellerjordan.github.io/posts/muon, in the type of the matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with match_rms_adamw, without its bfloat16."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.setdefault(p, {"buffer": torch.zeros_like(p)})
                buffer = state["buffer"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(p.shape) ** 0.5
                p.sub_(orthogonal(ahead, group["ns_steps"]), alpha=group["lr"] * size)


def optimizer(case, spec, params):
    """The optimizer of one parameter, which may lie in several tensors."""
    config, lr, decay = case["config"], spec["lr"], spec["weight_decay"]
    if case["plugin"] == "sgd":
        # PyTorch's own decay is not decoupled: ours comes before the step.
        return torch.optim.SGD(params, lr=lr, momentum=config["momentum"], nesterov=config["nesterov"])
    if case["plugin"] == "muon" and spec["hidden"]:
        keys = {key: config[key] for key in ["momentum", "nesterov", "ns_steps"]}
        return Muon(params, lr=lr, weight_decay=decay, **keys)
    return torch.optim.AdamW(params, lr=lr, weight_decay=decay, betas=config["betas"], eps=config["eps"])


def run(case):
    """Weights by name after all updates."""
    weights = {}
    for spec in case["params"]:
        whole = torch.tensor(spec["start"]).reshape(spec["shape"])
        params = [part.clone().requires_grad_() for part in whole.chunk(spec["stacked"])]
        rule = optimizer(case, spec, params)
        for gradient in spec["gradients"]:
            for p, part in zip(params, torch.tensor(gradient).reshape(spec["shape"]).chunk(spec["stacked"])):
                p.grad = part.clone()
                if case["plugin"] == "sgd":
                    p.data.mul_(1 - spec["lr"] * spec["weight_decay"])
            rule.step()
        weights[spec["name"]] = torch.cat([p.detach() for p in params]).flatten().tolist()
    return weights


def own_muon_is_torchs():
    """PyTorch's own iteration is in bfloat16: a hundredth of the size of a step."""
    if not hasattr(torch.optim, "Muon"):
        return
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 10), torch.randn(4, 6, 10)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    keys = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "ns_steps": 5}
    rules = Muon([ours], **keys), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **keys)
    for gradient in gradients:
        for p, rule in zip((ours, theirs), rules):
            p.grad = gradient.clone()
            rule.step()
    moved, apart = (ours - start).norm(), (ours - theirs).norm()
    assert apart < 0.03 * moved, f"{apart} of {moved}"


own_muon_is_torchs()
print(json.dumps([run(case) for case in json.load(open(sys.argv[1]))]))
