"""What each role came to, for summary.json: by the reports of its ranks, or by the metrics of a run that broke off."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from titan.config.settings import RunConfig
from titan.distill.rank import RoleReport
from titan.observe.metrics import EvalMetric, StepMetric, read_metrics
from titan.observe.progress import role_names
from titan.observe.summary import RoleResult


def final_results(config: RunConfig, reports: Mapping[str, RoleReport]) -> dict[str, RoleResult]:
    """Of a run whose ranks reported."""
    return {role: _result(reports[role], config) for role in role_names(config)}


def results_so_far(config: RunConfig, folder: Path, vocab_size: int) -> dict[str, RoleResult]:
    """Of the roles that made a step, as metrics.jsonl tells. What only a report knows of labels is None."""
    metrics = read_metrics(folder)
    models = {name: role.model for name, role in config.roles.items()}
    results = {}
    for role, model in models.items():
        steps = [metric for metric in metrics if isinstance(metric, StepMetric) and metric.role == role]
        evals = [metric for metric in metrics if isinstance(metric, EvalMetric) and metric.role == role]
        if not steps:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of megatron-core, on import
            from titan.model.parameters import num_parameters

        tokens, seconds = sum(metric.tokens for metric in steps), sum(metric.step_s for metric in steps)
        results[role] = RoleResult(
            params=num_parameters(model, vocab_size),
            tokens=tokens,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            heldout_bits_per_byte=evals[-1].heldout_bits_per_byte if evals else None,
            steps=len(steps),
        )
    return results


def _result(report: RoleReport, config: RunConfig) -> RoleResult:
    labels = report.extra
    return RoleResult(
        params=report.params,
        tokens=report.tokens,
        tokens_per_s=report.tokens / report.train_seconds if report.train_seconds else 0.0,
        heldout_bits_per_byte=report.heldout_bits_per_byte,
        steps=-(-report.tokens // (config.roles[report.role].batch_size * config.data.sequence_length)),
        labels_consumed=_whole(labels.get("labels_consumed")),
        labels_missed=_whole(labels.get("labels_missed")),
        labels_repeated=_whole(labels.get("labels_repeated")),
        max_lag_steps=_whole(labels.get("max_lag_steps")),
        label_bytes_per_token=labels.get("label_bytes_per_token"),
        features_missed=_whole(labels.get("features_missed")),
        student_wait_s=labels.get("student_wait_s"),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
