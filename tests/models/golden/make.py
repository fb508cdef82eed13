"""Run one reference implementation and keep its logits. Run once per reference, in an environment that has what the
reference needs; its code is never part of this project:

    git clone https://github.com/<repository> CODE && git -C CODE checkout <commit>
    python -m tests.models.golden.make NAME CODE
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.models.golden.references import ALL
from tests.models.golden.rule import derived, filled, image, save


def main(name: str, code: str) -> None:
    import torch

    reference = ALL[name]
    network = reference.build(Path(code)).eval()
    state = network.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if not derived(key)}
    network.load_state_dict(state | filled(shapes))
    with torch.no_grad():
        answer = reference.logits(network(torch.from_numpy(image(reference.size))))[0].numpy()
    # Derived buffers are part of the authors' files, too: an importer has to leave them out.
    save(reference, {key: tuple(tensor.shape) for key, tensor in state.items()}, answer)
    print(f"{name}: {len(state)} tensors, {len(answer)} logits, from {answer.min():.3f} to {answer.max():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
