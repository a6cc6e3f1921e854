import torch

# The tensors here are small: threads would wait for each other longer than they work.
torch.set_num_threads(1)
