"""What every example shows: that two modules compute the same, forward and backward, and how many lines differ."""

import difflib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stm_kernels.testing import allowed_error_shares


def changed_lines(before: type[nn.Module], after: type[nn.Module]) -> int:
    """Lines of a class that become others in another one, and one that imports what is new."""
    old, new = (inspect.getsource(module).splitlines()[1:] for module in (before, after))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return 1 + sum(max(i2 - i1, j2 - j1) for what, i1, i2, j1, j2 in blocks if what != "equal")


def results(module: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a module makes of its inputs in a dtype, and the gradients of a fixed sum of that, by name.

    Args:
        module: takes the inputs by name and returns a tensor or several.
        inputs: floating-point tensors.
        dtype: of the inputs, the parameters and the results.
    """
    module = module.to(dtype)
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}
    outputs = module(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else [output for output in outputs if output is not None]
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    leaves = inputs | trained
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)).sum()
        for output in outputs
        if output.requires_grad
    )
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}


def compare(
    before: nn.Module, after: nn.Module, inputs: Callable[[int], dict[str, Tensor]]
) -> dict[str, tuple[float, float]]:
    """Run two modules that share their parameters on the same inputs.

    Args:
        before, after: as people have it, and with the read of this package.
        inputs: draws inputs from a seed. Four draws are judged together: the errors of one are a matter of luck.

    Returns:
        For every result the largest difference of the two in float32, and which share that is of what rounding allows:
        the new one may err twice as much as the old one, both measured against the old one in float64.
    """
    after.load_state_dict(before.state_dict())

    def of_all_draws(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        draws = [results(module, inputs(seed), dtype) for seed in range(4)]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    truth = of_all_draws(before, torch.float64)
    old, new = (of_all_draws(module, torch.float32) for module in (before, after))
    shares = allowed_error_shares(truth, old, new)
    return {name: ((new[name] - old[name]).abs().amax().item(), share) for name, share in shares.items()}


def report(before: nn.Module, after: nn.Module, inputs: Callable[[int], dict[str, Tensor]]) -> None:
    """Print what `compare` finds and how many lines differ."""
    print(f"changed lines: {changed_lines(type(before), type(after))}")
    print(f"{'':32} max |new - old|   share of what rounding allows")
    for name, (difference, share) in compare(before, after, inputs).items():
        print(f"{name:32} {difference:15.1e}   {share:.2f}")
