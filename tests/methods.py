"""The other side of tests/tests/ops/methods.rs: losses stated in PyTorch, after their authors' code.

methods.py CASES    for every loss and case in the JSON file: the value, and the gradients of the student's inputs
"""

import json
import sys

import torch
import torch.nn.functional as F


def mlp(case, scope, x, prefix="params."):
    """Linear layers with batch norm and ReLU between them; layer i is `<scope>.<2 i>`."""
    def get(name):
        return case[f"{prefix}{scope}.{name}"]

    x = F.linear(x, get("0.weight"), get("0.bias"))
    i = 1
    while f"{prefix}{scope}.{2 * i}.weight" in case:
        x = F.batch_norm(x, None, None, get(f"{2 * i - 1}.weight"), get(f"{2 * i - 1}.bias"), training=True, eps=1e-5)
        x = F.linear(F.relu(x), get(f"{2 * i}.weight"), get(f"{2 * i}.bias"))
        i += 1
    return x


def projections(case):
    return mlp(case, "projector", case["student_cls"]).chunk(2)


def off_diagonal(x):
    return x[~torch.eye(len(x), dtype=torch.bool)]


def byol(case, config):
    """Grill et al., regression loss of the published code: 2 - 2 cosine, both ways."""
    predictions = mlp(case, "predictor", mlp(case, "projector", case["student_cls"])).chunk(2)
    with torch.no_grad():
        targets = mlp(case, "projector", case["teacher_cls"], "teacher_params.").chunk(2)
    return sum((2 - 2 * F.cosine_similarity(p, t, dim=1)).mean() for p, t in zip(predictions, targets[::-1]))


def vicreg(case, config):
    """Bardes et al., main_vicreg.py."""
    x, y = projections(case)
    n, d = x.shape
    invariance = F.mse_loss(x, y)
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    std = [torch.sqrt(z.var(dim=0) + 0.0001) for z in (x, y)]
    variance = sum(F.relu(1 - s).mean() / 2 for s in std)
    covariance = sum(off_diagonal(z.T @ z / (n - 1)).pow(2).sum() / d for z in (x, y))
    return (config["invariance_weight"] * invariance + config["variance_weight"] * variance
            + config["covariance_weight"] * covariance)


def barlow_twins(case, config):
    """Zbontar et al., main.py."""
    x, y = (F.batch_norm(z, None, None, training=True, eps=1e-5) for z in projections(case))
    c = x.T @ y / len(x)
    return (torch.diagonal(c) - 1).pow(2).sum() + config["off_diagonal_weight"] * off_diagonal(c).pow(2).sum()


def info_nce(case, config):
    """Chen et al., NT-Xent, as a cross-entropy over the other crops."""
    z = F.normalize(torch.cat(projections(case)), dim=1)
    n = len(z)
    similarity = (z @ z.T / config["temperature"]).masked_fill(torch.eye(n, dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similarity, (torch.arange(n) + n // 2) % n)


def sigreg(case, config):
    """Balestriero and LeCun, algorithms 1 and 2; the directions are those that were drawn."""
    crops = [case["student_cls"]] + ([case["student_local_cls"]] if "student_local_cls" in case else [])
    z = mlp(case, "projector", torch.cat(crops)).reshape(-1, len(case["student_cls"]) // 2, config["projector"]["output"])
    centre = z[:2].mean(dim=0)
    directions = torch.tensor(case["draws"], dtype=torch.float64).reshape(config["directions"], -1)
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    normal = torch.exp(-0.5 * t ** 2)
    angles = (z @ directions.T).unsqueeze(-1) * t
    error = (torch.exp(1j * angles).mean(dim=1) - normal).abs().square() * normal
    statistic = torch.trapz(error, t, dim=-1) * z.shape[1]
    weight = config["regularization"]
    return (1 - weight) * (z - centre).square().mean() + weight * statistic.mean()


def feature_distillation(case, config):
    """AM-RADIO's cosine terms, of CLS and of patches; the teacher's features are as wide as the student's here."""
    def term(scope, features):
        predicted = F.linear(case[f"student_{features}"], case[f"params.{scope}.weight"], case[f"params.{scope}.bias"])
        return (1 - F.cosine_similarity(predicted, case[f"teacher_{features}"], dim=-1)).mean()

    return config["cls_weight"] * term("cls", "cls") + config["patch_weight"] * term("patches", "patches")


def online_linear(case, config):
    """Cross-entropy; an image without a label counts with zero."""
    logits = F.linear(case["student_cls"].detach(), case["params.classifier.weight"], case["params.classifier.bias"])
    classes, images = config["classes"], len(logits) // 2
    labels = torch.tensor([i * 7 % (classes + 1) for i in range(images)] * 2)
    return F.cross_entropy(logits, labels, ignore_index=classes, reduction="sum") / len(logits)


def inpainting(case, config):
    """SimMIM's loss, with its mask over patches."""
    patch = case["pixels"].shape[2] * case["pixels"].shape[3] // case["student_patches"].shape[1]
    patch = int(patch ** 0.5)
    target = F.unfold(case["pixels"], patch, stride=patch).transpose(1, 2).flatten(0, 1)
    predicted = F.linear(case["student_patches"].flatten(0, 1), case["params.decoder.weight"],
                         case["params.decoder.bias"])
    return F.l1_loss(predicted[case["masked"]], target[case["masked"]])


def classifier(case, x):
    """A hidden layer with GELU."""
    get = lambda name: case[f"params.classifier.{name}"]  # noqa: E731
    return F.linear(F.gelu(F.linear(x, get("0.weight"), get("0.bias"))), get("2.weight"), get("2.bias"))


def drawn(case):
    """What was drawn, a row for every image."""
    return torch.tensor(case["image_draws"], dtype=torch.float64).reshape(case["images"], -1)


def rotation(case, config):
    """Gidaris et al.: all turns of an image are in the batch, each with its class."""
    logits = F.linear(case["view_0_cls"], case["params.classifier.weight"], case["params.classifier.bias"])
    classes = drawn(case).reshape(case["images"], config["turns"], 4).argmax(dim=2)
    return F.cross_entropy(logits.reshape(config["turns"], case["images"], 4).permute(1, 2, 0), classes)


def jigsaw(case, config):
    """Noroozi and Favaro: features of the nine pieces in the order that is shown, concatenated."""
    pieces = torch.cat(case["view_0_cls"].chunk(9), dim=1)
    return F.cross_entropy(classifier(case, pieces), drawn(case).argmax(dim=1))


def relative_location(case, config):
    """Doersch et al.: the middle beside each neighbour."""
    middle, *neighbours = case["view_0_cls"].chunk(1 + config["neighbours"])
    sides = drawn(case).reshape(case["images"], config["neighbours"], 8).argmax(dim=2)
    losses = [F.cross_entropy(classifier(case, torch.cat([middle, neighbour], dim=1)), sides[:, i])
              for i, neighbour in enumerate(neighbours)]
    return sum(losses) / len(losses)


def cka(case, config):
    """Kornblith et al., equation 3, with linear kernels; features are interpolated by the drawn weights."""
    n, height, width = config["points"], case["height"], case["width"]
    count = n * height + n * n * width

    def kernel(patches, image, crop):
        numbers = drawn(case)[image, crop * count:(crop + 1) * count]
        down = numbers[:n * height].reshape(n, height)
        across = numbers[n * height:].reshape(n, n, width)[0]
        features = patches[crop * case["images"] + image].reshape(height, width, -1)
        points = torch.einsum("ah,bw,hwd->abd", down, across, features).flatten(0, 1)
        h = torch.eye(n * n, dtype=torch.float64) - 1 / (n * n)
        return h @ points @ points.T @ h

    def patches(model):
        inner = case.get(f"{model}_layer_0")
        return case[f"{model}_patches"] if inner is None else inner[:, -height * width:]

    losses = []
    for image in range(case["images"]):
        if drawn(case)[image, -1] == 0:
            continue
        for ours, theirs in [(0, 1), (1, 0)]:
            k = kernel(patches("student"), image, ours)
            m = kernel(patches("teacher"), image, theirs)
            losses.append(1 - (k * m).sum() / (k.square().sum() + 1e-12).sqrt() / (m.square().sum() + 1e-12).sqrt())
    return sum(losses, 0 * case["student_patches"].sum()) / (2 * case["images"])


def main():
    out = {}
    for name, cases in json.load(open(sys.argv[1])).items():
        out[name] = []
        for record in cases:
            case = {key: torch.tensor(x["values"], dtype=torch.float64).reshape(x["shape"])
                    for key, x in record["inputs"].items()}
            leaves = {key: case[key].requires_grad_() for key in record["gradients"]}
            case |= {key: x for key, x in record.items() if key not in ("inputs", "gradients", "config", "loss")}
            loss = globals()[name](case, record["config"])
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            out[name].append({
                "loss": loss.item(),
                "gradients": {key: (torch.zeros_like(leaves[key]) if g is None else g).flatten().tolist()
                              for key, g in zip(leaves, gradients)},
            })
    json.dump(out, sys.stdout)


main()
