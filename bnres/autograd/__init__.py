"""torch.autograd.Function wrappers: what is saved, which operator runs, where gradients go.

First derivatives come from the kernels. Second ones, and forward-mode ones, differentiate the
formulas of `bnres.kernels.reference`. Of each Function there is one with forward mode, and one
without, for torch.compile can't capture the first.
"""
