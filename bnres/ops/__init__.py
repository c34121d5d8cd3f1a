"""The fused operations as torch custom operators, so that torch.compile can capture them.

In eager mode the Functions call the plain implementations (``forward_impl``, ``backward_impl``)
directly and spare the dispatcher's time. The kernels, and with them Triton, are imported at the
first call. Inputs are dense, and what stands beside them lies in memory alike (see
`bnres.kernels.layout`).
"""
