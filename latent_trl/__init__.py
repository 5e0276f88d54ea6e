"""Reinforcement learning of vision-language models over learned latent actions.

Public names load on first use (PEP 562), so that `import latent_trl` stays as light as `import torch`.
"""

__version__ = "0.1.0"
