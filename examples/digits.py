"""A minimum of your own: train with SAM, average with SWAD, save the weights, and say how to rebuild the function.

python examples/digits.py                      # trains for a few seconds, writes digits.safetensors
flatminima measure examples/digits.py:build --checkpoint digits.safetensors
flatminima audit examples/digits.py:build --checkpoint digits.safetensors
"""

import torch
from safetensors.torch import save_model
from torch.nn.functional import cross_entropy

import flatminima as fm
from flatminima.data import load
from flatminima.models import build as network


def build():
    """Model, loss and data, as the command line wants them; the weights come from the checkpoint."""
    splits = load("digits")
    model = network("mlp", splits.input_shape, splits.classes, seed=0)
    return model, cross_entropy, (splits.train.x, splits.train.y)


def main():
    """Train."""
    model, loss_fn, (x, y) = build()
    held_out = load("digits").validation
    opt = fm.SAM(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), rho=0.05)
    swad = fm.SWAD(model)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(30):
        for rows in torch.randperm(len(y), generator=generator).split(64):
            loss = opt.step(
                lambda rows=rows: loss_fn(model(x[rows]), y[rows])
            )  # both passes, restored whatever happens
            swad.update()
        with torch.no_grad():
            value = float(loss_fn(model(held_out.x), held_out.y))
        print(f"epoch {epoch}: training loss {float(loss):.4f}, validation loss {value:.4f}")
        if swad.evaluate(value).dead:
            break
    result = swad.finalize()
    print(f"averaged {result.n} iterates, steps {result.start_step} to {result.end_step}")
    swad.copy_to(model)
    save_model(model, "digits.safetensors")


if __name__ == "__main__":
    main()
