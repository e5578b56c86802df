"""`stm evaluate`: the settings are in `stm_model.evaluation.config` and `stm_model.interactive.config`."""

import json
from typing import get_args, get_type_hints

from stm_model.commands.exits import interrupted
from stm_model.evaluation.config import EvaluateConfig
from stm_model.interactive.config import EvaluateInteractiveConfig

BENCHMARKS: tuple[str, ...] = get_args(get_type_hints(EvaluateConfig)["dataset"])
"""The first is the default; davis-interactive has the options of EvaluateInteractiveConfig."""


def evaluate(config: EvaluateConfig | EvaluateInteractiveConfig) -> int:
    """Run an evaluation and print its summary; the exit code."""
    from stm_model.distributed import Ranks

    if isinstance(config, EvaluateInteractiveConfig):
        from stm_model.interactive.evaluate import describe_interactive, evaluate_interactive

        summary = evaluate_interactive(config)
        text = describe_interactive
    else:
        from stm_model.evaluation.evaluate import SUMMARY, describe
        from stm_model.evaluation.evaluate import evaluate as run_evaluation

        try:
            summary, text = run_evaluation(config), describe
        except KeyboardInterrupt:
            kept = config.results is None and config.study is None
            more = (
                "; what is tracked is kept, and --resume goes on" if kept and (config.out / SUMMARY).is_file() else ""
            )
            return interrupted(f"interrupted{more}")
    if Ranks().first:
        print(json.dumps(summary, indent=1) if config.json else text(summary))
    return 0
