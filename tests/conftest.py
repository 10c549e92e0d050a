"""One thread: the suite's tensors are small, and spinning threads slow a loaded machine tenfold."""
import torch

torch.set_num_threads(1)
