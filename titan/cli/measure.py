"""`titan doctor --profile` and `--calibrate`: what devices and links take, measured alone and as a run has shown it."""

import json
import re
import statistics
from pathlib import Path

import tomli_w
from rich.console import Console
from rich.table import Table

from titan.config.environment import cpu_count
from titan.config.planning import (
    DeviceCostSettings,
    InventorySettings,
    LinkSettings,
    ProfileSettings,
    ShapeSettings,
    TaskSettings,
    load_inventory,
    load_profile,
)
from titan.config.settings import ClusterSettings, RunConfig
from titan.data.tokenizer import Tokenizer
from titan.errors import ConfigError
from titan.observe.events import read_events
from titan.observe.files import write_whole
from titan.observe.metrics import read_metrics
from titan.observe.planned import promises
from titan.observe.status import since_last_start
from titan.platform.device import num_devices, prepare_process, select_platform

PLAIN_WIDTH = 160
"""Columns where there is no terminal."""


def write_profile(
    config: RunConfig, out: Path, console: Console, kind: str | None, tensor: list[int], samples: list[int]
) -> None:
    """Measure every shape of model in a run, print a table, and write a profile.

    Links between nodes come last, where `cluster.address` names a Ray cluster; the rest has been written by then.
    Raises ConfigError, and PlatformError for a cluster that cannot be measured.
    """
    _check_out(out)
    if config.cluster.address is not None:  # before minutes of measuring
        from titan.cluster.preflight import check_cluster

        check_cluster(config.cluster.address)
    inventory = load_inventory(Path(config.cluster.inventory)) if config.cluster.inventory is not None else None
    platform = select_platform(config.cluster.device)
    prepare_process(platform)
    from titan.train.measure import measure_link, measure_shape  # megatron-core comes after the process is set up

    kind = kind or platform.kind
    together = num_devices(platform.kind) if platform.kind != "cpu" else cpu_count()
    shapes: list[ShapeSettings] = []
    speeds = []
    known: list[TaskSettings] = []
    for role, task in _tasks(config).items():
        alone = task.model_copy(update={"model": task.model.model_copy(update={"layers": 1, "tied": False})})
        if alone in known:  # another role has blocks of this shape
            continue
        known.append(alone)
        too_many = [tp for tp in tensor if task.model.num_kv_heads % tp]
        if too_many:
            raise ConfigError(f"--tensor {too_many[0]}: does not divide kv_heads ({task.model.num_kv_heads}) of {role}")
        console.print(f"measuring {role}: hidden {task.model.hidden}, {task.precision}", highlight=False)
        shape, update_gb_per_s = measure_shape(platform, kind, task, tensor, samples, together)
        speeds.append(update_gb_per_s)
        shapes.append(shape)
    latency_s, gb_per_s = measure_link(platform)
    profile = ProfileSettings(
        devices=(DeviceCostSettings(kind=kind, update_gb_per_s=min(speeds)),),
        shapes=tuple(shapes),
        links=(LinkSettings(between=(kind, kind), latency_s=latency_s, gb_per_s=gb_per_s),),
    )
    _write(profile, out)
    _show(profile, console)
    console.print(f"profile of {kind}: {out}", highlight=False, soft_wrap=True)
    if config.cluster.address is not None:
        write_links(config.cluster, out, console, kind, inventory)


def write_links(
    cluster: ClusterSettings, out: Path, console: Console, kind: str | None, inventory: InventorySettings | None = None
) -> None:
    """Measure links between the nodes of a Ray cluster and set them in a profile, which is made if it is not there.

    kind:      of nodes that Ray knows no kind for;  inventory: which kinds there are, and their islands
    Raises ConfigError for a profile that cannot be read and fewer than two nodes, PlatformError for a cluster that
    cannot be joined or measured.
    """
    address = cluster.address or ""
    if address != "auto" and re.fullmatch(r"[^/\s]+:\d{1,5}", address) is None:
        raise ConfigError(f"--address {address}: want host:port of a running Ray; `ray start --head` prints it")
    _check_out(out)
    profile = load_profile(out) if out.exists() else ProfileSettings()
    from titan.cluster.links import link_nodes, links_of, measure_links
    from titan.cluster.preflight import check_cluster
    from titan.cluster.session import ray_session

    check_cluster(address)
    with ray_session(cluster):
        pairs = measure_links(cluster, link_nodes(cluster, kind, inventory))
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    table = Table(box=None, pad_edge=False)
    for title in ("between", "and", "islands", "devices at once", "latency ms", "GB/s each"):
        table.add_column(title, justify="right" if title[0] in "dlG" else "left")
    for pair in pairs:
        table.add_row(
            pair.first.name, pair.second.name, f"{pair.first.island}, {pair.second.island}", str(pair.streams),
            f"{pair.time.latency_s * 1e3:.2f}", f"{pair.time.bytes_per_s / 1e9:.3f}",
        )  # fmt: skip
    console.print(table)
    links = {frozenset(link.between): link for link in (*profile.links, *links_of(pairs))}
    _write(profile.model_copy(update={"links": tuple(links.values())}), out)
    console.print(f"links between nodes: {out}", highlight=False, soft_wrap=True)


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise ConfigError(f"--profile {out}: {out.parent} is no folder; make it first")


def _write(profile: ProfileSettings, path: Path) -> None:
    """As it will be read: JSON where the file's name ends so, else TOML."""
    values = profile.model_dump(mode="json")
    text = json.dumps(values, indent=1) + "\n" if path.suffix == ".json" else tomli_w.dumps(values)
    write_whole(path, text.encode())


def _tasks(config: RunConfig) -> dict[str, TaskSettings]:
    vocab_size = config.data.vocab_size
    if config.data.tokenizer is not None:
        vocab_size = Tokenizer(Path(config.data.tokenizer)).vocab_size
    return {
        name: TaskSettings(
            model=role.model,
            vocab_size=vocab_size,
            sequence_length=config.data.sequence_length,
            batch_size=role.batch_size,
            precision=role.precision,
        )
        for name, role in config.roles.items()
    }


def _show(profile: ProfileSettings, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("hidden", "block", "tp", "samples", "forward ms", "backward ms", "kept MB", "workspace MB"):
        table.add_column(title, justify="left" if title == "block" else "right")
    for shape in profile.shapes:
        for block in shape.blocks:
            table.add_row(
                str(shape.hidden), block.block, str(block.tp), str(block.samples), f"{block.forward_s * 1e3:.2f}",
                f"{block.backward_s * 1e3:.2f}", f"{block.activation_bytes / 1e6:.2f}",
                f"{block.workspace_bytes / 1e6:.2f}",
            )  # fmt: skip
    console.print(table)
    for link in profile.links:
        console.print(
            f"link inside this host: {link.latency_s * 1e3:.2f} ms, {link.gb_per_s:.2f} GB/s", highlight=False
        )


def calibrate_profile(folder: Path, path: Path, console: Console) -> None:
    """Set each kind's calibration in a profile so that a run's predicted passes meet its measured ones.

    Raises RunError for no run folder, ConfigError for a profile that cannot be read or a run that measured nothing.
    """
    profile = load_profile(path)
    events = since_last_start(read_events(folder))
    ratios: dict[str, list[float]] = {}
    for promise in promises(folder, events, read_metrics(folder)):
        for kind, predicted_s, measured_s in promise.busy:
            ratios.setdefault(kind, []).append(measured_s / predicted_s)
    if not ratios:
        raise ConfigError(f"--calibrate {folder}: the run has measured nothing beside a prediction; let it run longer")
    known = {device.kind: device for device in profile.devices}
    for kind, found in ratios.items():
        before = known.get(kind, DeviceCostSettings(kind=kind))
        factor = statistics.median(found)
        known[kind] = before.model_copy(update={"calibration": before.calibration * factor})
        console.print(f"{kind}: passes took {factor:.3f} times what was predicted", highlight=False)
    _write(profile.model_copy(update={"devices": tuple(known.values())}), path)
    console.print(f"calibrated: {path}", highlight=False, soft_wrap=True)
