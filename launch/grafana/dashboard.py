"""Writes titan.json, the Grafana dashboard of a run, from the table below.

python launch/grafana/dashboard.py > launch/grafana/titan.json
"""

import json

PANELS = (
    # title, unit, expressions with their legends
    ("Goodput", "percentunit", {"titan_run_goodput_ratio{RUN}": "share of wall time in steps that count"}),
    ("Steps", "none", {"titan_role_step{RUN}": "{{role}}", "max(titan_role_steps_wanted{RUN})": "end"}),
    ("Cross-entropy, nats a token", "none", {"titan_role_cross_entropy_nats{RUN}": "{{role}}"}),
    ("Loss, nats a token", "none", {"titan_role_loss_nats{RUN}": "{{role}}"}),
    ("Held-out bits a byte", "none", {"titan_role_heldout_bits_per_byte{RUN}": "{{role}}"}),
    ("Tokens a second", "none", {"titan_role_tokens_per_second{RUN}": "{{role}}"}),
    ("Step time", "s", {"titan_role_step_seconds{RUN}": "{{role}}"}),
    ("Students: lag in steps", "none", {"titan_role_lag_steps{RUN}": "{{role}}"}),
    ("Students: lead of the teacher, nats a token", "none", {"titan_role_lead_nats{RUN}": "{{role}}"}),
    ("Students: bytes of labels a token", "none", {"titan_role_label_bytes_per_token{RUN}": "{{role}}"}),
    (
        "Students: share of time waiting for labels",
        "percentunit",
        {"rate(titan_role_label_wait_seconds_total{RUN}[5m])": "{{role}}"},
    ),
    ("Labels read", "Bps", {"rate(titan_role_label_bytes_total{RUN}[5m])": "{{role}}"}),
    ("Restarts", "none", {"titan_role_restarts_total{RUN}": "{{role}}"}),
    ("Newest recovery", "s", {"titan_role_recovery_seconds{RUN}": "{{role}}"}),
    ("Stragglers", "none", {"titan_role_stragglers{RUN}": "{{role}}"}),
    (
        "Share of time that checkpoints stall",
        "percentunit",
        {"rate(titan_role_checkpoint_stall_seconds_total{RUN}[5m])": "{{role}}"},
    ),
    (
        "Steps since the newest checkpoint",
        "none",
        {"titan_role_step{RUN} - titan_role_checkpoint_step{RUN}": "{{role}}"},
    ),
    (
        "Disk",
        "bytes",
        {"titan_run_disk_bytes{RUN}": "{{part}}", "titan_run_disk_free_bytes{RUN}": "free"},
    ),
)
COLUMNS, WIDTH, HEIGHT = 3, 8, 8
SOURCE = {"type": "prometheus", "uid": "${source}"}


def panel(number: int, title: str, unit: str, expressions: dict[str, str]) -> dict[str, object]:
    """One chart over time."""
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"spanNulls": False}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + at),
                "datasource": SOURCE,
                "expr": expression.replace("{RUN}", '{instance="$run"}'),
                "legendFormat": legend,
            }
            for at, (expression, legend) in enumerate(expressions.items())
        ],
    }


def dashboard() -> dict[str, object]:
    """The whole dashboard, as Grafana imports it."""
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    run = {
        "name": "run",
        "type": "query",
        "label": "Run",
        "datasource": SOURCE,
        "query": {"query": "label_values(titan_run_info, instance)", "refId": "run"},
        "refresh": 2,
    }
    return {
        "uid": "titan-run",
        "title": "titan: a run",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "tags": ["titan"],
        "templating": {"list": [source, run]},
        "panels": [panel(number, *row) for number, row in enumerate(PANELS)],
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
