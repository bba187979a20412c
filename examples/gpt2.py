"""A tiny GPT-2 of Hugging Face at random weights, to see which symmetries a transformer has and what they do to its measures.

flatminima audit examples/gpt2.py:build --out runs/gpt2          # needs the extra: pip install 'flatminima[transformers]'
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def build():
    """Model, no loss function (the model computes its own from the labels), and two batches of random tokens."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(0, config.vocab_size, (16, 12))
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(8)]
    return GPT2LMHeadModel(config), None, batches
