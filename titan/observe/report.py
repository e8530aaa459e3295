"""report.html and report.png: what a run came to, for people. Made from the run folder alone, at any time."""

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan.config.distillation import LabelSettings
from titan.config.model import LayoutSettings, ModelSettings
from titan.config.settings import RunConfig, StudentSettings
from titan.observe import figure, words
from titan.observe.events import event_text, event_time_s, read_events
from titan.observe.files import Record, read_config, read_json, write_whole
from titan.observe.heartbeat import read_beat
from titan.observe.marks import marks_of
from titan.observe.metrics import Metric, StepMetric, read_metrics
from titan.observe.planned import PICTURE_FILE, Promise, promises
from titan.observe.progress import role_names
from titan.observe.status import last_sign_of_life_s, longest_step_s, run_state, since_last_start
from titan.observe.summary import FILE as SUMMARY
from titan.observe.verdict import newest_evals, verdict

TEMPLATE = "report.html.j2"
MOST_EVENTS = 50
"""Events the timeline shows, the newest."""
UNKNOWN = "–"


@dataclass(frozen=True)
class Report:
    """Everything the page says."""

    headline: str
    sentences: Sequence[str]
    unfinished: str
    """Why the numbers are not final; empty for a finished run."""
    broken: Sequence[str]
    """One sentence a role whose loss was not finite."""
    picture: str
    """report.png in base64."""
    roles: Sequence[Record]
    students: Sequence[Record]
    features: Sequence[Record]
    promises: Sequence[Promise]
    plan_picture: str
    """plan.png in base64; empty where nothing was predicted."""
    facts: Sequence[tuple[str, str]]
    events: Sequence[tuple[str, str]]
    num_events: int
    toml: str


def write_report(folder: Path) -> Path:
    """Write report.png and a report.html that needs no other file; returns the latter. RunError if it is no run."""
    config, metrics, events = read_config(folder), read_metrics(folder), read_events(folder)
    this_part = since_last_start(events)
    quiet_s = time.time() - last_sign_of_life_s(folder)
    state, detail = run_state(this_part, quiet_s, longest_step_s(metrics), read_beat(folder))
    summary = _current_summary(folder, this_part)
    if summary and not events:
        state = summary.get("status", state)
    finished = state == "finished"
    last_step = max((metric.step for metric in metrics), default=0)
    how_far = (
        words.plural(config.run.steps, "step") if finished else f"step {last_step:,} of {config.run.steps:,}, {state}"
    )
    headline = f"{config.run.name}: {how_far}"
    sentences = verdict(config, metrics, finished)
    picture = figure.draw(config, metrics, headline, " ".join(sentences[:2]), marks_of(events))
    write_whole(folder / "report.png", picture)
    report = Report(
        headline=headline,
        sentences=sentences,
        unfinished="" if finished else f"This run is not finished ({', '.join(filter(None, (state, detail)))}).",
        broken=broken_losses(config, metrics),
        picture=base64.b64encode(picture).decode(),
        roles=_role_records(config, metrics, summary),
        students=_student_records(config, metrics, summary),
        features=_feature_records(config, metrics, summary),
        promises=promises(folder, this_part, metrics),
        plan_picture=_picture(folder / PICTURE_FILE),
        facts=[*_facts(config, summary, this_part), *_pauses(metrics)],
        events=[(_clock(event), _said(event)) for event in events[-MOST_EVENTS:]],
        num_events=len(events),
        toml=(folder / "config.toml").read_text(encoding="utf-8"),
    )
    path = folder / "report.html"
    write_whole(path, render(report).encode())
    return path


def _picture(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""


def render(report: Report) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _code
    return environment.get_template(TEMPLATE).render(report=report)


def broken_losses(config: RunConfig, metrics: Sequence[Metric]) -> list[str]:
    """One sentence for each role whose loss was not a finite number in some step."""
    sentences = []
    for role in role_names(config):
        steps = [m.step for m in metrics if isinstance(m, StepMetric) and m.role == role and not math.isfinite(m.loss)]
        if steps:
            sentences.append(
                f"The loss of `{role}` was not a finite number in {words.plural(len(steps), 'step')}, "
                f"the first of them step {steps[0]:,}."
            )
    return sentences


def _role_records(config: RunConfig, metrics: Sequence[Metric], summary: Record) -> list[Record]:
    """A row of the table of roles each; text throughout."""
    evals, styles = newest_evals(config, metrics), figure.role_styles(config)
    records = []
    for role, settings in config.roles.items():
        model, layout = settings.model, settings.layout
        steps = [metric for metric in metrics if isinstance(metric, StepMetric) and metric.role == role]
        result = summary.get("roles", {}).get(role, {})
        tokens = result.get("tokens") or sum(metric.tokens for metric in steps)
        speed = result.get("tokens_per_s") or (figure.speeds(steps)[-1] if steps else math.nan)
        at_step, bits = evals.get(role, (0, None))
        records.append(
            {
                "role": role,
                "colour": styles[role].colour,
                "control": styles[role].control,
                "shape": _shape(model),
                "params": words.count(result["params"]) if result.get("params") else UNKNOWN,
                "layout": _layout(layout),
                "steps": f"{len(steps):,}",
                "tokens": words.count(tokens),
                "speed": words.count(speed) if math.isfinite(speed) else UNKNOWN,
                "bits": UNKNOWN if bits is None else f"{bits:.3f}",
                "bits_at": f"step {at_step:,}" if bits is not None and at_step != config.run.steps else "",
            }
        )
    return records


def _student_records(config: RunConfig, metrics: Sequence[Metric], summary: Record) -> list[Record]:
    """A row of the table of labels each; text throughout. Without a summary only what the metrics tell."""
    records = []
    for student in config.students:
        result = summary.get("roles", {}).get(student.name, {})
        steps = [metric for metric in metrics if isinstance(metric, StepMetric) and metric.role == student.name]
        lags = [metric.lag for metric in steps if metric.lag is not None]
        tokens = sum(metric.tokens for metric in steps if metric.label_bytes is not None)
        bytes_per_token = sum(metric.label_bytes or 0 for metric in steps) / tokens if tokens else None
        waited_s = sum(metric.label_wait_s or 0.0 for metric in steps)
        newest = steps[-1] if steps else None
        records.append(
            {
                "role": student.name,
                "consumed": _number(result.get("labels_consumed", tokens // config.data.sequence_length or None)),
                "missed": _number(result.get("labels_missed")),
                "repeated": _number(result.get("labels_repeated")),
                "max_lag": _number(result.get("max_lag_steps", max(lags, default=None))),
                "bytes_per_token": _number(result.get("label_bytes_per_token", bytes_per_token), digits=1),
                "waited": words.duration(waited_s) if steps else UNKNOWN,
                "slow": _when_slow(student),
                "start": _start(student),
                "first_step": f"{steps[0].step:,}" if steps else "not yet",
                "weight": _weight(student),
                "newest_weight": _number(newest.distill_weight if newest else None, digits=2),
                "newest_lead": _number(newest.lead if newest else None, digits=3),
            }
        )
    return records


def _feature_records(config: RunConfig, metrics: Sequence[Metric], summary: Record) -> list[Record]:
    """A row a student and loss of features; text throughout."""
    records = []
    for student in config.students:
        missed = summary.get("roles", {}).get(student.name, {}).get("features_missed")
        steps = [metric for metric in metrics if isinstance(metric, StepMetric) and metric.role == student.name]
        for name, weight in student.distill.features.weights.items():
            values = [value for metric in steps if (value := getattr(metric, f"{name}_loss")) is not None]
            first, last = (values[0], values[-1]) if values else (None, None)
            records.append(
                {
                    "role": student.name,
                    "loss": name.replace("_", " "),
                    "weight": f"{weight:g}",
                    "first": _number(first, digits=4),
                    "last": _number(last, digits=4),
                    "steps": f"{len(values):,}",
                    "missed": _number(missed),
                }
            )
    return records


def _label_fact(labels: LabelSettings) -> str:
    """How labels are made, in words."""
    size = "" if labels.bytes_per_token is None else f" in {labels.bytes_per_token:g} bytes a token"
    made = {
        "sampled": f"the likeliest, up to {labels.top_k}, and some drawn from the rest{size}",
        "top_k": f"the likeliest, up to {labels.top_k}, and the rest as one bucket{size}",
        "random": f"{labels.draws} draws",
        "full": "every log-probability",
        "hidden": "the last hidden states, and the output weight of each step",
    }
    return f"{made[labels.codec]}; temperature {labels.temperature:g}"


def _facts(config: RunConfig, summary: Record, this_part: Sequence[Record]) -> list[tuple[str, str]]:
    started = next((event for event in this_part if event["event"] == "run_started"), {})
    facts = [
        ("seed", str(config.run.seed)),
        ("batch", _batches(config)),
        ("labels", _label_fact(config.labels)),
    ]
    if summary.get("wall_s") is not None:
        facts.append(("wall time", words.duration(summary["wall_s"])))
    if started:
        facts.append(("started", f"{_clock(started)} on {started.get('host', 'a host without a name')}"))
        facts.append(("version", str(started.get("version", "not told"))))
    return facts


def _batches(config: RunConfig) -> str:
    whole = f"{config.data.batch_size} samples of {config.data.sequence_length} tokens"
    own = [f"{one.name} {one.batch_size} samples" for one in config.students if config.regroups(one)]
    return f"{whole}; {', '.join(own)}" if own else f"{whole}, the same for every role"


def _current_summary(folder: Path, this_part: Sequence[Record]) -> Record:
    """summary.json, or {} if there is none or it is of a part of the run before the last resume."""
    path = folder / SUMMARY
    summary = read_json(path)
    if summary is None or (this_part and path.stat().st_mtime < event_time_s(this_part[0])):
        return {}
    return summary


def _shape(model: ModelSettings) -> str:
    kv = "" if model.num_kv_heads == model.heads else f", {model.num_kv_heads} kv heads"
    layers, heads = words.plural(model.layers, "layer"), words.plural(model.heads, "head")
    return f"{layers}, {model.hidden} wide, {heads}{kv}, ffn {model.ffn}"


def _layout(layout: LayoutSettings) -> str:
    if layout.stages is not None:
        return f"{words.plural(layout.ranks, 'rank')}: {words.plural(len(layout.stages), 'unlike stage')}"
    degrees = [f"{name} {getattr(layout, name)}" for name in ("tp", "pp", "dp") if getattr(layout, name) > 1]
    return f"{words.plural(layout.ranks, 'rank')}" + (f": {', '.join(degrees)}" if degrees else "")


def _start(student: StudentSettings) -> str:
    if student.start.lead is not None:
        return f"at a lead of {student.start.lead:g} nats"
    if student.start.now:
        return "with the log's newest step"
    return f"after step {student.start.step:,}" if student.start.step else "with the teacher"


def _when_slow(student: StudentSettings) -> str:
    """What happens when a student is slower than its teacher, in words."""
    if student.max_lag is None:
        return "falls behind"
    most = words.plural(student.max_lag, "step")
    who = f"{student.teacher} waits" if student.backpressure == "wait" else "skips"
    return f"{who} beyond {most}"


def _pauses(metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """How long roles that teach waited for their students, if they may."""
    waited_s: dict[str, float] = {}
    for metric in metrics:
        if isinstance(metric, StepMetric) and metric.student_wait_s is not None:
            waited_s[metric.role] = waited_s.get(metric.role, 0.0) + metric.student_wait_s
    said = ", ".join(f"{role} {words.duration(seconds)}" for role, seconds in waited_s.items())
    return [("waited for students", said)] if said else []


def _weight(student: StudentSettings) -> str:
    distill = student.distill
    if distill.weight == 0:
        return "0 (control)"
    how = {
        "lead": f"full from a lead of {distill.full_lead:g} nats",
        "constant": "constant",
        "ramp": f"rising over {words.percent(distill.ramp_fraction)} of its steps",
        "wsd": f"rising over {words.percent(distill.ramp_fraction)} of its steps, "
        f"falling over the last {words.percent(distill.decay_fraction)}",
    }
    return f"{distill.weight:g}, {how[distill.schedule]}"


def _number(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _clock(event: Record) -> str:
    return str(event.get("time", ""))[:19].replace("T", " ")


def _said(event: Record) -> str:
    return event_text(event["event"], {name: value for name, value in event.items() if name not in ("time", "event")})


def _code(text: str) -> object:
    """`name` in a sentence as code in HTML, everything else escaped."""
    from markupsafe import Markup, escape

    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )
