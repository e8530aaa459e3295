"""What can be found wrong before Ray starts. Nothing here writes; each finding is an error with its remedy."""

import socket
from collections.abc import Mapping
from pathlib import Path

from titan.checkpoint.folder import FROZEN, find_checkpoint, read_manifest, step_folder
from titan.checkpoint.pretrained import PretrainedWeights
from titan.cluster.session import local_inventory
from titan.cluster.token import check_token
from titan.config.environment import ray_address, wanted_kernels
from titan.config.pretrained import read_pretrained
from titan.config.settings import ClusterSettings, RunConfig
from titan.data.corpus import Corpus
from titan.data.tokenizer_json import other_tokenizer
from titan.errors import CheckpointError, ConfigError, PlatformError
from titan.plan.inventory import check_fits
from titan.plan.layout import role_layouts

CONNECT_TIMEOUT_S = 5.0
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""Preface and empty settings: what speaks gRPC, as Ray does, answers at once."""
MOST_WRONG = 5
"""Tensors that do not fit, of which each gets a line."""
MAY_CHANGE = ("checkpoint", "cluster", "eval", "observe", "recovery")
"""Sections that may differ when a run is resumed; in roles, `layout` may; of `run`, `storage`."""
MAY_CHANGE_OF_LABELS = tuple(
    f"labels.{name}" for name in ("keep", "max_bytes", "when_full", "segment_bytes", "copy_to", "wait_s")
)
MAY_CHANGE_OF_STUDENTS = (".backpressure", ".max_lag")
"""How long labels are kept, and how slow students are treated, changes no label."""


def check_start(config: RunConfig) -> None:
    """Raise for what the run cannot have: kernels, too few ranks, a port that is taken, a Ray that does not answer."""
    wanted_kernels()
    cluster = config.cluster
    if cluster.address is None:
        if not config.recovery.start_smaller:
            check_fits(role_layouts(config), local_inventory(cluster), cluster.cpu_ranks_per_core)
        _check_dashboard_port(cluster)
    else:
        check_cluster(cluster.address)


def check_cluster(where: str) -> None:
    """Raise PlatformError unless a Ray answers at `cluster.address`, wants a token and takes ours."""
    if (address := ray_address(where)) != "auto":
        _check_address(address)
        check_token(address)


def check_labels(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError if labels ask for more entries than the tokenizer has pieces."""
    if config.students and config.labels.codec in ("sampled", "top_k") and config.labels.top_k > corpus.vocab_size:
        raise ConfigError(
            f"labels.top_k is {config.labels.top_k}, more than the tokenizer's {corpus.vocab_size} pieces; "
            "a few dozen are enough"
        )


def check_init(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError unless every `students[].init` is a checkpoint of the student's model."""
    for student in config.students:
        if student.init is None:
            continue
        here = f"students.{student.name}.init is {student.init!r}"
        try:
            manifest = read_manifest(find_checkpoint(Path(student.init)))
        except CheckpointError as error:
            raise ConfigError(f"{here}: {error}") from None
        if FROZEN in manifest:
            raise ConfigError(f"{here}, of a frozen teacher, whose checkpoints hold no weights; leave it out")
        saved = manifest["model"] | {"vocab_size": manifest["vocab_size"]}
        own = student.model.model_dump() | {"vocab_size": corpus.vocab_size}
        if different := [f"{key} {saved.get(key)} there, {own[key]} here" for key in own if saved.get(key) != own[key]]:
            raise ConfigError(
                f"{here}, of another model: {', '.join(different)}; give students.{student.name}.model so"
            )


def check_pretrained(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError, one line a reason, unless the Hugging Face folder that is the teacher fits the run."""
    teacher = config.teacher
    if teacher.pretrained is None or teacher.model is None:
        return
    here, folder = f"teacher.source is {teacher.source!r}", Path(teacher.pretrained)
    found = read_pretrained(folder)
    own, theirs = teacher.model.model_copy(update={"kv_heads": teacher.model.num_kv_heads}), found.model
    theirs = theirs.model_copy(update={"kv_heads": theirs.num_kv_heads})
    mistakes = [
        f"teacher.model.{name} is {value}, {folder} has {getattr(theirs, name)}; leave teacher.model out"
        for name, value in own.model_dump().items()
        if value != getattr(theirs, name)
    ]
    if other := other_tokenizer(folder, corpus.tokenizer.path):
        mistakes.append(f"{here}: {other}; set data.tokenizer to the SentencePiece model that it was trained with")
    elif found.vocab_size < corpus.vocab_size:
        mistakes.append(
            f"{here}: it has {found.vocab_size} rows of vocabulary, the tokenizer {corpus.vocab_size} pieces; "
            "give another model"
        )
    if config.data.sequence_length > found.positions:
        mistakes.append(
            f"data.sequence_length is {config.data.sequence_length}, but {folder} was made for at most "
            f"{found.positions} positions; set it to fit"
        )
    if not mistakes:
        try:
            wrong = PretrainedWeights(folder).mistakes(theirs, corpus.vocab_size)
        except CheckpointError as error:
            wrong = [str(error)]
        mistakes += [f"{here}: {each}; give another model" for each in wrong[:MOST_WRONG]]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def check_checkpoints(config: RunConfig, folder: Path, resumed: Mapping[str, int], corpus: Corpus) -> None:
    """Raise CheckpointError unless each role's newest checkpoint has all its files and is of its model.

    Sizes are compared here; ranks also compare checksums, as they read the files anyway.
    """
    models = {name: role.model for name, role in config.roles.items()}
    for role, step in resumed.items():
        if step == 0:
            continue
        place = step_folder(folder / "checkpoints" / role, step)
        manifest = read_manifest(place)
        for name, receipt in manifest["files"].items():
            size = (place / name).stat().st_size if (place / name).is_file() else None
            if size != receipt["bytes"]:
                problem = "is missing" if size is None else f"has {size} bytes instead of {receipt['bytes']}"
                raise CheckpointError(
                    f"{place / name} {problem}; delete {place}, the run then goes on from the checkpoint before it"
                )
        saved = manifest["model"] | {"vocab_size": manifest["vocab_size"]}
        own = models[role].model_dump() | {"vocab_size": corpus.vocab_size}
        different = [f"{key} {saved.get(key)} there, {own[key]} in {role}" for key in own if saved.get(key) != own[key]]
        if different:
            raise CheckpointError(
                f"{place} is of another model: {', '.join(different)}; put back the run's own checkpoints, or delete it"
            )


def forbidden_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Names of settings that differ and may not when a run is resumed."""
    old, new = (_flat(config.model_dump(mode="json"), "") for config in (before, after))
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [name for name in different if not _may_change(name)]


def _may_change(name: str) -> bool:
    if name == "run.storage" or name.split(".")[0] in MAY_CHANGE or ".layout." in f"{name}.":
        return True
    return name in MAY_CHANGE_OF_LABELS or (name.startswith("students.") and name.endswith(MAY_CHANGE_OF_STUDENTS))


def _check_dashboard_port(cluster: ClusterSettings) -> None:
    if cluster.dashboard_port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        try:
            probe.bind(("127.0.0.1", cluster.dashboard_port))
        except OSError as error:
            raise PlatformError(
                f"cluster.dashboard_port is {cluster.dashboard_port}, which cannot be had ({error.strerror}); "
                "choose another, or leave it out for no dashboard"
            ) from None


def _check_address(address: str) -> None:
    """Ray itself would try again for minutes where nobody listens."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S) as connection:
            connection.sendall(HTTP2_HELLO)
            problem = "" if connection.recv(1) else "what listens there hangs up"
    except TimeoutError:
        problem = f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise PlatformError(
            f"cluster.address is {address}, but no Ray answers there ({problem}); start it with `ray start --head`, "
            "correct the address, or leave it out for a local Ray"
        )


def _flat(value: object, name: str) -> dict[str, object]:
    """Dotted names and values; students go by their names."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{name}.{item.get('name', i)}").items()}
    return {name: value}
