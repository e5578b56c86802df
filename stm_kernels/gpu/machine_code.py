"""The machine code of a compiled kernel: its instructions, and the loop in which it multiplies."""

import re

MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma", "v_wmma")
_LABEL = re.compile(r"^(\.L\w+):")
_NVIDIA = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*.*)")
_AMD = re.compile(r"^\s+([a-z]+_\w+.*)")
_BRANCHES = ("BRA", "s_cbranch", "s_branch")
_ENDS = ("EXIT", "s_endpgm")


def main_loop(code: str, jumps: bool = False) -> list[str]:
    """The instructions of the innermost loop that has the most matrix products; of equal ones the last.

    Args:
        code: of one kernel, as nvdisasm prints it, or LLVM for AMD.
        jumps: leave out what its branches can jump over.

    Returns:
        A line each, with operands; all of the kernel where no loop multiplies.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _NVIDIA.match(line) or _AMD.match(line):
            instructions.append(found[1])
    loops: dict[tuple[int, int], int] = {}
    for last, text in enumerate(instructions):
        target = re.search(r"\.L\w+", text)
        if text.startswith(_BRANCHES) and target and labels.get(target[0], last + 1) <= last:
            body = instructions[labels[target[0]] : last + 1]
            # waits for a barrier lie behind the end, and jump back into the loop
            if not any(line.startswith(_ENDS) for line in body):
                loops[labels[target[0]], last] = sum(line.startswith(MATRIX_INSTRUCTIONS) for line in body)
    multiplying = [loop for loop, products in loops.items() if products]
    innermost = [a for a in multiplying if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in multiplying)]
    first, last = max(reversed(innermost), key=loops.__getitem__, default=(0, len(instructions)))
    skipped: set[int] = set()
    for place in range(first, last) if jumps else ():
        target = re.search(r"\.L\w+", instructions[place])
        if instructions[place].startswith(_BRANCHES) and target and labels.get(target[0], last + 1) <= last:
            skipped.update(range(place + 1, labels[target[0]]))
    return [line for place, line in enumerate(instructions[first : last + 1], first) if place not in skipped]
