"""`python -m stm_model` is the `stm` command; `torchrun -m stm_model …` starts it in many processes."""

from stm_model.commands.main import run

run()
