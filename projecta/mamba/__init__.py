"""Mamba: the block as a torch module, and Hugging Face's Mamba models on projecta's scan."""

from projecta.mamba.block import MambaBlock, State
from projecta.mamba.huggingface import Acceleration, accelerate

__all__ = ["Acceleration", "MambaBlock", "State", "accelerate"]
