"Shapes are checked while testing, sums come out the same everywhere, and hypothesis draws the same cases every time."
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("capo", "typecheck.check")  # before the first import of capo
torch.set_num_threads(1)
settings.register_profile("capo", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("capo")
