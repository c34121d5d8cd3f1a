"""Where the tests run: on the GPU if there is one, else in the interpreter (see conftest.py)."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
