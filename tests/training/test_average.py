"""The average of weights: its values, its file, what is refused."""

import pytest
import torch

from stm_model.network.weights import read_tensors, write_tensors
from stm_model.training.average import main


@pytest.fixture
def run(tmp_path):
    """Average files of `tmp_path` into one of them; what is said where it is refused."""
    write_tensors({"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(7)}, tmp_path / "one.safetensors")
    write_tensors({"a": torch.tensor([4.0, 8.0]), "n": torch.tensor(9)}, tmp_path / "two.safetensors")
    write_tensors({"a": torch.tensor([4.0]), "n": torch.tensor(9)}, tmp_path / "other.safetensors")

    def call(*files: str, out: str = "out.safetensors") -> str | None:
        try:
            main([*(str(tmp_path / file) for file in files), "--out", str(tmp_path / out)])
        except SystemExit as end:
            return str(end.code)
        return None

    return call


def test_a_folder_that_is_missing_is_named(run, tmp_path):
    said = run("one.safetensors=1", out="none/out.safetensors")
    assert f"{tmp_path / 'none' / 'out.safetensors'}: cannot be written" in said


def test_each_file_counts_as_often_as_is_said(run, tmp_path):
    assert run("one.safetensors=1", "two.safetensors=2") is None
    found = read_tensors(tmp_path / "out.safetensors")
    assert found["a"].dtype == torch.float16 and found["a"].tolist() == [3.0, 6.0] and found["n"] == 7


@pytest.mark.parametrize(
    "files, message",
    [
        (["one.safetensors=1", "other.safetensors=1"], "a: expected one shape in all files, got (2,) and (1,)"),
        (["one.safetensors"], "expected FILE=NUMBER with a number above 0"),
        (["one.safetensors=0"], "expected FILE=NUMBER with a number above 0"),
        (["three.safetensors=1"], "no such file"),
    ],
)
def test_what_has_no_average_is_refused_and_writes_nothing(run, tmp_path, files, message):
    assert message in run(*files)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_exists_stays(run, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    assert "out.safetensors exists" in run("one.safetensors=1")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
