"""The device of the tests: the GPU if there is one, else the CPU with triton's interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
