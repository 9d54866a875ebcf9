"""Values that go by the results so far: the tree-structured Parzen estimator of Optuna (the only place that knows it).

The study is made anew from the record each time, so a search that goes on needs no other memory.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.job.space import FINITE, Domain, Space, Values, kind_of, quantised, random_values, shortened
from orchestrator.search.record import Trial

# Until so many trials have a result, values are drawn at random.
STARTUP_TRIALS = 5


def require() -> None:
    """Raises OrchestratorError when Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise OrchestratorError(
            "sampler: tpe needs Optuna, which is not installed; "
            "install it (pip install 'hff-orchestrator[search]') or use sampler random"
        )


def suggest(space: Space, trials: Sequence[Trial], *, seed: int, index: int, mode: str) -> Values:
    """The values of trial `index` after the trials so far; those still running count as bad, to spread the search."""
    require()
    measured = [trial for trial in trials if trial.curve]
    if len(measured) < STARTUP_TRIALS:
        return random_values(space, seed, index)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(seed=(seed + index) % 2**32, constant_liar=True, n_startup_trials=0)
        study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", sampler=sampler)
        distributions = {path: _distribution(optuna, domain) for path, domain in space.items()}
        for trial in trials:
            if trial.curve or not trial.ended:
                study.add_trial(_past(optuna, trial, space, distributions))
        asked = study.ask(distributions)
    return {path: _value(domain, asked.params[path]) for path, domain in space.items()}


def _distribution(optuna: Any, domain: Domain) -> Any:
    kind = kind_of(domain)
    if kind in FINITE:
        return optuna.distributions.CategoricalDistribution(tuple(range(len(domain[kind]))))
    low, high = domain[kind][:2]
    if kind == "randint":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=kind == "loguniform")


def _past(optuna: Any, trial: Trial, space: Space, distributions: dict[str, Any]) -> Any:
    """A trial as Optuna knows it: finished, cut short with its curve, or running."""
    state = optuna.trial.TrialState
    params = {path: _coordinate(domain, trial.values[path]) for path, domain in space.items()}
    common = {"params": params, "distributions": distributions}
    if trial.status == "finished":
        return optuna.trial.create_trial(state=state.COMPLETE, value=trial.metric, **common)
    if trial.ended:
        return optuna.trial.create_trial(state=state.PRUNED, intermediate_values=dict(trial.curve), **common)
    return optuna.trial.create_trial(state=state.RUNNING, **common)


def _coordinate(domain: Domain, value: Any) -> Any:
    kind = kind_of(domain)
    return list(domain[kind]).index(value) if kind in FINITE else value


def _value(domain: Domain, coordinate: Any) -> Any:
    kind = kind_of(domain)
    if kind in FINITE:
        return domain[kind][coordinate]
    if kind == "randint":
        return int(coordinate)
    if kind == "quniform":
        return quantised(coordinate, domain[kind])
    return shortened(coordinate, *domain[kind])
