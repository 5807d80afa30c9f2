# python pth_to_safetensors.py dinov3_vits16_pretrain.pth dinov3_vits16.safetensors
import sys
import torch
from safetensors.torch import save_file

state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
# A checkpoint of the reference's training holds models by role, with heads that a backbone does not need.
state = state.get("teacher", state)
names = [name for name in state if "_head." not in name]
save_file({name: state[name].contiguous() for name in names}, sys.argv[2])
