"""The other side of tests/tests/weights/onnx.rs: what onnxruntime makes of a `model.onnx`.

onnx_models.py DIR    checks DIR/model.onnx and writes DIR/features.safetensors for DIR/pixels.safetensors
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load_file, save_file

folder = Path(sys.argv[1])
model = onnx.load(folder / "model.onnx")
onnx.checker.check_model(model, full_check=True)
assert model.opset_import[0].version >= 17
session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
found = {}
for name, pixels in load_file(folder / "pixels.safetensors").items():
    kinds = [output.name for output in session.get_outputs()]
    outputs = session.run(kinds, {"pixels": pixels})
    found |= {f"{name}.{kind}": np.ascontiguousarray(x) for kind, x in zip(kinds, outputs) if x.size}
save_file(found, folder / "features.safetensors")
