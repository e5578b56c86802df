"""What the tests of commands share."""


def refused(result: tuple[int, str, str], *parts: str) -> bool:
    """Whether a command ended with exit code 2 and one line that has these parts, and printed nothing else."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("stm: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err
    return True
