"""Metrics as ``evaluate`` modules: ``evaluate.load("compare/estimates/metrics/win_rate")``, with no network.

``load_metric("win_rate")`` finds them wherever the package is installed.
"""

from pathlib import Path

NAMES = ("win_rate", "length_controlled_win_rate", "sequence_kl", "preference_accuracy", "calibration_error")


def load_metric(name: str):
    """The ``evaluate`` metric of this project with that name.

    Example::

        from ppo_vs_dpo import load_metric

        print(load_metric("win_rate").compute(preferences=[1.0, 0.5, 0.0, 1.0]))

    Raises:
        UserError: there is no such metric.
    """
    import evaluate

    from ppo_vs_dpo.artifacts.errors import UserError
    from ppo_vs_dpo.artifacts.settings import nearest

    if name not in NAMES:
        raise UserError(f"metric {name}: no such metric.{nearest(name, list(NAMES))} There are {', '.join(NAMES)}.")
    return evaluate.load(str(Path(__file__).parent / name))
